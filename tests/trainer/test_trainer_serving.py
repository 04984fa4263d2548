"""Samples drawn by a real vLLM, trained, served by the same vLLM again, and kept there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from metaclaw_hooks.types import Sample, SampleTurn
from metaclaw_hooks.wire import SampleBody, ServedReply, VersionsReply
from metaclaw_trainer.process import running
from metaclaw_trainer.settings import TrainerSettings

from tests.trainer_server import TrainerServer, serving
from tests.vllm_server import VllmProcess

pytestmark = pytest.mark.vllm

AGENT = "reconciled"
BATCH = 4


@pytest.fixture(scope="module")
def settings(tiny_vllm: VllmProcess, tmp_path_factory: pytest.TempPathFactory) -> TrainerSettings:
    return TrainerSettings(
        base_model=str(tiny_vllm.model), home=tmp_path_factory.mktemp("home"), device="cpu", dtype="float32", rank=4,
        nice=0, batch_size=BATCH, poll_interval=0.02, learning_rate=1e-2, vllm_urls=[tiny_vllm.url],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(settings: TrainerSettings) -> Iterator[TrainerServer]:
    with serving(settings) as server:
        server.http.put(f"/v1/agents/{AGENT}", json={"allowed": True})
        yield server
        server.http.put("/v1/served", json={"versions": []})


def names(trainer: TrainerServer) -> set[str]:
    return {m.name for m in trainer.services.vllm[0].models() if m.name.startswith(AGENT)}


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(trainer: TrainerServer, number: int, parent: int) -> dict[str, float]:
    """Draw a batch from the version ``parent``, and wait for version ``number``; its metrics."""
    model = f"{AGENT}@v{parent}" if parent else "metaclaw-base"
    prompt = [50 + number, 60, 70, 80]
    drawn = trainer.services.vllm[0].sample(model, prompt, n=BATCH, max_tokens=8, parameters={"temperature": 1.0})
    samples = [
        Sample(
            f"v{number}-{i}", AGENT, "s", (*prompt, *one.token_ids),
            (SampleTurn(f"t{number}-{i}", len(prompt), one.logprobs, 1.0 if i % 2 else -1.0),), parent, 0,
        )
        for i, one in enumerate(drawn)
    ]  # fmt: skip
    reply = trainer.http.post("/v1/samples", json={"samples": [SampleBody.of(s).model_dump() for s in samples]})
    assert len(reply.json()["accepted"]) == BATCH
    found = trainer.http.get("/v1/versions", params={"after": number - 1, "wait": 60})
    [version] = VersionsReply.model_validate(found.json()).versions
    assert (version.number, version.parent) == (number, parent)
    return version.metrics


def serve(trainer: TrainerServer, *numbers: int) -> ServedReply:
    body = {"versions": [f"{AGENT}@v{n}" for n in numbers]}
    return ServedReply.model_validate(trainer.http.put("/v1/served", json=body).json())


@pytest.mark.law(6)
def test_versions_are_served_under_fresh_names_and_agree_with_the_trainer(trainer: TrainerServer) -> None:
    assert train(trainer, 1, 0)["gap"] < 0.05, "sampler and trainer score the base model alike"
    assert serve(trainer, 1).held == [f"{AGENT}@v1"]
    assert train(trainer, 2, 1)["gap"] < 0.05, "and version 1"
    assert serve(trainer, 1, 2).held == [f"{AGENT}@v1", f"{AGENT}@v2"]
    cards = {m.name: m.root for m in trainer.services.vllm[0].models()}
    assert cards[f"{AGENT}@v1"] != cards[f"{AGENT}@v2"]
    assert names(trainer) == {f"{AGENT}@v1", f"{AGENT}@v2"}
    serve(trainer, 2)
    assert names(trainer) == {f"{AGENT}@v2"}


def test_what_vllm_forgets_comes_back_by_itself(trainer: TrainerServer) -> None:
    trainer.services.vllm[0].unload(f"{AGENT}@v2")
    eventually(lambda: names(trainer) == {f"{AGENT}@v2"})


def test_a_trainer_that_starts_again_keeps_the_set(trainer: TrainerServer, settings: TrainerSettings) -> None:
    trainer.services.vllm[0].unload(f"{AGENT}@v2")
    with running(settings) as again:
        assert [w.name for w in again.versions.served()] == [f"{AGENT}@v2"]
        [state] = again.reconciler.once()
        assert state.held == {f"{AGENT}@v2"}


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_adapter_is_refused_with_vllms_words_and_the_others_serve_on(
    trainer: TrainerServer, damage: str
) -> None:
    status = trainer.services.agents.status(AGENT)
    parent, number = status.head, status.newest + 1
    serve(trainer, parent)
    train(trainer, number, parent)
    file = Path(trainer.services.versions.after(number - 1)[0].path) / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    reply = serve(trainer, parent, number)
    assert reply.held == [f"{AGENT}@v{parent}"]
    assert reply.failed[0].id == f"{AGENT}@v{number}"
    assert "vLLM" in reply.failed[0].reason
    trainer.http.post(f"/v1/agents/{AGENT}/head", json={"version": parent})
