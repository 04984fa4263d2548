"""Do sampler and trainer give the same tokens the same log-probs? Asked of every sample whose version is at hand.

At the same version they must, up to the rounding of the sampler's type. If they do not, one side has another base
model, type, adapter or chat template, and a gradient from such a sample would point anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from metaclaw_hooks.types import Sample
from torch import Tensor

from metaclaw_trainer.batching import Datum
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.proof import Proof

PROOF_TOKENS = 64  # one short forward pass, here and in vLLM


class DisagreementError(Exception):
    """Samples that were scored differently by sampler and trainer; caught where the batch was put together."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(f"{len(reasons)} samples")
        self.reasons = reasons  # sample id -> reason


class Agreement:
    """The distances of one batch, in nats a token."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._sums: dict[str, tuple[float, int]] = {}

    def check(self, sample: Sample, datum: Datum, now_N: Tensor) -> str | None:
        """Why the sample must be set aside; ``None``: it agrees. ``now_N``: the trainer's log-probs at its version."""
        apart_N = (now_N - datum.sampled_N).abs()
        mean = float(apart_N.mean())
        if mean <= self._threshold:
            self._sums[sample.id] = (float(apart_N.sum()), len(apart_N))
            return None
        return (
            f"sampler and trainer disagree by {mean:.2f} nats a token at version {sample.adapter_version} "
            f"(gap_threshold is {self._threshold:g}): another base model, dtype, adapter or chat template on one side?"
        )

    def metrics(self) -> dict[str, float]:
        """``gap`` over all tokens, ``gap_worst`` of a sample; nothing if no sample could be asked about."""
        if not self._sums:
            return {}
        total, tokens = (sum(part) for part in zip(*self._sums.values(), strict=True))
        return {"gap": total / tokens, "gap_worst": max(apart / count for apart, count in self._sums.values())}


def make_proof(engine: EngineThread, key: str, samples: Sequence[Sample]) -> Proof:
    """Score the end of the shortest of ``samples``, as a text of its own, under the adapter ``key``.

    A sample has a prompt and an answer, so at least two tokens.
    """
    sample = min(samples, key=lambda one: len(one.token_ids))
    end = sample.turns[-1].end
    tokens = sample.token_ids[max(0, end - PROOF_TOKENS) : end]
    count = len(tokens) - 1
    datum = Datum(
        input_ids_L=torch.tensor(tokens[:-1], dtype=torch.int64),
        predict_at_N=torch.arange(count),
        targets_N=torch.tensor(tokens[1:], dtype=torch.int64),
        sampled_N=torch.zeros(count),
        advantages_N=torch.zeros(count),
    )
    [logprobs_N] = engine.call(lambda e: e.logprobs(key, [datum]))
    return Proof(sample.id, tuple(tokens), tuple(logprobs_N.tolist()))
