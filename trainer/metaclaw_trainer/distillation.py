"""Teachers: another distribution over the student's own tokens, as a pull in the advantage (``batching.Pull``).

On-policy distillation: a stronger model scores the tokens that the student drew, and each token's advantage loses
coefficient * (logprob of student - logprob of teacher), which in expectation is the gradient of the reverse KL to it
(Agarwal et al. 2023, arXiv:2306.13649; Lu, "On-Policy Distillation", Thinking Machines, October 2025). Hindsight: the
same model scores its own answer once more with the hint in its prompt that says how the answer should have been; what
the hint makes likelier is pulled up (the hindsight-guided on-policy distillation of OpenClaw-RL, arXiv:2603.10165,
where the advantage of a token is that gap).

Departures: the teacher is any vLLM (``prompt_logprobs``), asked about token ids and never about text, so a teacher with
another vocabulary is refused. The hint stands as a user message of its own right before the answer; in a merged session
before the first one, so that later turns see it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from metaclaw_hooks.types import Sample
from transformers import AutoTokenizer

from metaclaw_trainer.batching import Datum, Pull, datum_of
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import TeacherError, TrainerError, VllmRefusedError
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.vllm_client import VllmClient

_PROBE = "The quick brown fox, 12345.678\n\tdef f(x): return x**2  # naïve façade, привет, 你好, こんにちは, مرحبا, 🙂"
_PROBES = 256  # token ids, evenly spaced, whose text both sides must agree on


class TeacherClient(VllmClient):
    """A vLLM as teacher."""

    def check_vocabulary(self, model: str, tokenizer: Any) -> None:
        """Make sure that a token id means the same on both sides.

        Raises:
            TeacherError: if it does not.
        """
        theirs = self._json("POST", "/tokenize", {"model": model, "prompt": _PROBE, "add_special_tokens": False})[
            "tokens"
        ]
        ours = tokenizer.encode(_PROBE, add_special_tokens=False)
        ids = list(range(0, len(tokenizer), max(1, len(tokenizer) // _PROBES)))
        try:
            text = self._json("POST", "/detokenize", {"model": model, "tokens": ids})["prompt"]
        except VllmRefusedError as error:
            raise TeacherError(f"teacher {model!r} does not know the token ids of the student: {error}") from error
        if theirs != ours or text != tokenizer.decode(ids):
            raise TeacherError(
                f"teacher {model!r} at {self.url} has another vocabulary than the base model, so it cannot "
                "score the student's tokens: choose a teacher of the same model family"
            )


class HintPlacer:
    """Writes a hint into the prompt of an answer, on the level of token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        asked = self._render([{"role": "user", "content": "Q"}])
        self._asked = asked
        self._header = self._render([{"role": "user", "content": "Q"}], add_generation_prompt=True)[len(asked) :]

    def place(self, sample: Sample) -> Datum | None:
        """The sampled tokens behind a prompt with the sample's hint; ``None`` if there is no place for it."""
        start = sample.turns[0].start
        at = start - len(self._header)
        if not sample.hint or not self._header or at < 0 or list(sample.token_ids[at:start]) != self._header:
            return None
        both = self._render([{"role": "user", "content": "Q"}, {"role": "user", "content": sample.hint}])
        if both[: len(self._asked)] != self._asked:
            return None
        hint = torch.tensor(both[len(self._asked) :], dtype=torch.int64)
        plain = datum_of(sample, [0.0] * len(sample.turns))
        return Datum(
            input_ids_L=torch.cat([plain.input_ids_L[:at], hint, plain.input_ids_L[at:]]),
            predict_at_N=plain.predict_at_N + len(hint),
            targets_N=plain.targets_N,
            sampled_N=plain.sampled_N,
            advantages_N=plain.advantages_N,
        )

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class Distillation:
    """The pulls that the settings ask for."""

    def __init__(self, engine: EngineThread, settings: TrainerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._teacher: TeacherClient | None = None
        self._placer: HintPlacer | None = None

    def __call__(self, key: str, samples: Sequence[Sample]) -> list[tuple[Pull, ...]]:
        """Further pulls of each sample, under adapter ``key``.

        Raises:
            TeacherError: if the teacher cannot be asked or has another vocabulary; nothing is trained without it.
        """
        pulls: list[tuple[Pull, ...]] = [()] * len(samples)
        if self._settings.teacher_coefficient > 0:
            pulls = [(*have, self._from_teacher(sample)) for have, sample in zip(pulls, samples, strict=True)]
        if self._settings.hint_coefficient > 0:
            pulls = [(*have, *more) for have, more in zip(pulls, self._from_hints(key, samples), strict=True)]
        return pulls

    def _from_teacher(self, sample: Sample) -> Pull:
        model = self._settings.teacher_model or ""
        try:
            if self._teacher is None:
                teacher = TeacherClient(self._settings.teacher_url or "", self._settings.vllm_api_key)
                teacher.check_vocabulary(model, self._tokenizer())
                self._teacher = teacher
            logprobs = torch.tensor(self._teacher.prompt_logprobs(model, sample.token_ids), dtype=torch.float32)
        except TeacherError:
            raise
        except TrainerError as error:
            raise TeacherError(f"the teacher {model!r} could not be asked: {error}") from error
        at_N = datum_of(sample, [0.0] * len(sample.turns)).predict_at_N
        return Pull("teacher", self._settings.teacher_coefficient, logprobs[at_N])

    def _from_hints(self, key: str, samples: Sequence[Sample]) -> list[tuple[Pull, ...]]:
        self._placer = self._placer or HintPlacer(self._tokenizer())
        placed = {i: datum for i, sample in enumerate(samples) if (datum := self._placer.place(sample)) is not None}
        scored = self._engine.call(lambda e: e.logprobs(key, list(placed.values()))) if placed else []
        pulls: list[tuple[Pull, ...]] = [()] * len(samples)
        for i, logprobs in zip(placed, scored, strict=True):
            pulls[i] = (Pull("hint", self._settings.hint_coefficient, logprobs),)
        return pulls

    def _tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                self._settings.base_model, trust_remote_code=self._settings.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise TeacherError(f"the base model {self._settings.base_model} has no tokenizer: {error}") from error
