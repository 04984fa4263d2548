"""Which plugins there are and which function implements which hook; loading, reloading, and what went wrong.

pluggy decides what implements a hook and in which order.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from metaclaw_hooks import discovery, hookspecs
from metaclaw_hooks.errors import HooksError, PluginLoadError, UnknownHookError
from metaclaw_hooks.isolation import Lane

logger = logging.getLogger(__name__)

HOOKS: tuple[str, ...] = tuple(
    name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")
)
BUILT_IN = "built-in"  # origin of our own plugins
LOAD_TIMEOUT = 30.0  # seconds that a plugin file may take to import


@dataclass(slots=True)
class HookStats:
    """What one hook of one plugin did in this process."""

    calls: int = 0
    failures: int = 0  # timeouts included
    timeouts: int = 0
    seconds: float = 0.0
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A loaded plugin, as ``metaclaw hooks list`` shows it."""

    name: str
    origin: str  # "built-in", "package ..." or the path of a file
    agent: str | None  # the only agent that it is called for
    lone_reply: bool | None  # whether its score_trace can score a lone reply; None: it has none
    hooks: Mapping[str, HookStats]


@dataclass(slots=True)
class LoadedPlugin:
    """A plugin, the lane that it runs in, and its figures."""

    name: str
    origin: str
    agent: str | None
    target: object
    inline: bool  # ours, quick and without I/O: called where we are, without a thread
    lane: Lane
    timeout: float  # seconds for one call
    stats: dict[str, HookStats]  # by hook; kept when a file is loaded again


@dataclass(frozen=True, slots=True)
class Bound:
    """One function that implements a hook, and the arguments that it names."""

    plugin: LoadedPlugin
    function: Any
    arguments: frozenset[str]


class _Manager(pluggy.PluginManager):
    """Takes functions that are named like hooks without a decorator, from plain files."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        options = super().parse_hookimpl_opts(plugin, name)
        plain_file = isinstance(plugin, ModuleType) and plugin.__name__.startswith("_metaclaw_plugin_")
        if options is None and plain_file and name in HOOKS and callable(getattr(plugin, name)):
            return {}
        if options and (options.get("wrapper") or options.get("hookwrapper")):
            raise PluginLoadError(f"{name} is declared as a wrapper, which this seam does not have")
        return options


class Registry:
    """The loaded plugins. ``refresh``, ``add`` and ``remove`` come from one thread at a time, reads from any."""

    def __init__(self, folder: Path | None, timeout: float, wanted: Collection[str]) -> None:
        self._folder = folder
        self._timeout = timeout
        self._wanted = frozenset(wanted)
        self._manager = _Manager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: dict[str, LoadedPlugin] = {}
        self._table: dict[str, tuple[Bound, ...]] = {}
        self._files: dict[Path, discovery.Signature] = {}
        self._file_names: dict[Path, str] = {}
        self._problems: dict[str, str] = {}
        self._stats: dict[str, dict[str, HookStats]] = {}
        self._reported: dict[tuple[str, str], HookStats] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """What could not be loaded, by file or entry point, and why."""
        return dict(self._problems)

    def describe(self) -> list[PluginInfo]:
        """Every loaded plugin that has at least one hook, in the order of loading."""
        return [
            PluginInfo(p.name, p.origin, p.agent, self.scores_lone_reply(p.name), dict(p.stats))
            for p in list(self._plugins.values())
        ]

    def scores_lone_reply(self, name: str) -> bool | None:
        """Whether plugin ``name`` can score a reply without what followed; ``None``: it scores nothing.

        It says so by ``SCORES_LONE_REPLY``; without that, a ``score_trace`` that takes only ``trace`` can.
        """
        bound = [b for b in self._table.get("score_trace", ()) if b.plugin.name == name]
        if not bound:
            return None
        said = getattr(bound[0].plugin.target, "SCORES_LONE_REPLY", None)
        return said if isinstance(said, bool) else bound[0].arguments <= {"trace"}

    def reads_what_followed(self, name: str) -> bool:
        """Whether plugin ``name`` scores better, or only, once it is known what came after a reply."""
        bound = [b for b in self._table.get("score_trace", ()) if b.plugin.name == name]
        return any(b.arguments & {"next_trace", "session"} for b in bound) or self.scores_lone_reply(name) is False

    @property
    def built_in(self) -> frozenset[str]:
        """Names of the plugins that come with us."""
        return frozenset(name for name, plugin in list(self._plugins.items()) if plugin.origin == BUILT_IN)

    def scores_session(self, name: str) -> bool:
        """Whether ``score_trace`` of plugin ``name`` rewards a whole session, shown its last trace."""
        plugin = self._plugins.get(name)
        return plugin is not None and getattr(plugin.target, "SCORES_SESSION", False) is True

    def implementers(self, hook: str, agent: str | None = None) -> list[str]:
        """Names of the plugins that would be called for ``hook`` (and ``agent``), in order."""
        return [b.plugin.name for b in self.bound(hook, agent)]

    def takes(self, hook: str, argument: str) -> bool:
        """Whether any implementation of ``hook`` names ``argument``; what nobody reads need not be loaded."""
        return any(argument in b.arguments for b in self._table.get(hook, ()))

    def bound(self, hook: str, agent: str | None = None, only: Collection[str] | None = None) -> list[Bound]:
        """What would be called for ``hook`` and ``agent``, in order, narrowed to plugins of the names in ``only``.

        Raises:
            UnknownHookError: if there is no such hook.
        """
        if hook not in HOOKS:
            raise UnknownHookError(f"there is no hook {hook!r}; there are {', '.join(HOOKS)}")
        return [
            b
            for b in self._table.get(hook, ())
            if b.plugin.agent in (None, agent) and (only is None or b.plugin.name in only)
        ]

    @property
    def longest_call(self) -> float:
        """Seconds after which every call of every plugin has ended, or was given up."""
        return max((plugin.timeout for plugin in list(self._plugins.values())), default=self._timeout)

    def _timeout_of(self, target: object) -> float:
        own = getattr(target, "HOOK_TIMEOUT", None)
        return float(own) if isinstance(own, int | float) and own > 0 else self._timeout

    def add(self, name: str, target: object, *, origin: str, agent: str | None = None, inline: bool = False) -> None:
        """Register one plugin object.

        Raises:
            PluginLoadError: if the name is taken, or a function does not fit its hook.
        """
        if name in self._plugins:
            raise PluginLoadError(
                f"plugin {name!r} from {origin}: the name is taken by {self._plugins[name].origin}; rename one of them"
            )
        stats = self._stats.setdefault(name, {})
        plugin = LoadedPlugin(name, origin, agent, target, inline, Lane(name), self._timeout_of(target), stats)
        try:
            self._manager.register(target, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise PluginLoadError(f"plugin {name!r} from {origin}: {' '.join(str(error).split())}") from error
        self._plugins[name] = plugin
        self._rebuild()

    def remove(self, name: str) -> None:
        """Take one plugin out; calls that are under way end as they may."""
        plugin = self._plugins.pop(name)
        self._manager.unregister(name=name)
        self._rebuild()
        plugin.lane.close()

    def refresh(self) -> bool:
        """Read the folder again; whether any plugin came, changed or went.

        A file that no longer loads leaves the version before it in force, and is told in ``problems``.
        """
        if self._folder is None:
            return False
        found: dict[Path, discovery.PluginFile] = {}
        changed = False
        try:
            items = list(discovery.scan_folder(self._folder))
        except OSError as error:  # such as a folder that may not be read: what is loaded stays
            self._problem(str(self._folder), PluginLoadError(f"{self._folder} cannot be read: {error.strerror}"))
            return False
        self._problems.pop(str(self._folder), None)
        for item in items:
            if isinstance(item, PluginLoadError):
                self._problem(str(item).split(": ")[0], item)
            else:
                found[item.path] = item
        for path in [path for path in self._files if path not in found]:
            del self._files[path]
            self._problems.pop(str(path), None)
            if path in self._file_names:
                self.remove(self._file_names.pop(path))
                logger.info("plugin file %s is gone; its plugin is out", path)
                changed = True
        for path, file in found.items():
            if self._files.get(path) != file.signature:
                self._files[path] = file.signature
                changed |= self._load_file(file)
        return changed

    def close(self) -> None:
        """Let the plugins' threads end."""
        for plugin in list(self._plugins.values()):
            plugin.lane.close()

    def load_entry_points(self) -> None:
        """Load every installed plugin of the group; failures go to ``problems``."""
        for point in discovery.entry_points():
            package = point.dist.name if point.dist else point.module
            try:
                self.add(point.name, discovery.load_entry_point(point), origin=f"package {package}")
            except PluginLoadError as error:
                self._problem(f"entry point {point.name} of {package}", error)

    def _load_file(self, file: discovery.PluginFile) -> bool:
        loader = Lane(f"load {file.name}")
        job = loader.submit(discovery.load_file, {"file": file, "wanted": self._wanted, "known": HOOKS})
        try:
            module = job.result(LOAD_TIMEOUT)
            previous = self._plugins.get(self._file_names.get(file.path, ""))
            if previous is not None:
                self.remove(previous.name)
            self._file_names.pop(file.path, None)
            if module is not None:
                try:
                    self.add(file.name, module, origin=str(file.path), agent=file.agent)
                except PluginLoadError:
                    if previous is not None:
                        self.add(previous.name, previous.target, origin=previous.origin, agent=previous.agent)
                        self._file_names[file.path] = previous.name
                    raise
                self._file_names[file.path] = file.name
                logger.info("plugin %s loaded from %s", file.name, file.path)
        except FutureTimeoutError:
            self._problem(str(file.path), PluginLoadError(f"{file.path} took over {LOAD_TIMEOUT:g} s to import"))
            return False
        except HooksError as error:
            self._problem(str(file.path), error)
            return False
        finally:
            loader.close()
        self._problems.pop(str(file.path), None)
        return True

    def _problem(self, where: str, error: HooksError) -> None:
        if self._problems.get(where) != str(error):
            self._problems[where] = str(error)
            kept = " (the version loaded before stays in force)" if Path(where) in self._file_names else ""
            logger.error("plugin not loaded%s, the others go on: %s", kept, error)

    def _rebuild(self) -> None:
        table: dict[str, tuple[Bound, ...]] = {}
        for hook in HOOKS:
            caller = getattr(self._manager.hook, hook)
            bound = []
            for implementation in reversed(caller.get_hookimpls()):
                plugin = self._plugins.get(implementation.plugin_name)
                if plugin is not None:
                    arguments = frozenset((*implementation.argnames, *implementation.kwargnames))
                    bound.append(Bound(plugin, implementation.function, arguments & set(caller.spec.argnames)))
                    plugin.stats.setdefault(hook, HookStats())
            table[hook] = tuple(bound)
        self._table = table
