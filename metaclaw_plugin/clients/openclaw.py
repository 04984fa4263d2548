"""OpenClaw's configuration file: our provider entries in, and out again, and nothing else touched.

Each agent gets a provider entry of its own (its key is its identity), with session-affinity headers on so that its
conversations are told apart, and that provider's model as its primary one. What stood there before is remembered.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaclaw_plugin.errors import ConfigError

MAIN = "main"  # the agent that OpenClaw has when its configuration lists none
EXTENSION = Path(__file__).resolve().parent.parent / "openclaw_extension"
EXTENSION_ID = "metaclaw"
SMALLEST_CONTEXT = 24_000  # tokens: OpenClaw's own prompt alone is about 19,000


@dataclass(frozen=True)
class Connection:
    """One agent of OpenClaw and how it reaches us. ``agent`` is also its name with us."""

    agent: str
    url: str  # root URL of the gateway
    key: str
    context_window: int
    max_tokens: int

    @property
    def provider(self) -> str:
        return provider_name(self.agent)

    @property
    def model(self) -> str:
        return f"{self.provider}/{self.agent}"


@dataclass(frozen=True)
class Change:
    """One value of the file that was set. A step "#ID" of the path is the entry with that id in a list."""

    path: tuple[str, ...]
    before: Any
    absent: bool  # there was nothing before
    after: Any

    def told(self) -> str:
        shown = "provider with its own key" if self.path[:2] == ("models", "providers") else json.dumps(self.after)
        return f"{'.'.join(self.path)} = {shown}" + ("" if self.absent else " (was set; remembered)")


def provider_name(agent: str) -> str:
    return f"metaclaw-{agent}"


def default_file(environ: Mapping[str, str] | None = None) -> Path:
    """Where OpenClaw keeps its configuration: OPENCLAW_CONFIG_PATH, else below OPENCLAW_HOME or the home directory."""
    env = os.environ if environ is None else environ
    if env.get("OPENCLAW_CONFIG_PATH"):
        return Path(env["OPENCLAW_CONFIG_PATH"]).expanduser()
    return Path(env.get("OPENCLAW_HOME") or "~").expanduser() / ".openclaw" / "openclaw.json"


def read_file(path: Path) -> dict[str, Any]:
    """The configuration.

    Raises:
        ConfigError: if it is missing, unreadable, or not plain JSON (comments would be lost).
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"OpenClaw's configuration {path} is not there; run `openclaw onboard`, or use --file"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not plain JSON ({error}); comments would be lost, so nothing was changed: "
            "`metaclaw connect openclaw --dry-run --print` shows what to add by hand"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config


def agents_in(config: Mapping[str, Any]) -> list[str]:
    """Ids of the agents that the configuration lists; ``main`` alone when it lists none."""
    keyed, listed = _get(config, ("agents", "entries")), _get(config, ("agents", "list"))
    ids = list(keyed) if isinstance(keyed, dict) else []
    if isinstance(listed, list):
        ids += [str(entry["id"]) for entry in listed if isinstance(entry, dict) and entry.get("id")]
    return ids or [MAIN]


def key_in(config: Mapping[str, Any], agent: str) -> str | None:
    """The key that our provider entry for ``agent`` holds already."""
    key = _get(config, ("models", "providers", provider_name(agent), "apiKey"))
    return key if isinstance(key, str) else None


def connect(
    config: Mapping[str, Any], connections: Sequence[Connection], extension: bool = False
) -> tuple[dict[str, Any], list[Change]]:
    """The configuration with our entries, and what differs; the same input again differs in nothing.

    ``extension``: load ours too, which tells the gateway of sessions, turns and ends of sessions.

    Raises:
        ConfigError: if an agent is not in the configuration.
    """
    new = copy.deepcopy(dict(config))
    changes: list[Change] = []
    known = agents_in(config)
    for connection in connections:
        if connection.agent not in known:
            raise ConfigError(f"OpenClaw has no agent {connection.agent!r}; it has: {', '.join(known)}")
        _set(new, ("models", "providers", connection.provider), _provider(connection), changes)
        owner = _model_path(new, connection.agent)
        current = _get(new, owner)
        model = {**current, "primary": connection.model} if isinstance(current, dict) else {"primary": connection.model}
        _set(new, owner, model, changes)
        # Once this is set, it is the list of models that may be used at all.
        if isinstance(_get(new, ("agents", "defaults", "models")), dict):
            _set(new, ("agents", "defaults", "models", connection.model), {}, changes)
    if extension:
        _add_extension(new, changes)
    return new, changes


def _add_extension(config: dict[str, Any], changes: list[Change]) -> None:
    for path, ours in ((("plugins", "load", "paths"), str(EXTENSION)), (("plugins", "allow"), EXTENSION_ID)):
        listed = _get(config, path)
        if path[-1] == "allow" and not isinstance(listed, list):
            continue  # without that list everything is allowed
        if ours not in (listed or []):
            _set(config, path, [*(listed or []), ours], changes)
    entry = _get(config, ("plugins", "entries", EXTENSION_ID)) or {}
    _set(config, ("plugins", "entries", EXTENSION_ID), {**entry, "enabled": True}, changes)


def disconnect(config: Mapping[str, Any], changes: Sequence[Change]) -> tuple[dict[str, Any], list[str]]:
    """The configuration as it was, and notes on values that somebody changed since, which are left alone."""
    new = copy.deepcopy(dict(config))
    notes = []
    for change in reversed([_where_now(new, change) for change in changes]):
        if _get(new, change.path) != change.after:
            notes.append(f"{'.'.join(change.path)} was changed by somebody else since and is left as it is")
        elif change.absent:
            _remove(new, change.path)
        else:
            _set(new, change.path, change.before, [])
    return new, notes


def write_file(path: Path, config: Mapping[str, Any]) -> Path:
    """Replace the file in one step, with the mode that it had; returns the backup beside it.

    Raises:
        ConfigError: if it cannot be written; then it is as it was.
    """
    backup = path.with_name(f"{path.name}.metaclaw-{time.strftime('%Y%m%d-%H%M%S')}.bak")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        mode = path.stat().st_mode & 0o777
        for target, text in ((backup, path.read_text(encoding="utf-8")), (part, json.dumps(config, indent=2) + "\n")):
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
                file.write(text)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    return backup


def _provider(connection: Connection) -> dict[str, Any]:
    model = {
        "id": connection.agent,
        "name": f"{connection.agent} (MetaClaw)",
        "contextWindow": connection.context_window,
        "maxTokens": connection.max_tokens,
        "compat": {"sendSessionAffinityHeaders": True},
    }
    return {
        "baseUrl": f"{connection.url}/v1",
        "apiKey": connection.key,
        "api": "openai-completions",
        "models": [model],
    }


def _where_now(config: Mapping[str, Any], change: Change) -> Change:
    """OpenClaw moves ``agents.list`` to keyed ``agents.entries`` when it writes its configuration."""
    if change.path[:2] != ("agents", "list") or _get(config, ("agents", "list")) is not None:
        return change
    return replace(change, path=("agents", "entries", change.path[2].removeprefix("#"), *change.path[3:]))


def _model_path(config: Mapping[str, Any], agent: str) -> tuple[str, ...]:
    if _get(config, ("agents", "entries", agent)) is not None:
        return ("agents", "entries", agent, "model")
    listed = _get(config, ("agents", "list"))
    if isinstance(listed, list) and any(isinstance(entry, dict) and entry.get("id") == agent for entry in listed):
        return ("agents", "list", f"#{agent}", "model")
    return ("agents", "defaults", "model")


def _get(node: Any, path: Sequence[str]) -> Any:
    for step in path:
        if step.startswith("#") and isinstance(node, list):
            node = next((entry for entry in node if isinstance(entry, dict) and entry.get("id") == step[1:]), None)
        else:
            node = node.get(step) if isinstance(node, dict) else None
    return node


def _set(config: dict[str, Any], path: tuple[str, ...], value: Any, changes: list[Change]) -> None:
    before = _get(config, path)
    if before == value:
        return
    parent: Any = config
    for depth, step in enumerate(path[:-1]):
        inner = _get(parent, (step,))
        if inner is None:
            inner = parent[step] = {}
            _note_created(changes, path[: depth + 1])
        parent = inner
    if not isinstance(parent, dict):
        raise ConfigError(f"{'.'.join(path[:-1])} in OpenClaw's configuration is no object; nothing was changed")
    changes.append(Change(path, copy.deepcopy(before), path[-1] not in parent, copy.deepcopy(value)))
    parent[path[-1]] = copy.deepcopy(value)


def _note_created(changes: list[Change], path: tuple[str, ...]) -> None:
    """An object that we made to hold our entries goes again with them, if it is empty by then."""
    changes.append(Change(path, None, True, {}))


def _remove(config: dict[str, Any], path: tuple[str, ...]) -> None:
    parent = _get(config, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
