"""Named points of commit, forward, train, checkpoint and publish at which a process can be made to die, and its clock.

The modules of the product know nothing of this: a process under test calls ``install``, which puts a wrapper around the
functions named in ``POINTS``. Passing a point costs one rename that fails. Whoever wants a process to die at a point
calls ``arm``; the first process that passes it takes the order, writes down that it did, and gets the signal.

A process under test reads how far its clock is off from a file, so that a test can set it forward or back at any time.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FOLDER_ENV = "METACLAW_TEST_FAULTS"  # where orders lie, for processes that are started rather than forked
FREEZES = 5.0  # seconds within which a process that is told to stand still does
LOOK = 0.1  # seconds between looks at how far the clock is off

# point -> module, attribute, and whether a process dies before or after it. A name that a module imported is patched
# in that module.
POINTS: dict[str, tuple[str, str, str]] = {
    # gateway
    "commit.prepared": ("metaclaw_plugin.gateway.request", "Gateway.prepare", "after"),
    "commit.answered": ("metaclaw_plugin.gateway.keeping", "Keeper.commit", "before"),
    "commit.inserted": ("metaclaw_plugin.capture.quota", "add_traces", "after"),
    "commit.committed": ("metaclaw_plugin.capture.group_commit", "GroupCommit._commit", "after"),
    "commit.acknowledged": ("metaclaw_plugin.gateway.keeping", "Keeper.commit", "after"),
    # worker
    "score.claimed": ("metaclaw_plugin.store.leases", "claim_traces", "after"),
    "score.stored": ("metaclaw_plugin.worker.scoring", "Scorer._store", "before"),
    "forward.scored": ("metaclaw_plugin.worker.scoring", "Scorer._store", "after"),
    "forward.merged": ("metaclaw_plugin.worker.forwarding", "Forwarder._merge", "after"),
    "forward.sending": ("metaclaw_plugin.trainer_client", "TrainerClient.send_samples", "before"),
    "forward.sent": ("metaclaw_plugin.trainer_client", "TrainerClient.send_samples", "after"),
    "forward.noted": ("metaclaw_plugin.worker.forwarding", "Forwarder._note", "after"),
    "forward.tracked": ("metaclaw_plugin.worker.forwarding", "Tracker._mark", "after"),
    "publish.recorded": ("metaclaw_plugin.worker.publishing", "Publisher._record", "after"),
    "publish.asked": ("metaclaw_plugin.trainer_client", "TrainerClient.set_served", "after"),
    "publish.judged": ("metaclaw_plugin.worker.publishing", "Publisher._settle", "before"),
    "publish.flipped": ("metaclaw_plugin.worker.publishing", "Publisher._settle", "after"),
    "publish.announced": ("metaclaw_plugin.worker.publishing", "Publisher._announce", "after"),
    "publish.retired": ("metaclaw_plugin.store.draining", "retire_if_drained", "after"),
    # trainer
    "queue.written": ("metaclaw_trainer.sample_queue", "StoredQueue.put", "after"),
    "train.claimed": ("metaclaw_trainer.sample_queue", "StoredQueue.claim", "after"),
    "train.scored": ("metaclaw_trainer.lora_engine", "LoraEngine.logprobs", "after"),
    "train.gradient": ("metaclaw_trainer.lora_engine", "LoraEngine.forward_backward", "after"),
    "train.moved": ("metaclaw_trainer.lora_engine", "LoraEngine.optim_step", "after"),
    "train.stepped": ("metaclaw_trainer.loop", "train_step", "after"),
    "checkpoint.file": ("metaclaw_trainer.checkpoints", "_write", "after"),
    "checkpoint.synced": ("metaclaw_trainer.checkpoints", "_sync_folder", "after"),
    "checkpoint.written": ("metaclaw_trainer.loop", "write_checkpoint", "after"),
    "checkpoint.listed": ("metaclaw_trainer.versions", "StoredVersions.commit", "after"),
    "publish.wanted": ("metaclaw_trainer.versions", "StoredVersions.set_served", "after"),
    "publish.loaded": ("metaclaw_trainer.vllm_client", "VllmClient.load", "after"),
    "publish.unloaded": ("metaclaw_trainer.vllm_client", "VllmClient.unload", "after"),
}
GATEWAY_POINTS = tuple(name for name in POINTS if name.startswith("commit."))
TRAINER_POINTS = tuple(name for name, (module, *_) in POINTS.items() if module.startswith("metaclaw_trainer."))
WORKER_POINTS = tuple(name for name in POINTS if name not in (*GATEWAY_POINTS, *TRAINER_POINTS))

_real_time, _real_time_ns = time.time, time.time_ns


@dataclass(frozen=True)
class Fired:
    """A process has taken an order."""

    pid: int
    at: float  # monotonic, which is the same clock in every process


def install(folder: Path, role: str, names: tuple[str, ...]) -> None:
    """Put the points ``names`` and the clock of ``role`` into this process."""
    for name in names:
        _wrap(folder, name)
    _bend_clock(folder / f"clock.{role}")


def arm(folder: Path, name: str, number: signal.Signals) -> None:
    """The next process that passes ``name`` gets the signal."""
    (folder / "fired").mkdir(parents=True, exist_ok=True)
    (folder / "armed").mkdir(exist_ok=True)
    (folder / "fired" / name).unlink(missing_ok=True)
    fresh = folder / f".{name}"
    fresh.write_text(str(int(number)), encoding="ascii")
    fresh.rename(folder / "armed" / name)


def disarm(folder: Path, name: str) -> bool:
    """Take the order back; False if it was carried out already."""
    try:
        (folder / "armed" / name).unlink()
    except FileNotFoundError:
        return False
    return True


def fired(folder: Path, name: str) -> Fired | None:
    """Who carried out the order, if it was."""
    try:
        pid, at = (folder / "fired" / name).read_text(encoding="ascii").split()
    except (FileNotFoundError, ValueError):
        return None
    return Fired(int(pid), float(at))


def set_clock(folder: Path, role: str, seconds: float) -> None:
    """Let the clock of all processes of ``role`` be off by so much."""
    fresh = folder / f".clock.{role}"
    fresh.write_text(f"{seconds}", encoding="ascii")
    fresh.rename(folder / f"clock.{role}")


def clock_of(folder: Path, role: str) -> float:
    """How far the clock of a process of ``role`` went off when it was last set; 0 if none has looked."""
    try:
        return float((folder / f"clock.{role}.seen").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0.0


def _wrap(folder: Path, name: str) -> None:
    module, path, when = POINTS[name]
    *owners, attribute = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    real: Callable[..., Any] = getattr(owner, attribute)

    if inspect.iscoroutinefunction(real):

        @functools.wraps(real)
        async def waited(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                _pass(folder, name)
            result = await real(*args, **kwargs)
            if when == "after":
                _pass(folder, name)
            return result

        setattr(owner, attribute, waited)
        return

    @functools.wraps(real)
    def called(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            _pass(folder, name)
        result = real(*args, **kwargs)
        if when == "after":
            _pass(folder, name)
        return result

    setattr(owner, attribute, called)


def _pass(folder: Path, name: str) -> None:
    taken = folder / "fired" / f".{name}.{os.getpid()}"
    try:
        (folder / "armed" / name).rename(taken)
    except OSError:
        return  # nobody asked for it, or another process was first
    number = int(taken.read_text(encoding="ascii"))
    taken.write_text(f"{os.getpid()} {time.monotonic()}", encoding="ascii")
    taken.rename(folder / "fired" / name)
    os.kill(os.getpid(), number)


def end_frozen(pid: int, number: signal.Signals, port: int) -> int:
    """Send ``number`` to ``pid`` while it stands still; the connections to ``port`` that it held then.

    One that runs takes further connections between the count and the signal. 0 if it has ended already.
    """
    try:
        process = psutil.Process(pid)
        process.suspend()
        deadline = time.monotonic() + FREEZES
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            if time.monotonic() > deadline:
                raise AssertionError(f"process {pid} runs {FREEZES:g} s after it was told to stand still")
            time.sleep(0.001)
        held = connections_of(pid, port)
        process.send_signal(number)
        process.resume()
    except psutil.NoSuchProcess:
        return 0
    return held


def connections_of(pid: int, port: int) -> int:
    """Open connections that ``pid`` has taken at ``port``. 0 if it has ended."""
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return 0
    return sum(one.status != psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


def _bend_clock(file: Path) -> None:
    off, looked = 0.0, 0.0

    def offset() -> float:
        nonlocal off, looked
        now = time.monotonic()
        if now > looked + LOOK:
            looked = now
            try:
                told = float(file.read_text(encoding="ascii"))
            except FileNotFoundError:
                told = 0.0
            if told != off:
                off = told
                file.with_name(f"{file.name}.seen").write_text(f"{off}", encoding="ascii")
        return off

    time.time = lambda: _real_time() + offset()
    time.time_ns = lambda: _real_time_ns() + int(offset() * 1e9)
