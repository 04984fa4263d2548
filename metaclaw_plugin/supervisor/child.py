"""One supervised process: started behind its guard, watched, restarted, ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.supervisor.diagnosis import explain, meaningful, read_tail
from metaclaw_plugin.supervisor.plan import Service
from metaclaw_plugin.supervisor.state import ServiceState, created_at

logger = logging.getLogger(__name__)

STABLE = 60.0  # seconds of running after which the next death is not counted with the last one
BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before a restart
ROTATE = 20 * 2**20  # bytes of a log that are kept beside the new one


class Child:
    """A service and its process. ``life_fd`` is the pipe's end that guards watch (see ``guard``)."""

    def __init__(self, service: Service, log: Path, life_fd: int) -> None:
        self.service = service
        self.log = log
        self.state = ServiceState(service.name, "planned", port=service.port)
        self.was_ready = False
        self._life_fd = life_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._started = 0.0
        self._warming: threading.Thread | None = None
        self._deaths = 0
        self._next_start = 0.0

    def start(self) -> None:
        """Start the process behind a guard of its own session, its output in the log.

        Raises:
            ProcessError: if the log cannot be written or the guard not started.
        """
        service = self.service
        guard = (sys.executable, "-m", "metaclaw_plugin.supervisor.guard")
        options = ["--life-fd", str(self._life_fd), "--grace", str(service.grace)]
        options += ["--session-nice", str(service.niceness)]
        try:
            if self.log.exists() and self.log.stat().st_size > ROTATE:
                self.log.replace(self.log.with_suffix(".log.1"))
            with self.log.open("ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    [*guard, *options, "--", *service.launch.argv],
                    env=service.launch.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(self._life_fd,),
                )
        except OSError as error:
            raise ProcessError(f"cannot start the {service.name}: {error}") from error
        self._started = time.monotonic()
        self._warming = None
        pid = self._process.pid
        self._set("starting", pid=pid, created=created_at(pid), detail="")

    def watch(self, http: httpx.Client) -> None:
        """Look once: is it up, is it ready, is it time to start it again?"""
        if self._process is None:
            if self.state.phase == "waiting" and time.monotonic() >= self._next_start:
                self.start()
        elif self._process.poll() is not None:
            self._died()
        elif self.state.phase == "starting":
            if self._answers(http):
                self.was_ready = True
                self._set("ready")
            elif time.monotonic() - self._started > self.service.start_timeout:
                reason = f"not ready after {self.service.start_timeout:.0f} s: {self.why()}"
                self.kill()
                self._died(reason)

    def why(self) -> str:
        """What the log of this run says last, and the remedy."""
        return explain(read_tail(self.log, self._log_start))

    def last_line(self) -> str:
        """The newest line of this run's log, for showing that something moves."""
        lines = meaningful(read_tail(self.log, self._log_start, 4096))
        return lines[-1] if lines else ""

    def ask_to_end(self) -> None:
        """Tell the guard to end it; ``ended`` says when it has."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def ended(self) -> bool:
        if self._process is not None and self._process.poll() is None:
            return False
        if self.state.phase != "stopped":
            self._sweep()
            self._process = None
            self._set("stopped", pid=None, created=None)
        return True

    def kill(self) -> None:
        """End it now, with everything in its session."""
        if self._process is not None:
            self._sweep()
            self._process.wait()

    def _sweep(self) -> None:
        """Kill what is left of the guard's session; it is one of its own, so nobody else is in it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _answers(self, http: httpx.Client) -> bool:
        service = self.service
        if service.ready_path is None:
            return service.ready_line is None or service.ready_line in read_tail(self.log, self._log_start)
        if self._warming is not None:
            return not self._warming.is_alive()
        try:
            if http.get(service.url + service.ready_path).status_code != 200:
                return False
        except httpx.HTTPError:
            return False
        if service.warm_up is None:
            return True
        self._set("starting", detail="first request")
        self._warming = threading.Thread(target=self._warm_up, args=service.warm_up, daemon=True)
        self._warming.start()
        return False

    def _warm_up(self, path: str, body: Mapping[str, Any]) -> None:
        """Send the first request. Should it fail, the next one will tell; readiness is not lost over it."""
        try:
            httpx.post(
                self.service.url + path,
                json=body,
                headers=self.service.headers,
                timeout=self.service.start_timeout,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            logger.warning("the first request to the %s failed: %s", self.service.name, error)

    def _died(self, reason: str | None = None) -> None:
        reason = reason or self.why()
        self._sweep()
        self._process = None
        self._deaths = 1 if time.monotonic() - self._started > STABLE else self._deaths + 1
        self._next_start = time.monotonic() + BACKOFF[min(self._deaths, len(BACKOFF)) - 1]
        self._set("waiting", pid=None, created=None, restarts=self.state.restarts + 1, detail=reason)

    def _set(self, phase: str, **changes: object) -> None:
        detail = "" if phase == "ready" else self.state.detail
        self.state = replace(self.state, phase=phase, since=time.time(), **{"detail": detail, **changes})  # type: ignore[arg-type]
