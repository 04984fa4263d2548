"""Finds plugins: entry points of the group ``metaclaw``, and a folder of plain ``.py`` files.

``<folder>/x.py`` is a plugin named ``x`` for every agent; ``<folder>/<agent>/x.py`` is one named ``<agent>/x`` that is
called for that agent alone. A file whose functions bear names of hooks needs no decorator.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaclaw_hooks.errors import InvalidNameError, PluginLoadError
from metaclaw_hooks.names import slug

GROUP = "metaclaw"
MAX_NAME = 100  # characters of a plugin file's name
Signature = tuple[int, int, int]  # modification time in ns, size, inode


@dataclass(frozen=True, slots=True)
class PluginFile:
    """One candidate in the folder."""

    name: str
    agent: str | None
    path: Path
    signature: Signature


def scan_folder(folder: Path) -> Iterator[PluginFile | PluginLoadError]:
    """Every plugin file below ``folder``, sorted; a folder that is not there holds none."""
    for path in sorted(_visible(folder)):
        if path.is_dir():
            try:
                agent = slug(path.name)
            except InvalidNameError as error:
                yield PluginLoadError(f"{path}: {error}; plugins in it are not loaded")
                continue
            yield from (_candidate(inner, agent) for inner in sorted(_visible(path)) if inner.suffix == ".py")
        elif path.suffix == ".py":
            yield _candidate(path, None)


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name[0] not in "._"]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _candidate(path: Path, agent: str | None) -> PluginFile | PluginLoadError:
    # The name goes into logs, counters and pages: no line breaks, no bytes that are no text.
    if not path.stem.isprintable() or len(path.stem) > MAX_NAME:
        shown = ascii(str(path))[:200]
        return PluginLoadError(f"{shown}: a plugin's name is at most {MAX_NAME} printable characters; rename the file")
    name = f"{agent}/{path.stem}" if agent else path.stem
    try:
        stat = path.stat()
    except FileNotFoundError:  # a dangling link, or deleted just now: loading it says so
        return PluginFile(name, agent, path, (0, 0, 0))
    return PluginFile(name, agent, path, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


def load_file(file: PluginFile, wanted: Collection[str], known: Collection[str]) -> types.ModuleType | None:
    """Import a plugin file; ``None`` if it implements no ``wanted`` hook, so that it is not even run here.

    Raises:
        PluginLoadError: if it cannot be read, parsed or run, or implements no hook that there is.
    """
    try:
        source = file.path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(file.path))
    except SyntaxError as error:
        raise PluginLoadError(f"{file.path}, line {error.lineno}: syntax error: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise PluginLoadError(f"{file.path} cannot be read: {error}") from error
    names = set(_bound_names(tree))
    if not names & set(known):
        raise PluginLoadError(f"{file.path} defines no hook; name a function as one of {', '.join(sorted(known))}")
    if not names & set(wanted):
        return None
    module = types.ModuleType("_metaclaw_plugin_" + file.name.replace("/", "_"))
    module.__file__ = str(file.path)
    sys.modules[module.__name__] = module  # dataclasses and pickles of the file look themselves up there
    try:
        exec(compile(tree, str(file.path), "exec"), module.__dict__)
    except BaseException as error:
        sys.modules.pop(module.__name__, None)
        raise PluginLoadError(f"{file.path} raised {type(error).__name__} while it was loaded: {error}") from error
    return module


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Names that the module's top level binds by def or assignment."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
            yield from _specnames(node)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _specnames(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """``@hookimpl(specname="score_trace")`` names the hook in the decorator."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            for keyword in decorator.keywords:
                if keyword.arg == "specname" and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value)


def entry_points() -> list[importlib.metadata.EntryPoint]:
    """Installed packages' plugins, sorted by name."""
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)


def load_entry_point(point: importlib.metadata.EntryPoint) -> Any:
    """The plugin object: a module or an instance; a class is instantiated without arguments.

    Raises:
        PluginLoadError: if importing or instantiating it fails.
    """
    try:
        target = point.load()
        return target() if inspect.isclass(target) else target
    except BaseException as error:
        raise PluginLoadError(
            f"entry point {point.name} = {point.value} raised {type(error).__name__} while it was loaded: {error}"
        ) from error
