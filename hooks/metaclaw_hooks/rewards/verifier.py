"""A command or Python callable of the owner's that says whether an answer holds.

It runs in a process of its own, in an empty folder, with a time limit and without this process's environment. That
keeps mistakes in; it is no sandbox against malice. The trace comes as JSON on standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from metaclaw_hooks.errors import HookFailedError, HooksError
from metaclaw_hooks.hookspecs import hookimpl
from metaclaw_hooks.types import Reward, Trace

SOURCE = "verifier"
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT")
_MAX_OUTPUT = 65_536  # bytes


class VerifierReward:
    """Runs ``command``; its last line of output, if a number, is the reward, else exit code 0 is 1 and 1 is -1.

    Any other exit code, or running out of time, is no opinion, and counted as a failure.
    """

    SCORES_LONE_REPLY = True

    def __init__(self, command: Sequence[str], timeout: float = 20.0, concurrency: int = 4) -> None:
        if not command:
            raise ValueError("a verifier needs a command")
        self._command = tuple(command)
        self._timeout = timeout
        self._room = asyncio.Semaphore(concurrency)
        self.HOOK_TIMEOUT = 10 * timeout + 5.0  # waiting for room included

    @classmethod
    def of_callable(cls, target: str, timeout: float = 20.0, concurrency: int = 4) -> VerifierReward:
        """A verifier that calls ``package.module:function`` with the trace as a dict; it returns a number or a bool."""
        module, _, function = target.partition(":")
        if not module or not function:
            raise ValueError(f"{target!r} names no callable: write package.module:function")
        return cls((sys.executable, "-m", "metaclaw_hooks.rewards.verifier", target), timeout, concurrency)

    @hookimpl
    async def score_trace(self, trace: Trace) -> Reward | None:
        async with self._room:
            code, output = await self._run(json.dumps(as_json(trace)).encode())
        value = _number(output)
        if value is not None:
            if not -1.0 <= value <= 1.0:
                raise HookFailedError(f"the verifier printed {value}, which is outside [-1, 1]")
            return Reward(SOURCE, value, "by the verifier's own measure")
        if code not in (0, 1):
            raise HookFailedError(
                f"the verifier {self._command[0]} ended with exit code {code}; 0 is right, 1 is wrong"
            )
        return Reward(SOURCE, 1.0 if code == 0 else -1.0, "passed" if code == 0 else "failed")

    async def _run(self, given: bytes) -> tuple[int, bytes]:
        with tempfile.TemporaryDirectory(prefix="metaclaw-verifier-", ignore_cleanup_errors=True) as folder:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    cwd=folder,
                    env={name: os.environ[name] for name in _KEPT if name in os.environ},
                    start_new_session=True,
                )
            except OSError as error:
                raise HookFailedError(f"the verifier {self._command[0]} cannot be started: {error.strerror}") from error
            try:
                output, _ = await asyncio.wait_for(process.communicate(given), self._timeout)
            except TimeoutError as error:
                raise HookFailedError(f"the verifier took over {self._timeout:g} s and was ended") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it left running, too
                await process.wait()
        return process.returncode or 0, output[-_MAX_OUTPUT:]


def as_json(trace: Trace) -> dict[str, Any]:
    """The trace as a verifier reads it: all its fields, and ``response_text``."""
    return dataclasses.asdict(trace) | {"response_text": trace.response_text}


def _number(output: bytes) -> float | None:
    lines = output.decode("utf-8", "replace").split()
    try:
        value = float(lines[-1]) if lines else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _main(target: str) -> int:
    """In the verifier's own process: call the callable, print its number."""
    import importlib

    module, _, name = target.partition(":")
    trace: Mapping[str, Any] = json.load(sys.stdin)
    result = getattr(importlib.import_module(module), name)(trace)
    if isinstance(result, bool):
        return 0 if result else 1
    if not isinstance(result, int | float):
        raise HooksError(f"{target} returned a {type(result).__name__}; it returns a number in [-1, 1] or a bool")
    sys.stdout.write(f"\n{float(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
