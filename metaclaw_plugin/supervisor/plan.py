"""Which processes this machine needs, and how each is started and known to be ready."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from metaclaw_hooks.types import Mode

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.launch import Launch, check_model, installed, shared_env
from metaclaw_plugin.settings import Settings

TRAINER_NICENESS = 10  # serving goes first


@dataclass(frozen=True)
class Service:
    """One process to run: ``name`` is also the name of its log."""

    name: str
    launch: Launch
    host: str = "127.0.0.1"
    port: int | None = None
    ready_path: str | None = None  # answers 200 once it is ready
    warm_up: tuple[str, dict[str, Any]] | None = None  # path and JSON body of a first request, once it answers
    headers: Mapping[str, str] = field(default_factory=dict)  # of that request
    ready_line: str | None = None  # for a process without a port: stands in its log once it is ready
    start_timeout: float = 300.0  # seconds
    grace: float = 20.0  # seconds between SIGTERM and SIGKILL
    niceness: int = 0  # of its session
    port_setting: str = ""  # what to change when the port is taken

    @property
    def url(self) -> str:
        return f"http://{reachable(self.host)}:{self.port}"


def reachable(host: str) -> str:
    """An address to call what listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def trains(settings: Settings) -> bool:
    """Whether agents learn weights here, rather than skills alone."""
    return settings.rl.enabled and settings.mode in (Mode.RL, Mode.AUTO)


def gateway_launch(settings: Settings, config: Path | None, port: int | None = None) -> Launch:
    from metaclaw_plugin.gateway.command import gateway_command

    if port is not None:
        settings = settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"port": port})})
    argv, env = gateway_command(settings, require_config(config))
    return Launch(tuple(argv), {**env, **shared_env(settings, config)})


def worker_launch(settings: Settings, config: Path | None) -> Launch:
    return Launch((sys.executable, "-m", "metaclaw_plugin.worker"), shared_env(settings, config))


def trainer_port(settings: Settings) -> int:
    """The port in ``metaclaw.rl.remote_url``, where the worker looks for the trainer.

    Raises:
        ConfigError: if ``metaclaw.trainer.port`` says another.
    """
    port = urlsplit(settings.rl.remote_url).port or 4010
    own = settings.trainer.get("port", port)
    if settings.rl.backend == "local" and own != port:
        raise ConfigError(
            f"metaclaw.trainer.port is {own}, but the worker looks for the trainer at port {port} of "
            "metaclaw.rl.remote_url; make them agree"
        )
    return port


def trainer_launch(settings: Settings, config: Path | None, port: int | None = None) -> Launch:
    if not installed("torch"):
        raise ConfigError("the trainer is not installed here: pip install 'metaclaw-plugin[trainer]'")
    check_model(settings.base_model)
    path = require_config(config)
    argv: tuple[str, ...] = (sys.executable, "-m", "metaclaw_trainer", "--config", str(path))
    if port is not None or settings.rl.backend == "local":
        argv += ("--port", str(port or trainer_port(settings)))
    env = shared_env(settings, config)
    if settings.trainer.get("devices") is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(settings.trainer["devices"])
    return Launch(argv, env)


def require_config(config: Path | None) -> Path:
    """The config file, as an absolute path.

    Raises:
        ConfigError: if there is none.
    """
    if config is None:
        raise ConfigError(
            "no config file: name one with --config; litellm_config.yaml in the sources is a working start"
        )
    return config.absolute()


def gateway_service(settings: Settings, config: Path | None, port: int | None = None) -> Service:
    return Service(
        "gateway",
        gateway_launch(settings, config, port),
        host=settings.gateway.host,
        port=port or settings.gateway.port,
        ready_path="/health/liveliness",
        port_setting="metaclaw.gateway.port",
    )


def trainer_service(settings: Settings, config: Path | None) -> Service:
    return Service(
        "trainer",
        trainer_launch(settings, config),
        port=trainer_port(settings),
        ready_path="/v1/health",
        niceness=TRAINER_NICENESS,
        port_setting="metaclaw.rl.remote_url",
    )


def vllm_service(settings: Settings, port: int | None = None) -> Service:
    from metaclaw_plugin.vllm_command import BASE_NAME, vllm_command, vllm_port

    return Service(
        "vllm",
        vllm_command(settings, port),
        host=settings.vllm.host,
        port=port or vllm_port(settings),
        ready_path="/health",
        # The first request is several times slower than the rest; let it not be a user's.
        warm_up=("/v1/completions", {"model": BASE_NAME, "prompt": "Hello", "max_tokens": 2}),
        headers=settings.vllm.headers,
        start_timeout=settings.vllm.start_timeout,
        grace=30.0,
        port_setting="metaclaw.vllm.url",
    )


def worker_service(settings: Settings, config: Path | None) -> Service:
    return Service("worker", worker_launch(settings, config), ready_line="the worker runs")


def console_launch(settings: Settings, config: Path | None, port: int | None = None) -> Launch:
    if not installed("jinja2") or not installed("sqlalchemy"):
        raise ConfigError("the console is not installed here: pip install 'metaclaw-plugin[gateway]'")
    argv = (sys.executable, "-m", "metaclaw_plugin.console", *(("--port", str(port)) if port is not None else ()))
    return Launch(argv, shared_env(settings, config))


def console_service(settings: Settings, config: Path | None, port: int | None = None) -> Service:
    return Service(
        "console",
        console_launch(settings, config, port),
        host=settings.console.host,
        port=port or settings.console.port,
        ready_path="/healthz",
        port_setting="metaclaw.console.port",
    )


def plan(settings: Settings, config: Path | None, only: Collection[str] = ()) -> list[Service]:
    """What `metaclaw start` runs, in order of starting; it is stopped in the opposite order.

    ``only``: these of them, such as vllm and trainer on a GPU server.

    Raises:
        ConfigError: if a process cannot be started with this configuration, or one of ``only`` is none of it.
    """
    makers: dict[str, Callable[[], Service]] = {}
    if trains(settings) and settings.rl.backend == "local":
        if settings.vllm.managed:
            makers["vllm"] = lambda: vllm_service(settings)
        makers["trainer"] = lambda: trainer_service(settings, config)
    makers["gateway"] = lambda: gateway_service(settings, config)
    makers["worker"] = lambda: worker_service(settings, config)
    if settings.console.enabled:
        makers["console"] = lambda: console_service(settings, config)
    for name in only:
        if name not in makers:
            raise ConfigError(f"--only {name}: with this configuration there are {', '.join(makers)}")
    return [make() for name, make in makers.items() if not only or name in only]
