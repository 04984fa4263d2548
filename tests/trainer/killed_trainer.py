"""Runs a trainer that kills itself with SIGKILL in a chosen phase of its second step, and then one that goes on.

    python -m tests.trainer.killed_trainer MODEL FOLDER

For every phase, ``FOLDER/<phase>`` is the home of two processes, one after the other; ``FOLDER/none`` of one that was
never interrupted. All are forked from this one, which has imported torch and computed nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer import checkpoints, loop, step
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import open_store
from metaclaw_trainer.versions import StoredVersions

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings

BATCHES, BATCH = 3, 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner: object, name: str, calls: int) -> None:
    """Die right after the ``calls``-th call of ``owner.name``."""
    real, seen = getattr(owner, name), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        seen[0] += 1
        if seen[0] == calls:
            die()
        return result

    setattr(owner, name, wrapped)


# A step: two passes of two minibatches, so four gradients, four moves. A checkpoint: five files, two folders synced.
PHASES: dict[str, Callable[[], None]] = {
    "claimed": lambda: after(StoredQueue, "claim", 2),
    "scored": lambda: after(LoraEngine, "logprobs", 2),
    "gradient": lambda: after(LoraEngine, "forward_backward", 6),
    "moved": lambda: after(LoraEngine, "optim_step", 6),
    "stepped": lambda: after(loop, "train_step", 2),
    "writing": lambda: after(checkpoints, "_write", 7),
    "synced": lambda: after(checkpoints, "_sync_folder", 3),
    "renamed": lambda: after(loop, "write_checkpoint", 2),
    "committed": lambda: after(StoredVersions, "commit", 2),
    "none": lambda: None,
}


def train(model: Path, home: Path) -> None:
    settings = tiny_settings(model, home, batch_size=BATCH, minibatches=2, epochs=2, max_staleness=9)
    engine = EngineThread(settings)
    engine.start()
    store = open_store(settings.store_url)
    owner = Owner(store, settings.folder / "owners", 900)
    queue = StoredQueue(store, owner.id, Limits(49152, 4096, 1000, BATCH))
    AgentBook(store, BATCH).set_training("ada", AgentTraining(allowed=True))
    raw = [random_sample(seed, rewards=((-1.0) ** seed * (1 + seed) / 20, 0.1)) for seed in range(BATCHES * BATCH)]
    queue.put(as_sampled(engine, raw))  # the second time they are duplicates
    training = TrainingLoop(engine, queue, StoredVersions(store, owner.id), settings)
    while training.run_once():
        pass
    engine.stop()
    store.close()


def fork(work: Callable[[], None]) -> int:
    """The signal that ended the child; 0 if it came to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a trainer failed with exit code {os.WEXITSTATUS(status)}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    assert step.train_step is loop.train_step  # type: ignore[attr-defined]
    for phase, arm in PHASES.items():
        home = folder / phase

        def armed(arm: Callable[[], None] = arm, home: Path = home) -> None:
            arm()
            train(model, home)

        ended_by = fork(armed)
        if ended_by:
            fork(lambda home=home: train(model, home))  # type: ignore[misc]
        print(phase, ended_by, flush=True)


if __name__ == "__main__":
    main()
