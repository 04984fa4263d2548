"""The training loop over the real store, the real engine and a tiny real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from metaclaw_hooks.types import Sample
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer import forward
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.agreement import PROOF_TOKENS
from metaclaw_trainer.batching import Datum, datum_of
from metaclaw_trainer.checkpoints import read_checkpoint, read_manifest
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.proof import read_proof
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import open_store
from metaclaw_trainer.versions import StoredVersions

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings


class Trainer:
    """One trainer process, without its HTTP side."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.engine = EngineThread(settings)
        self.engine.start()
        self.store = open_store(settings.store_url)
        owner = Owner(self.store, settings.folder / "owners", 900)
        self.queue = StoredQueue(self.store, owner.id, Limits(49152, 4096, 1000, settings.batch_size))
        self.agents = AgentBook(self.store, settings.batch_size)
        self.versions = StoredVersions(self.store, owner.id)
        self.loop = TrainingLoop(self.engine, self.queue, self.versions, settings)
        self.agents.set_training("ada", AgentTraining(allowed=True))

    def close(self) -> None:
        self.engine.stop()
        self.store.close()

    def feed(self, seeds: range, key: str | None = None, version: int = 0) -> list[Sample]:
        """Queue samples that the engine's own adapter ``key`` might have drawn, with rewards that alternate."""
        raw = [random_sample(seed, rewards=(0.5 if seed % 2 else -0.5,), version=version) for seed in seeds]
        samples = as_sampled(self.engine, raw, key)
        assert not self.queue.put(samples).refused
        return samples


@pytest.fixture
def trainer(tiny_model: Path, tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tiny_settings(tiny_model, tmp_path, batch_size=4))
    yield trainer
    trainer.close()


def test_a_full_batch_becomes_a_version_with_its_lineage(trainer: Trainer) -> None:
    samples = trainer.feed(range(4))
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.head, status.newest, status.trained, status.queued) == (1, 1, 4, 0)
    folder = trainer.loop.folder("ada", 1)
    lineage = read_manifest(folder)["lineage"]
    assert lineage["trace_ids"] == [turn.trace_id for sample in samples for turn in sample.turns]
    assert (lineage["parent"], lineage["number"]) == (0, 1)
    listed = trainer.versions.after(0)[0]
    assert listed.sha256 == read_manifest(folder)["files"]["adapter_model.safetensors"]["sha256"]
    assert listed.metrics["reward"] == 0.0
    assert listed.metrics["gap"] < 1e-4


def test_a_version_comes_with_a_trace_that_its_own_weights_scored(trainer: Trainer) -> None:
    samples = trainer.feed(range(4))
    trainer.loop.run_once()
    proof = read_proof(trainer.store, "ada@v1")
    assert proof is not None
    [sample] = [one for one in samples if one.id == proof.sample_id]
    assert proof.token_ids == sample.token_ids[-PROOF_TOKENS:]
    datum = as_one_text(proof.token_ids)
    new, base = (trainer.engine.call(lambda e, k=key: e.logprobs(k, [datum])[0]) for key in ("agent:ada", None))
    assert torch.allclose(torch.tensor(proof.logprobs), new, atol=1e-5)
    assert not torch.allclose(torch.tensor(proof.logprobs), base, atol=1e-5)
    assert read_proof(trainer.store, "ada@v2") is None
    trainer.queue.recall([sample.turns[0].trace_id])
    assert read_proof(trainer.store, "ada@v1") is None


def test_an_unfilled_batch_waits(trainer: Trainer) -> None:
    trainer.feed(range(3))
    assert not trainer.loop.run_once()
    assert trainer.agents.status("ada").idle_reason == "3 of 4 samples are waiting"


def test_rewards_move_the_probability_of_what_they_praise(trainer: Trainer) -> None:
    samples = trainer.feed(range(4))
    before = trainer.engine.call(lambda e: [float(x.sum()) for x in e.logprobs(None, _datums(samples))])
    trainer.loop.run_once()
    after = trainer.engine.call(lambda e: [float(x.sum()) for x in e.logprobs("agent:ada", _datums(samples))])
    gains = [b - a for a, b in zip(before, after, strict=True)]
    assert all((gain > 0) == (sample.reward > 0) for gain, sample in zip(gains, samples, strict=True)), gains


def test_a_batch_without_signal_is_skipped_and_explained(trainer: Trainer) -> None:
    raw = [random_sample(seed, rewards=(0.0,)) for seed in range(4)]
    trainer.queue.put(as_sampled(trainer.engine, raw))
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.newest, status.set_aside) == (0, 4)
    assert "no signal" in (status.idle_reason or "")


def test_samples_of_another_sampler_are_set_aside_and_the_rest_is_trained(trainer: Trainer) -> None:
    trainer.queue.put([random_sample(100, rewards=(1.0,))])  # log-probs of -1, which this model never gave
    trainer.feed(range(3))
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.trained, status.set_aside) == (3, 1)
    assert "sampler and trainer disagree" in (status.idle_reason or "")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_sample_of_another_adapter_is_found_at_the_version_it_claims(
    tiny_model: Path, tmp_path: Path, epochs: int
) -> None:
    trainer = Trainer(
        tiny_settings(tiny_model, tmp_path, batch_size=4, epochs=epochs, gap_threshold=0.05, learning_rate=0.05)
    )
    trainer.feed(range(4))
    assert trainer.loop.run_once()
    trainer.feed(range(4, 7), "agent:ada", 1)
    trainer.feed(range(7, 8), None, 1)  # says version 1, but the base model drew it
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.head, status.trained, status.set_aside) == (2, 7, 1)
    lineage = read_manifest(trainer.loop.folder("ada", 2))["lineage"]
    assert lineage["sample_ids"] == ["s4", "s5", "s6"]
    assert lineage["metrics"]["gap_worst"] < 1e-3
    trainer.close()


def test_a_refused_sample_leaves_the_step_as_if_it_had_never_been_there(tiny_model: Path, tmp_path: Path) -> None:
    weights = []
    for folder, stranger in (("with", True), ("without", False)):
        trainer = Trainer(
            tiny_settings(tiny_model, tmp_path / folder, batch_size=2, gap_threshold=0.05, learning_rate=0.05)
        )
        trainer.feed(range(2))
        trainer.loop.run_once()
        trainer.feed(range(2, 4), "agent:ada", 1)
        if stranger:
            trainer.feed(range(7, 8), None, 1)
            trainer.agents.set_training("ada", AgentTraining(batch_size=3))
        assert trainer.loop.run_once()
        weights.append((trainer.loop.folder("ada", 2) / "adapter_model.safetensors").read_bytes())
        trainer.close()
    assert weights[0] == weights[1]


def test_a_stale_sample_is_set_aside_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_settings(tiny_model, tmp_path, batch_size=2, max_staleness=1))
    for round_ in range(2):
        trainer.feed(range(10 * round_, 10 * round_ + 2), key="agent:ada" if round_ else None, version=round_)
        assert trainer.loop.run_once()
    trainer.feed(range(50, 52))  # drawn by the base model, two versions ago
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.head, status.set_aside) == (2, 2)
    assert "stale: drawn by version 0, 2 from the head 2" in (status.idle_reason or "")
    trainer.close()


def test_training_goes_on_from_the_head_that_it_was_put_back_to(trainer: Trainer) -> None:
    trainer.feed(range(4))
    trainer.loop.run_once()
    trainer.feed(range(4, 8), "agent:ada", 1)
    trainer.loop.run_once()
    trainer.versions.put_head("ada", 1)
    trainer.engine.call(lambda e: e.drop("agent:ada"))
    trainer.feed(range(8, 12))
    trainer.loop.run_once()
    lineage = read_manifest(trainer.loop.folder("ada", 3))["lineage"]
    assert (lineage["parent"], lineage["number"]) == (1, 3)
    fingerprint = trainer.engine.call(lambda e: e.base.fingerprint)
    assert read_checkpoint(trainer.loop.folder("ada", 3), fingerprint).adapter.step == 2


def test_a_sample_that_memory_never_suffices_for_is_set_aside_and_the_others_are_trained(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward.score

    def small_device(model: object, group: list[Datum], device: torch.device):  # type: ignore[no-untyped-def]
        if group[0].length > 20 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, group, device)

    monkeypatch.setattr("metaclaw_trainer.lora_engine.score", small_device)
    long = random_sample(77, rewards=(1.0,), prompt=30, agent="ada")
    trainer.queue.put(as_sampled(trainer.engine, [long]))
    trainer.feed(range(3))
    for tries in range(1, 4):
        assert trainer.loop.run_once()
        status = trainer.agents.status("ada")
        assert (status.head, status.queued, status.set_aside) == (0, 4 - (tries == 3), int(tries == 3))
        assert "out of memory" in (status.idle_reason or "")
        trainer.agents.train_now("ada")  # not waiting out the pause
    assert trainer.loop.run_once()
    status = trainer.agents.status("ada")
    assert (status.head, status.trained, status.set_aside) == (1, 3, 1)


def test_a_head_that_no_longer_fits_the_settings_is_refused_with_the_reason(
    trainer: Trainer, tiny_model: Path, tmp_path: Path
) -> None:
    trainer.feed(range(4))
    trainer.loop.run_once()
    changed = TrainingLoop(
        trainer.engine, trainer.queue, trainer.versions, tiny_settings(tiny_model, tmp_path, batch_size=4, rank=8)
    )
    trainer.feed(range(4, 8))
    assert changed.run_once()
    status = trainer.agents.status("ada")
    assert (status.head, status.queued) == (1, 4)
    assert "v1 has rank 4" in (status.idle_reason or "")


def _datums(samples: list[Sample]) -> list[Datum]:
    return [datum_of(sample, [0.0] * len(sample.turns)) for sample in samples]


def as_one_text(tokens: Sequence[int]) -> Datum:
    """A datum that predicts every token but the first."""
    count = len(tokens) - 1
    nothing = torch.zeros(count)
    return Datum(torch.tensor(tokens[:-1]), torch.arange(count), torch.tensor(tokens[1:]), nothing, nothing)
