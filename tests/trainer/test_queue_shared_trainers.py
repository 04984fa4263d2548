"""Two trainers, each with its own model, share agents, store and folder."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer.checkpoints import read_manifest
from metaclaw_trainer.owners import give_back
from metaclaw_trainer.process import running
from metaclaw_trainer.services import Services

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings

AGENTS = ("ada", "bob", "cyd")
BATCHES = 3


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path) -> Iterator[tuple[Services, Services]]:
    wanted = tiny_settings(tiny_model, tmp_path, batch_size=2, poll_interval=0.01, vllm_urls=[], max_staleness=100)
    with running(wanted) as one, running(wanted) as two:
        yield one, two


@pytest.mark.law(3)
def test_every_sample_is_trained_once_and_each_version_goes_on_from_the_one_before(
    pair: tuple[Services, Services],
) -> None:
    seeds = itertools.count()
    made = [
        random_sample(next(seeds), rewards=(reward,), agent=agent)
        for agent in AGENTS
        for _ in range(BATCHES)
        for reward in (1.0, -1.0)
    ]
    given = as_sampled(pair[0].engine, made)
    for agent in AGENTS:
        pair[1].agents.set_training(agent, AgentTraining(allowed=True))
    senders = [threading.Thread(target=s.queue.put, args=(given,)) for s in pair]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    deadline = time.monotonic() + 120
    while sum(status.trained for status in pair[0].agents.statuses()) < len(given):
        assert time.monotonic() < deadline, pair[0].agents.statuses()
        time.sleep(0.05)
    listed = pair[1].versions.after(0)
    assert Counter(v.agent for v in listed) == dict.fromkeys(AGENTS, BATCHES)
    trained = Counter(trace for v in listed for trace in v.trace_ids)
    assert trained == Counter(turn.trace_id for sample in given for turn in sample.turns)
    for agent in AGENTS:
        mine = [v for v in listed if v.agent == agent]
        assert [(v.number, v.parent, v.step) for v in mine] == [(n, n - 1, n) for n in range(1, BATCHES + 1)]
        for version in mine:
            assert read_manifest(Path(version.path))["files"]["adapter_model.safetensors"]["sha256"] == version.sha256


def test_a_trainer_that_was_taken_for_dead_harms_nothing_that_the_other_made(
    pair: tuple[Services, Services], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one = pair[0]
    given = as_sampled(one.engine, [random_sample(900 + i, rewards=(i * 2.0 - 1.0,), agent="ada") for i in range(2)])
    one.queue.put(given)
    held, released = threading.Event(), threading.Event()
    slow = type(one.versions).head

    def suspended(versions: object, agent: str) -> object:
        """The first trainer to ask for the head sleeps there until the other one has gone on."""
        if not held.is_set():
            held.set()
            answer = slow(versions, agent)  # type: ignore[arg-type]
            assert released.wait(60)
            return answer
        return slow(versions, agent)  # type: ignore[arg-type]

    monkeypatch.setattr(type(one.versions), "head", suspended)
    one.agents.set_training("ada", AgentTraining(allowed=True))
    assert held.wait(60)
    with one.store.write() as c:  # whoever it is, a third machine takes it for dead
        for services in pair:
            give_back(c, services.owner.id)
    deadline = time.monotonic() + 60
    while not one.versions.after(0):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    [made] = one.versions.after(0)
    before = {file.name: file.read_bytes() for file in Path(made.path).iterdir()}
    released.set()
    while "was thrown away" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {file.name: file.read_bytes() for file in Path(made.path).iterdir()} == before
    assert one.agents.status("ada").trained == 2
    assert len(one.versions.after(0)) == 1
