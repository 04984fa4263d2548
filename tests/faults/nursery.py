"""Worker and trainer, forked from a process that has imported everything, and forked again whenever they end.

    python -m tests.faults.nursery CONFIG FOLDER PORT

It reads orders from stdin, one a line: ``hold NAME`` (do not start it again), ``free NAME``, ``quit``; and writes who
runs as which process to FOLDER/pids.json. When its stdin is closed it ends, and all its children with it. The process
that forks has one thread and has computed nothing, so what it forks is as fresh as one that was started.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import metaclaw_trainer.process as trainer_process
from metaclaw_trainer.__main__ import _bind
from metaclaw_trainer.settings import load_settings as load_trainer_settings

from metaclaw_plugin.settings import load_settings
from metaclaw_plugin.worker import loop as worker_loop
from tests.faults import points, taken

TICK = 0.05  # seconds
PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)  # seconds before a restart, longer when it ends soon each time
SOON = 3.0  # seconds


@dataclass
class Nursling:
    """One process that shall run."""

    work: Callable[[], object]
    pid: int = 0  # 0: does not run
    held: bool = False
    began: float = 0.0
    not_before: float = 0.0
    deaths: int = 0  # soon after its start, in a row


class Nursery:
    """Keeps its nurslings running."""

    def __init__(self, nurslings: dict[str, Nursling], folder: Path) -> None:
        self._nurslings = nurslings
        self._folder = folder
        self._told: dict[str, int] = {}

    def run(self) -> None:
        """Until ``quit``, or the end of stdin."""
        while True:
            self._start()
            readable, _, _ = select.select([sys.stdin], [], [], TICK)
            if readable and not self._obey(os.read(0, 4096)):
                return
            self._bury()

    def _obey(self, orders: bytes) -> bool:
        """False: it is over."""
        for line in orders.decode("ascii").splitlines():
            word, _, name = line.partition(" ")
            if word == "quit":
                return False
            self._nurslings[name].held = word == "hold"
        return bool(orders)

    def end(self) -> None:
        """SIGKILL for all that run."""
        for child in self._nurslings.values():
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)

    def _start(self) -> None:
        now = time.monotonic()
        for name, child in self._nurslings.items():
            if not child.pid and not child.held and now >= child.not_before:
                child.began, child.pid = now, self._fork(name, child.work)
        running = {name: child.pid for name, child in self._nurslings.items()}
        if running != self._told:
            fresh = self._folder / ".pids.json"
            fresh.write_text(json.dumps(running), encoding="ascii")
            fresh.rename(self._folder / "pids.json")
            self._told = running

    def _bury(self) -> None:
        for child in self._nurslings.values():
            if child.pid and os.waitpid(child.pid, os.WNOHANG)[0]:
                soon = time.monotonic() < child.began + SOON
                child.deaths = child.deaths + 1 if soon else 0
                child.pid = 0
                child.not_before = time.monotonic() + PAUSES[min(child.deaths, len(PAUSES) - 1)]

    def _fork(self, name: str, work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self._folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(0)
            points.install(self._folder, name, points.WORKER_POINTS if "worker" in name else points.TRAINER_POINTS)
            if name == "trainer":
                taken.install(self._folder)
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            logging.getLogger("httpx").setLevel(logging.WARNING)
            work()
            status = 0
        except BaseException:
            logging.exception("%s ended", name)
            raise
        finally:
            os._exit(status)


def main() -> None:
    config, folder, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings = load_settings(config)
    trainer = load_trainer_settings(config)

    def train() -> None:
        trainer_process.serve(trainer, _bind("127.0.0.1", port))

    nurslings = {
        "worker": Nursling(lambda: worker_loop.main(settings)),
        "worker-2": Nursling(lambda: worker_loop.main(settings), held=True),
        "trainer": Nursling(train),
    }
    nursery = Nursery(nurslings, folder)
    try:
        nursery.run()
    finally:
        nursery.end()


if __name__ == "__main__":
    main()
