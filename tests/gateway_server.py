"""Start the real gateway, and plain LiteLLM beside it, as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from metaclaw_hooks.types import Trace

from metaclaw_plugin.gateway.command import gateway_command
from metaclaw_plugin.settings import Settings, load_settings
from metaclaw_plugin.store.agents import add_agent, new_key
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import iter_traces

PLAIN_KEY = "sk-plain-litellm-in-the-same-place-0123456789"
_START_TIMEOUT = 240.0  # seconds; 10 on a quiet machine


@dataclass
class GatewayServer:
    """A running gateway and the door to its store."""

    url: str
    key: str  # acts for agent alpha
    pool_key: str  # acts for beta and gamma
    settings: Settings
    log: Path
    process: subprocess.Popen[bytes]
    seen: set[str] = field(default_factory=set)

    def traces(self) -> list[Trace]:
        """All that is stored."""
        engine = open_store(self.settings.store_url)
        try:
            with engine.connect() as c:
                return list(iter_traces(c))
        finally:
            engine.dispose()

    def new_traces(self, wait: float = 0.0, at_least: int = 1) -> list[Trace]:
        """What was stored since this was last called; waits for traces that nobody waited for."""
        deadline = time.monotonic() + wait
        while True:
            fresh = [trace for trace in self.traces() if trace.id not in self.seen]
            if len(fresh) >= at_least or time.monotonic() > deadline:
                self.seen.update(trace.id for trace in fresh)
                return fresh
            time.sleep(0.05)


def write_config(folder: Path, upstream: str, port: int, ours: bool, **metaclaw: Any) -> Path:
    """A config in the manner of litellm_config.yaml; ``ours`` False: LiteLLM alone."""
    deployment = {"model": "hosted_vllm/*", "api_base": f"{upstream}/v1", "api_key": "none"}
    gateway = metaclaw.pop("gateway", {})
    # No lot decides what a test sees: one session in ten would teach nothing.
    metaclaw.setdefault("sessions", {}).setdefault("held_out_one_in", 0)
    config: dict[str, Any] = {
        "model_list": [
            {"model_name": "metaclaw/*", "litellm_params": deployment | {"use_chat_completions_api": True}},
            *metaclaw.pop("deployments", []),
        ],
        "litellm_settings": {
            "num_retries": 0,
            "request_timeout": 60,
            "telemetry": False,
            "turn_off_message_logging": True,
        },
        "router_settings": {"disable_cooldowns": True},
        "general_settings": {},
        "metaclaw": {"home": str(folder / "home"), "gateway": {"port": port} | gateway} | metaclaw,
    }
    if ours:
        config["litellm_settings"]["callbacks"] = "metaclaw_plugin.callback.handler"
        config["general_settings"]["custom_auth"] = "metaclaw_plugin.gateway.auth.authenticate"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running_gateway(folder: Path, upstream: str, port: int, **metaclaw: Any) -> Iterator[GatewayServer]:
    """Our gateway in front of ``upstream``, with the agents alpha, beta and gamma."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, upstream, port, ours=True, **metaclaw)
    settings = load_settings(config)
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        for name in ("alpha", "beta", "gamma"):
            add_agent(c, name)
        key, pool = new_key(c, ["alpha"]).secret, new_key(c, ["beta", "gamma"]).secret
    engine.dispose()
    process = start_gateway(folder, config, settings)
    server = GatewayServer(f"http://127.0.0.1:{port}", key, pool, settings, folder / "gateway.log", process)
    try:
        yield server
    finally:
        stop(server.process)  # which a test may have started anew


@contextmanager
def running_database_gateway(
    folder: Path, upstream: str, port: int, env: Mapping[str, str], **metaclaw: Any
) -> Iterator[GatewayServer]:
    """Our gateway with LiteLLM's own virtual keys; ``env`` is that of ``litellm_db.database_mode.running_database``.

    ``key`` and ``pool_key`` are LiteLLM's master key: make others by ``POST /key/generate`` with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder, upstream, port, ours=True, **metaclaw)
    config = yaml.safe_load(path.read_text())
    del config["general_settings"]["custom_auth"]
    path.write_text(yaml.safe_dump(config))
    settings = load_settings(path)
    process = start_gateway(folder, path, settings, {**env, "LITELLM_MASTER_KEY": PLAIN_KEY})
    url = f"http://127.0.0.1:{port}"
    try:
        yield GatewayServer(url, PLAIN_KEY, PLAIN_KEY, settings, folder / "gateway.log", process)
    finally:
        stop(process)


@contextmanager
def running_plain_litellm(folder: Path, upstream: str, port: int) -> Iterator[str]:
    """LiteLLM without our callback, in front of the same upstream; yields its URL. Its key is PLAIN_KEY."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, upstream, port, ours=False)
    process = start_gateway(folder, config, load_settings(config), {"LITELLM_MASTER_KEY": PLAIN_KEY})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def start_gateway(
    folder: Path, config: Path, settings: Settings, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the process that ``metaclaw gateway`` becomes, and wait until it answers."""
    argv, environment = gateway_command(settings, config)
    # LiteLLM writes some fields in the order of a set; a fixed seed lets two processes be compared byte by byte.
    log = folder / "gateway.log"
    with log.open("ab") as output:
        seeded = {**environment, "PYTHONHASHSEED": "0", **(env or {})}
        process = subprocess.Popen(argv, env=seeded, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + _START_TIMEOUT
    alive = f"http://127.0.0.1:{settings.gateway.port}/health/liveliness"
    with httpx.Client(timeout=5, verify=False) as client:  # reading all certificates costs more than a request
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get(alive).status_code == 200:
                    return process
            except httpx.TransportError:
                time.sleep(0.1)
    stop(process)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    pytest.fail(f"the gateway did not become ready (exit code {process.poll()}):\n{tail}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """``kill -9``, with all its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and its workers, as `metaclaw stop` would."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            kill(process)
