"""Parts of the numeric tests: an engine on the tiny model, and samples whose log-probs are its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from metaclaw_hooks.types import Sample, SampleTurn
from metaclaw_trainer.batching import datum_of
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.settings import TrainerSettings


def tiny_settings(model: Path, home: Path, **others: object) -> TrainerSettings:
    values = {
        "base_model": str(model), "home": home, "device": "cpu", "dtype": "float32", "rank": 4, "nice": 0,
        "torch_threads": 1, "targets": ["q_proj", "v_proj", "down_proj"], "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainerSettings.model_validate(values | others)


def random_sample(
    seed: int,
    rewards: Sequence[float] = (0.0,),
    prompt: int = 6,
    response: int = 5,
    agent: str = "ada",
    version: int = 0,
) -> Sample:
    """Turns of random tokens, each after ``prompt`` tokens of its own; log-probs -1."""
    chance, tokens, turns = random.Random(seed), [], []
    for number, reward in enumerate(rewards):
        tokens += [chance.randrange(2000) for _ in range(prompt)]
        turns.append(SampleTurn(f"t{seed}-{number}", len(tokens), (-1.0,) * response, reward))
        tokens += [chance.randrange(2000) for _ in range(response)]
    return Sample(f"s{seed}", agent, f"session-{seed}", tuple(tokens), tuple(turns), version, 0)


def as_sampled(engine: EngineThread, samples: Sequence[Sample], key: str | None = None) -> list[Sample]:
    """The same samples with the log-probs that the engine itself gives them, as an exact sampler would."""
    datums = [datum_of(sample, [0.0] * len(sample.turns)) for sample in samples]
    found = []
    for sample, logprobs in zip(samples, engine.call(lambda e: e.logprobs(key, datums)), strict=True):
        values = iter(logprobs.tolist())
        turns = tuple(
            SampleTurn(t.trace_id, t.start, tuple(min(next(values), 0.0) for _ in t.logprobs), t.reward)
            for t in sample.turns
        )
        found.append(
            Sample(sample.id, sample.agent, sample.session, sample.token_ids, turns, sample.adapter_version, 0)
        )
    return found
