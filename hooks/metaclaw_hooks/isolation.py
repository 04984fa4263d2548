"""Foreign code on a leash: every plugin has a lane of its own, so that one that hangs holds up nobody else.

A thread cannot be killed, so a call that hangs past its time is left behind; after ``MAX_STUCK`` of those the plugin
is refused at once until one of them returns. All threads are daemons: a hanging hook never keeps a process alive.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from metaclaw_hooks.errors import HookFailedError

MAX_STUCK = 4  # calls left behind before a plugin is refused
MAX_THREADS = 64  # of one plugin
PROBE_GRACE = 0.5  # seconds that an event loop has, after a timeout, to show that it still turns

Job = tuple[Future[Any], Callable[..., Any], Mapping[str, Any]]


class Lane:
    """Runs the hooks of one plugin: plain functions on threads, coroutines on an event loop of the plugin's own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outstanding = 0  # jobs handed out and not finished
        self._threads = 0
        self._stuck: set[object] = set()  # futures and event loops left behind
        self._loop: _LoopThread | None = None

    def submit(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Future[Any]:
        """Start one call.

        Raises:
            HookFailedError: if too many earlier calls of this plugin still hang.
        """
        with self._lock:
            if len(self._stuck) >= MAX_STUCK:
                raise HookFailedError(f"not called: {len(self._stuck)} earlier calls of {self._name!r} still hang")
            if inspect.iscoroutinefunction(function):
                return self._live_loop().submit(function(**kwargs))
            future: Future[Any] = Future()
            self._outstanding += 1
            if self._outstanding > self._threads and self._threads < MAX_THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name=f"metaclaw-hook-{self._name}", daemon=True).start()
            self._jobs.put((future, function, kwargs))
            return future

    def give_up(self, future: Future[Any]) -> None:
        """Stop waiting for a call that ran out of time."""
        with self._lock:
            if self._loop is not None:
                self._loop.probe()
            if future.cancel() or future.done():
                return
            self._stuck.add(future)
        future.add_done_callback(self._came_back)

    def close(self) -> None:
        """Let threads and the event loop end as soon as their calls have; calls that hang are left behind."""
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)
            if self._loop is not None:
                self._loop.stop()
                self._loop = None

    def _came_back(self, left_behind: object) -> None:
        with self._lock:
            self._stuck.discard(left_behind)

    def _live_loop(self) -> _LoopThread:
        if self._loop is not None and self._loop.blocked():
            self._stuck.add(self._loop)
            self._loop.stop()
            self._loop = None
        if self._loop is None:
            self._loop = _LoopThread(self._name, self._came_back)
        return self._loop

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _carry_out(*job)
            del job  # an idle thread must not keep the session alive that it was called with
            with self._lock:
                self._outstanding -= 1
        with self._lock:
            self._threads -= 1


def _carry_out(future: Future[Any], function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(**kwargs)
        if inspect.isawaitable(result):
            result = asyncio.run(_await(result))
    except BaseException as error:  # noqa: BLE001 foreign code, sys.exit() included; told by the future
        future.set_exception(_as_failure(error))
    else:
        future.set_result(result)


class _LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self, name: str, on_end: Callable[[object], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._on_end = on_end
        self._answered = threading.Event()
        self._probed_at: float | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        threading.Thread(target=self._run, name=f"metaclaw-loop-{name}", daemon=True).start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(self._call(coroutine), self._loop)

    def probe(self) -> None:
        """Ask the loop for a sign of life."""
        if self._probed_at is None:
            self._answered.clear()
            self._probed_at = time.monotonic()
            self._loop.call_soon_threadsafe(self._answered.set)

    def blocked(self) -> bool:
        """Whether a coroutine keeps the loop from turning: a probe stayed without answer."""
        if self._probed_at is None:
            return False
        if self._answered.is_set():
            self._probed_at = None
            return False
        return time.monotonic() - self._probed_at > PROBE_GRACE

    def stop(self) -> None:
        """Take no more calls; the loop ends with the last of those under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await _guard(coroutine)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._last_calls())
        finally:
            self._loop.close()
            self._on_end(self)

    async def _last_calls(self) -> None:
        """Wait for the calls under way, which their callers cancel in time, and end what hooks left running."""
        while self._calls:
            await asyncio.wait(set(self._calls))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=PROBE_GRACE)


async def _await(result: Any) -> Any:
    return await result


async def _guard(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except BaseException as error:
        raise _as_failure(error) from error


def _as_failure(error: BaseException) -> Exception:
    """What would unwind our own threads (exit, cancellation) becomes an ordinary failure."""
    if isinstance(error, Exception):
        return error
    return HookFailedError(f"raised {type(error).__name__}")
