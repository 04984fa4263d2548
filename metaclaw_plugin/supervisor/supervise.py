"""The supervisor: starts the services, waits until they are ready, brings back what dies, ends them in order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.supervisor.checks import check_disk, check_ports
from metaclaw_plugin.supervisor.child import Child
from metaclaw_plugin.supervisor.plan import Service
from metaclaw_plugin.supervisor.state import Home, SupervisorState, created_at

logger = logging.getLogger(__name__)
INTERVAL = 0.25  # seconds between two looks

Watcher = Callable[[Sequence[Child]], None]


class Supervisor:
    """Use it as a context manager under ``Home.lock()``; leaving it ends every process that it started."""

    def __init__(self, services: Sequence[Service], home: Home, config: Path | None, only: Sequence[str] = ()) -> None:
        self.home = home
        # Guards watch the read end; the write end closes when this process is gone, however it goes.
        self._life_read, self._life_write = os.pipe()
        self.children = [Child(service, home.log(service.name), self._life_read) for service in services]
        pid = os.getpid()
        self._state = SupervisorState(
            pid=pid,
            created=created_at(pid) or 0.0,
            config=str(config.absolute()) if config else None,
            started_at=time.time(),
            only=tuple(only),
        )
        self._stopping = False
        self._http = httpx.Client(timeout=2.0, trust_env=False)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._http.close()
        os.close(self._life_write)
        os.close(self._life_read)

    def ask_to_stop(self) -> None:
        """For signal handlers: end the services soon."""
        self._stopping = True

    def start(self, show: Watcher = lambda _: None) -> bool:
        """Start all services; return once all are ready, or ``False`` if asked to stop before.

        Raises:
            ProcessError: if a port is taken, the disk is full, or a process died before it was ready;
                then nothing is left running.
        """
        try:
            check_disk(self.home.path)
            check_ports(child.service for child in self.children)
            self._save()
            for child in self.children:
                child.start()
            self._save()
            return self._wait_ready(show)
        except ProcessError as error:
            self.stop(show)
            self._save(str(error))
            raise

    def run(self, show: Watcher = lambda _: None) -> None:
        """Watch until asked to stop; what dies is started again, later each time."""
        while not self._stopping:
            self._look()
            show(self.children)
            time.sleep(INTERVAL)

    def stop(self, show: Watcher = lambda _: None) -> None:
        """End the services, the last started first, so that none loses what it needs before it has ended."""
        for child in reversed(self.children):
            child.ask_to_end()
            deadline = time.monotonic() + child.service.grace + 15.0
            while not child.ended():
                if time.monotonic() > deadline:
                    logger.warning("the guard of the %s did not end in time and is killed", child.service.name)
                    child.kill()
                show(self.children)
                time.sleep(0.05)
            self._save()
        show(self.children)

    def _wait_ready(self, show: Watcher) -> bool:
        while not self._stopping:
            self._look()
            show(self.children)
            for child in self.children:
                if not child.was_ready and child.state.phase == "waiting":
                    raise ProcessError(
                        f"the {child.service.name} died at start: {child.state.detail} (log: {child.log})"
                    )
            if all(child.was_ready for child in self.children):
                return True
            time.sleep(INTERVAL)
        return False

    def _look(self) -> None:
        before = [child.state for child in self.children]
        for child in self.children:
            was = child.state
            child.watch(self._http)
            if was.phase != "waiting" and child.state.phase == "waiting" and child.was_ready:
                logger.warning("the %s died and will be started again: %s", child.service.name, child.state.detail)
        if before != [child.state for child in self.children]:
            self._save()

    def _save(self, failure: str | None = None) -> None:
        services = tuple(child.state for child in self.children)
        self._state = replace(self._state, services=services, failure=failure or self._state.failure)
        self.home.write(self._state)
