"""The plugin manager: finds plugins, calls them apart from each other, and counts what they do.

    plugins = create_plugin_manager(folder, timeout=30.0, builtins={"length": LengthReward(...)})
    for plugin, reward in await plugins.call("score_trace", trace=trace, next_trace=None, session=session):
        ...

Calling is ours, since pluggy neither awaits nor isolates.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from metaclaw_hooks.errors import HooksError
from metaclaw_hooks.registry import BUILT_IN, HOOKS, Bound, HookStats, PluginInfo, Registry
from metaclaw_hooks.results import check_result

__all__ = ["HOOKS", "HookStats", "PluginInfo", "Plugins", "create_plugin_manager"]

logger = logging.getLogger(__name__)


class Plugins(Registry):
    """Loaded plugins that can be called, from any thread."""

    async def call(self, hook: str, /, *, only: Collection[str] | None = None, **kwargs: Any) -> list[tuple[str, Any]]:
        """Call every implementation at once; ``(plugin, result)`` of those with an opinion, in pluggy's order.

        ``only`` narrows it to plugins of these names.

        Raises:
            UnknownHookError: if there is no such hook. Failures of plugins are never raised.
        """
        bound = self.bound(hook, _agent_of(kwargs), only)
        if len(bound) == 1 or all(b.plugin.inline for b in bound):
            results = [await self._run(b, hook, kwargs) for b in bound]
        else:
            results = await asyncio.gather(*(self._run(b, hook, kwargs) for b in bound))
        return [(b.plugin.name, result) for b, result in zip(bound, results, strict=True) if result is not None]

    async def call_first(self, hook: str, /, *, only: Collection[str] | None = None, **kwargs: Any) -> Any:
        """Call implementations one after the other until one has an opinion; ``None`` if none has."""
        for bound in self.bound(hook, _agent_of(kwargs), only):
            result = await self._run(bound, hook, kwargs)
            if result is not None:
                return result
        return None

    def call_blocking(
        self, hook: str, /, *, only: Collection[str] | None = None, **kwargs: Any
    ) -> list[tuple[str, Any]]:
        """As ``call``, for a thread without an event loop; one implementation after the other."""
        results = []
        for bound in self.bound(hook, _agent_of(kwargs), only):
            result = self._run_blocking(bound, hook, kwargs)
            if result is not None:
                results.append((bound.plugin.name, result))
        return results

    def take_stats(self) -> dict[tuple[str, str], HookStats]:
        """What was done since this was last asked, by (plugin, hook); for counters that several processes share."""
        fresh = {}
        for name, hooks in list(self._stats.items()):
            for hook, now in list(hooks.items()):
                before = self._reported.get((name, hook), HookStats())
                if now.calls == before.calls:
                    continue
                fresh[name, hook] = HookStats(
                    now.calls - before.calls,
                    now.failures - before.failures,
                    now.timeouts - before.timeouts,
                    now.seconds - before.seconds,
                    now.last_error,
                )
                self._reported[name, hook] = dataclasses.replace(now)
        return fresh

    async def _run(self, bound: Bound, hook: str, kwargs: Mapping[str, Any]) -> Any:
        started = time.perf_counter()
        future: Future[Any] | None = None
        try:
            arguments = {name: kwargs[name] for name in bound.arguments}
            if bound.plugin.inline:
                value = bound.function(**arguments)
            else:
                future = bound.plugin.lane.submit(bound.function, arguments)
                value = await asyncio.wait_for(asyncio.wrap_future(future), bound.plugin.timeout)
            result = check_result(hook, bound.plugin.name, kwargs, value)
        except Exception as error:  # noqa: BLE001 isolation boundary: a plugin may raise anything
            self._failed(bound, hook, error, future, started)
            return None
        self._done(bound, hook, started)
        return result

    def _run_blocking(self, bound: Bound, hook: str, kwargs: Mapping[str, Any]) -> Any:
        started = time.perf_counter()
        future: Future[Any] | None = None
        try:
            future = bound.plugin.lane.submit(bound.function, {name: kwargs[name] for name in bound.arguments})
            result = check_result(hook, bound.plugin.name, kwargs, future.result(bound.plugin.timeout))
        except Exception as error:  # noqa: BLE001 isolation boundary: a plugin may raise anything
            self._failed(bound, hook, error, future, started)
            return None
        self._done(bound, hook, started)
        return result

    def _done(self, bound: Bound, hook: str, started: float) -> HookStats:
        stats = bound.plugin.stats[hook]
        stats.calls += 1
        stats.seconds += time.perf_counter() - started
        return stats

    def _failed(self, bound: Bound, hook: str, error: Exception, future: Future[Any] | None, started: float) -> None:
        stats = self._done(bound, hook, started)
        stats.failures += 1
        ran_out = isinstance(error, TimeoutError | FutureTimeoutError)
        if future is not None and ran_out and (future.cancelled() or not future.done()):
            bound.plugin.lane.give_up(future)
            stats.timeouts += 1
            stats.last_error = f"no answer within {bound.plugin.timeout:g} s"
        else:
            stats.last_error = _summary(error)
        if stats.failures & (stats.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th: a broken plugin must not flood the log
            logger.warning(
                "plugin %s: %s failed (%s); counted as no opinion, failure %d of %d calls",
                bound.plugin.name,
                hook,
                stats.last_error,
                stats.failures,
                stats.calls,
            )
            logger.debug("plugin %s: %s", bound.plugin.name, hook, exc_info=error)


def create_plugin_manager(
    folder: Path | None = None,
    timeout: float = 30.0,
    builtins: Mapping[str, object] | None = None,
    *,
    wanted: Collection[str] = HOOKS,
    packages: bool = True,
) -> Plugins:
    """Load built-ins first, then installed packages, then the folder; no global state.

    ``wanted`` names the hooks that this process calls: a file that has none of them is not even run here.
    ``timeout`` is in seconds, for each call; a plugin that needs longer says ``HOOK_TIMEOUT``. A built-in with
    ``INLINE = True`` is called without a thread.

    Raises:
        PluginLoadError: if a built-in cannot be registered; all others are isolated and told in ``problems``.
    """
    plugins = Plugins(folder, timeout, wanted)
    for name, target in (builtins or {}).items():
        plugins.add(name, target, origin=BUILT_IN, inline=bool(getattr(target, "INLINE", False)))
    if packages:
        plugins.load_entry_points()
    plugins.refresh()
    return plugins


def _agent_of(kwargs: Mapping[str, Any]) -> str | None:
    """The agent that a call is about, so that another agent's own plugins stay out of it."""
    for name in ("trace", "candidate", "version", "sample"):
        if name in kwargs:
            return str(kwargs[name].agent)
    batch: Sequence[Any] = kwargs.get("batch") or ()
    if batch:
        return str(batch[0].agent)
    agent = kwargs.get("agent")
    return None if agent is None else str(getattr(agent, "name", agent))


def _summary(error: BaseException) -> str:
    """What failed and where; the text of a foreign error may quote a conversation, so only ours is repeated."""
    if isinstance(error, HooksError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
