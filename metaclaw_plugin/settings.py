"""All settings of gateway and worker: the section ``metaclaw:`` of the LiteLLM config file.

The sections themselves are in ``settings_request``, ``settings_learning`` and ``settings_console``.
``metaclaw.trainer`` is read and checked by the trainer itself, which shares no code with this package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from metaclaw_hooks.types import Mode
from pydantic import Field, ValidationError, field_validator

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings_console import ConsoleSettings
from metaclaw_plugin.settings_errors import explain
from metaclaw_plugin.settings_learning import (
    HookSettings,
    JudgeSettings,
    LengthSettings,
    NextTurnSettings,
    PublishSettings,
    RewardSettings,
    RlSettings,
    VerifierSettings,
    VllmSettings,
    WindowSettings,
    WorkerSettings,
)
from metaclaw_plugin.settings_request import (
    CaptureSettings,
    EvolutionSettings,
    GatewaySettings,
    SessionSettings,
    SkillSettings,
    StoreSettings,
)
from metaclaw_plugin.settings_section import Section, resolve_secret

__all__ = [
    "CONFIG_ENV",
    "CONFIG_NAME",
    "HOME_ENV",
    "CaptureSettings",
    "ConsoleSettings",
    "EvolutionSettings",
    "GatewaySettings",
    "HookSettings",
    "JudgeSettings",
    "LengthSettings",
    "NextTurnSettings",
    "PublishSettings",
    "RewardSettings",
    "RlSettings",
    "Section",
    "SessionSettings",
    "Settings",
    "SkillSettings",
    "StoreSettings",
    "VerifierSettings",
    "VllmSettings",
    "WindowSettings",
    "WorkerSettings",
    "default_home",
    "find_config",
    "load_settings",
    "parse_settings",
    "read_config",
    "resolve_secret",
]

CONFIG_ENV = "METACLAW_CONFIG"  # path of the config file, for processes that LiteLLM starts
HOME_ENV = "METACLAW_HOME"
CONFIG_NAME = "litellm_config.yaml"  # what `metaclaw setup` writes into METACLAW_HOME


def default_home() -> Path:
    """``$METACLAW_HOME``, else ``~/.metaclaw``."""
    return Path(os.environ.get(HOME_ENV) or "~/.metaclaw").expanduser()


class Settings(Section):
    """The section ``metaclaw:`` of the config file."""

    home: Path = Field(default_factory=default_home, description="Where data is kept; METACLAW_HOME, else ~/.metaclaw.")
    mode: Mode = Field(Mode.RL, description="Mode of agents that set none: off, skills_only, rl or auto.")
    base_model: str | None = Field(None, description="Folder or hub name of the model that is served and adapted.")
    gateway: GatewaySettings = GatewaySettings()
    store: StoreSettings = StoreSettings()
    sessions: SessionSettings = SessionSettings()
    capture: CaptureSettings = CaptureSettings()
    skills: SkillSettings = SkillSettings()
    rewards: RewardSettings = RewardSettings()
    hooks: HookSettings = HookSettings()
    worker: WorkerSettings = WorkerSettings()
    publish: PublishSettings = PublishSettings()
    windows: WindowSettings = WindowSettings()
    vllm: VllmSettings = VllmSettings()
    rl: RlSettings = RlSettings()
    console: ConsoleSettings = ConsoleSettings()
    trainer: dict[str, Any] = Field(default_factory=dict, description="Settings of the trainer; see its own reference.")

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def store_url(self) -> str:
        return self.store.url or f"sqlite:///{self.home / 'metaclaw.db'}"

    @property
    def skills_path(self) -> Path:
        return (self.skills.path or self.home / "skills").expanduser()

    @property
    def hooks_path(self) -> Path:
        return (self.hooks.path or self.home / "hooks").expanduser()


def find_config(path: Path | None = None) -> Path | None:
    """The config file that is meant: ``path``, else ``$METACLAW_CONFIG``, else the one in METACLAW_HOME, if there."""
    if path is not None:
        return path.expanduser()
    if os.environ.get(CONFIG_ENV):
        return Path(os.environ[CONFIG_ENV])
    at_home = default_home() / CONFIG_NAME
    return at_home if at_home.is_file() else None


def load_settings(path: Path | None = None) -> Settings:
    """Read the section ``metaclaw:`` of the file that ``find_config`` names (none: all defaults).

    Raises:
        ConfigError: if the file cannot be read, or a setting is unknown or of the wrong type.
    """
    path = find_config(path)
    if path is None:
        return Settings()
    section = read_config(path).get("metaclaw")
    return parse_settings({} if section is None else section, str(path), path)


def read_config(path: Path) -> dict[str, Any]:
    """The whole config file as a mapping.

    Raises:
        ConfigError: if it is missing, unreadable, or no YAML mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; name it with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no YAML mapping; start from litellm_config.yaml")
    return data


def parse_settings(data: Any, source: str, file: Path | None = None) -> Settings:
    """Validate the section; ``source`` is named in errors, with line and column if it is the ``file`` given.

    Raises:
        ConfigError: one line for each wrong setting, with the nearest right name for an unknown one.
    """
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Settings, file)}") from error
