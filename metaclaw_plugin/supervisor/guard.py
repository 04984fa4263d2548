"""Runs one command, outlives its parent, and leaves nothing behind.

    python -m metaclaw_plugin.supervisor.guard --life-fd N --grace SECONDS [--session-nice N] -- COMMAND...

The guard stands between the supervisor and a process of ours. It ends the command with all its descendants when

* it is told to (SIGTERM or SIGINT),
* the command ends by itself and leaves processes behind (vLLM's engine, say),
* the supervisor is gone: the pipe at ``--life-fd``, whose other end the supervisor alone holds, is closed by the
  kernel even after ``kill -9``.

On Linux it adopts orphans of the command (PR_SET_CHILD_SUBREAPER), and the command gets SIGTERM should the guard
itself be killed. Standard library and psutil only: it stays small for as long as the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _lower_session(niceness: int) -> None:
    """Lower the whole session: where Linux schedules by session (autogroup), a thread's own nice value means little."""
    with contextlib.suppress(OSError):  # a kernel without autogroup goes by the threads' own nice values
        Path("/proc/self/autogroup").write_text(f"{niceness}\n", encoding="ascii")


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Guard:
    """Runs ``command``; see the head of this file."""

    def __init__(self, command: Sequence[str], life_fd: int | None, grace: float) -> None:
        self._command = list(command)
        self._life_fd = life_fd
        self._grace = grace
        self._asked = False

    def run(self) -> int:
        """The command's exit code (128 + number, if a signal ended it)."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            # The guard has one thread only, which is what makes preexec_fn safe.
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard)  # noqa: PLW1509
        except OSError as error:
            sys.stderr.write(f"cannot start {self._command[0]}: {error.strerror}\n")
            return 127
        while process.poll() is None and not self._asked:
            self._wait(wake)
        if process.poll() is None:
            self._end(process)
        self._kill_descendants()
        code = process.wait()
        return code if code >= 0 else 128 - code

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _wait(self, wake: socket.socket) -> None:
        """Until a signal comes or the supervisor is gone; five seconds at most."""
        watched: list[int] = [wake.fileno()]
        if self._life_fd is not None:
            watched.append(self._life_fd)
        readable, _, _ = select.select(watched, [], [], 5.0)
        if wake.fileno() in readable:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
        if self._life_fd in readable:
            self._asked = True

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(self._grace)
        except subprocess.TimeoutExpired:
            process.kill()

    def _kill_descendants(self) -> None:
        """Kill what the command left behind, until nothing is left (orphans become children of the guard)."""
        deadline = time.monotonic() + 10.0
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def main() -> int:
    parser = argparse.ArgumentParser(prog="metaclaw guard")
    parser.add_argument("--life-fd", type=int)
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--session-nice", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.session_nice:
        _lower_session(options.session_nice)
    return Guard(command, options.life_fd, options.grace).run()


if __name__ == "__main__":
    sys.exit(main())
