"""Kills worker and trainer with SIGKILL at random moments while traces come in, and counts what came through.

    python -m tests.faults.killed_worker MODEL FOLDER [--kills 100] [--seed 7]

Worker and trainer are the real ones, over real HTTP, with the tiny model; each is forked from this process, which has
imported everything and computed nothing, so that a restart takes a moment. Prints one JSON object: kills of each,
traces stored, and every trace that was not trained exactly once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import metaclaw_trainer.process as trainer_process
import sqlalchemy as sa
from metaclaw_hooks.types import Trace
from metaclaw_trainer import schema as trainer_schema
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import open_store as open_trainer_store

from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker import loop as worker_loop
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, worker_settings, write_hook

AGENTS = ("alpha", "beta")
TURNS = 3
BATCH = 8  # samples a step
TRAINER = {
    "device": "cpu",
    "dtype": "float32",
    "rank": 4,
    "nice": 0,
    "torch_threads": 1,
    "targets": ["q_proj"],
    "batch_size": BATCH,
    "poll_interval": 0.05,
    "max_staleness": 100_000,  # the samples are all of the base model
    "gap_threshold": 1e9,  # and their log-probabilities made up
    "vllm_urls": ["http://127.0.0.1:9"],
}
REWARD = "def score_trace(trace): return 1.0 if sum(trace.response_token_ids) % 2 else -1.0\n"


def conversation(number: int) -> list[Trace]:
    """Three turns of one session, each prompt extending the turn before; tokens by chance, log-probs as of a model
    that knows nothing."""
    chance = random.Random(number)
    agent = AGENTS[number % len(AGENTS)]
    history: tuple[int, ...] = tuple(chance.randrange(2000) for _ in range(4))
    made = []
    for turn in range(TURNS):
        response = tuple(chance.randrange(2000) for _ in range(3))
        made.append(
            make_trace(
                id=f"t{number}-{turn}",
                agent=agent,
                session=f"s{number}",
                turn=turn,
                exchange=turn,
                prompt_token_ids=history,
                response_token_ids=response,
                response_logprobs=(-10.8,) * 3,
            )
        )
        history = (*history, *response, chance.randrange(2000))
    return made


class Process:
    """A child that is forked again whenever it ended, until it is told to stop."""

    def __init__(self, name: str, work: Callable[[], object], folder: Path) -> None:
        self._name, self._work, self._log = name, work, folder / f"{name}.log"
        self._stopping = False
        self.pid = self._fork()

    def _fork(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            self._work()
            status = 0
        finally:
            os._exit(status)

    def kill(self) -> None:
        """SIGKILL, and start it again."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = self._fork()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run(model: Path, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill ``kills`` times, let everything come to rest, and count."""
    chance = random.Random(seed)
    listener = socket.create_server(("127.0.0.1", 0))  # held by us, so that no restart finds the port taken
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = worker_settings(
        folder,
        worker={"max_backoff": 0.3, "lease": 5},
        rl={"remote_url": url},
        publish={"policy": "always"},
    )
    trainer = TrainerSettings.model_validate({"base_model": str(model), "home": folder, **TRAINER})
    for agent in AGENTS:
        write_hook(folder, f"{agent}/parity", REWARD)
    engine = open_store(settings.store_url)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def serve() -> None:
        trainer_process.serve(trainer, listener)

    children = {
        "worker": Process("worker", lambda: worker_loop.main(settings), folder),
        "trainer": Process("trainer", serve, folder),
    }
    killed: Counter[str] = Counter()
    stored = 0
    try:
        for _ in range(kills):
            deadline = time.monotonic() + chance.uniform(0.05, 1.2)
            while time.monotonic() < deadline:
                stored += _store(engine, conversation(stored), closed=chance.random() < 0.5)
                time.sleep(0.05)
            name = chance.choice(("worker", "trainer"))
            children[name].kill()
            killed[name] += 1
        while stored % (BATCH * len(AGENTS)):  # whole batches, so that nothing is left over
            fill(engine, *conversation(stored), closed=True)
            stored += 1
        _settle(engine, stored, timeout=120 + 3 * kills)
    finally:
        for child in children.values():
            child.stop()
        listener.close()
    return {"kills": dict(killed), **_count(engine, trainer.store_url, stored)}


def _store(engine: sa.Engine, traces: list[Trace], *, closed: bool) -> int:
    """Store a conversation; 0 if the store was busy for too long, as a gateway would count it."""
    try:
        fill(engine, *traces, closed=closed)
    except sa.exc.OperationalError:
        return 0
    return 1


def _settle(engine: sa.Engine, stored: int, timeout: float) -> None:
    """Wait until everything is trained, or a batch short of it for want of samples."""
    limit = time.monotonic() + timeout
    waiting = sa.select(sa.func.count()).where(schema.traces.c.forward.in_(("waiting", "merged", "forwarded")))
    while time.monotonic() < limit:
        with engine.connect() as c:
            if c.execute(waiting.select_from(schema.traces)).scalar_one() == 0:
                return
        time.sleep(0.2)


def _count(engine: sa.Engine, trainer_store: str, stored: int) -> dict[str, object]:
    t = schema.traces.c
    with engine.connect() as c:
        states = {row.id: (row.score, row.forward) for row in c.execute(sa.select(t.id, t.score, t.forward))}
        leases_left = c.execute(sa.select(sa.func.count()).where(t.lease_owner.is_not(None))).scalar_one()
    store = open_trainer_store(trainer_store)
    s, of = trainer_schema.samples.c, trainer_schema.sample_traces.c
    with store.read() as c:
        samples_of = Counter(c.scalars(sa.select(of.trace_id)))
        sample_states = Counter(c.scalars(sa.select(s.state)))
        manifests = c.scalars(sa.select(trainer_schema.versions.c.manifest)).all()
    store.close()
    trained = Counter(trace for manifest in manifests for trace in manifest["trace_ids"])
    wrong = {
        trace: {"gateway": state, "samples": samples_of[trace], "versions": trained[trace]}
        for trace, state in states.items()
        if state != ("scored", "trained") or samples_of[trace] != 1 or trained[trace] != 1
    }
    return {
        "traces": len(states),
        "expected": stored * TURNS,
        "samples": dict(sample_states),
        "versions": len(manifests),
        "leases_left": leases_left,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    assert threading.active_count() == 1  # a fork of a process with threads may hang
    print(json.dumps(run(given.model, given.folder.resolve(), given.kills, given.seed)))


if __name__ == "__main__":
    main()
