"""The whole house as processes of their own on one configuration, full of secrets that may appear nowhere.

    client ─► gateway (LiteLLM) ─► upstream that replays      trainer on the tiny model      worker      console

Every secret is a canary: a text that is found again by searching for it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from metaclaw_hooks.types import VersionState
from metaclaw_hooks.wire import VersionBody
from metaclaw_trainer.auth import KeyRing

from metaclaw_plugin.console.keys import console_key
from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.launch import shared_env
from metaclaw_plugin.settings import Settings, load_settings
from metaclaw_plugin.store.adapters import record_candidate, set_route, set_state
from metaclaw_plugin.store.agents import add_agent, new_key, revoke_key
from metaclaw_plugin.store.engine import open_store
from tests.gateway_server import start_gateway, stop, write_config
from tests.replay_upstream import ReplayUpstream

LONG = os.environ.get("METACLAW_TEST_SECURITY") == "long"  # `make fuzz`: 20,000 requests, and every lazy route
UPSTREAM_KEY_HEADER = "x-upstream-key"


def canary(what: str) -> str:
    """A secret nobody has seen before, which says what it is."""
    return f"canary-{what}-{secrets.token_hex(12)}"


@dataclass
class House:
    """What runs, and every secret in it."""

    folder: Path
    settings: Settings
    config: Path
    upstream: ReplayUpstream
    gateway: str = ""  # URLs
    trainer: str = ""
    console: str = ""
    keys: dict[str, str] = field(default_factory=dict)  # of the gateway, by whose they are
    trainer_keys: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # other secrets of the owner's
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.settings.home

    @property
    def secrets(self) -> dict[str, str]:
        named = {f"gateway key of {who}": key for who, key in self.keys.items()}
        named |= {f"trainer key of {who}": key for who, key in self.trainer_keys.items()}
        return named | self.owners

    def dead(self) -> list[str]:
        """Processes that have ended."""
        return [name for name, process in self.processes.items() if process.poll() is not None]


@contextmanager
def running_house(folder: Path, model: Path, port: Callable[[], int], upstream: ReplayUpstream) -> Iterator[House]:
    """Gateway, trainer, worker and console over one home, with agents alpha, beta and gamma."""
    folder.mkdir(parents=True, exist_ok=True)
    owners = {name: canary(name) for name in ("owner-upstream", "master", "salt", "console", "vllm")}
    cloud = {
        "model_name": "cloud",
        "litellm_params": {
            "model": "openai/gpt-x",
            "api_base": f"{upstream.url}/v1",
            "api_key": owners["owner-upstream"],
        },
    }
    trainer_port, console_port = port(), port()
    trainer = {
        "port": trainer_port,
        "rank": 4,
        "device": "cpu",
        "torch_threads": 1,
        "targets": ["q_proj"],
        "max_body_mib": 4,
    }
    config = write_config(
        folder,
        upstream.url,
        port(),
        ours=True,
        deployments=[cloud],
        gateway={"upstream_key_header": UPSTREAM_KEY_HEADER, "max_body_bytes": 2_000_000},
        base_model=str(model),
        vllm={"url": upstream.url, "api_key": owners["vllm"]},
        rl={"remote_url": f"http://127.0.0.1:{trainer_port}"},
        console={"port": console_port, "key": owners["console"]},
        trainer={**trainer, "max_body_mib": 4, "vllm_urls": [upstream.url]},
    )
    settings = load_settings(config)
    house = House(folder, settings, config, upstream, owners=owners)
    house.keys = _agents_keys(settings) | {"master": owners["master"]}
    ring = KeyRing(settings.home / "trainer" / "keys.json")
    house.trainer_keys = {who: ring.add(who)[1] for who in ("worker", "other")}
    revoked, house.trainer_keys["revoked"] = ring.add("gone")
    ring.revoke(revoked.id)
    _tell_worker_its_key(config, house.trainer_keys["worker"])
    house.settings = load_settings(config)
    house.keys["internal"] = internal_key(settings.home)
    assert console_key(settings) == owners["console"]
    with ExitStack() as stack:
        _start(house, stack)
        yield house


def _agents_keys(settings: Settings) -> dict[str, str]:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        for name in ("alpha", "beta", "gamma"):
            add_agent(c, name)
        made = {"own": new_key(c, ["alpha"]), "other": new_key(c, ["beta"]), "revoked": new_key(c, ["alpha"])}
        revoke_key(c, made["revoked"].id)
    engine.dispose()
    return {who: key.secret for who, key in made.items()}


def serve_version(house: House, agent: str) -> None:
    """Let ``agent@v1`` serve, as far as the store is concerned; the trainer has no such files."""
    body = VersionBody(
        agent=agent,
        number=1,
        base_model="m",
        parent=0,
        trace_ids=[],
        step=1,
        metrics={},
        sha256="0" * 64,
        libraries={},
        path=str(house.home / "nowhere"),
        created_at=1.0,
        cursor=1,
    )
    engine = open_store(house.settings.store_url)
    with engine.begin() as c:
        record_candidate(c, body)
        set_state(c, agent, 1, VersionState.SERVING)
        set_route(c, agent, 1)
    engine.dispose()


def _tell_worker_its_key(config: Path, key: str) -> None:
    told = yaml.safe_load(config.read_text())
    told["metaclaw"]["rl"]["remote_api_key"] = key
    config.write_text(yaml.safe_dump(told))
    config.chmod(0o600)


def _start(house: House, stack: ExitStack) -> None:
    settings = house.settings
    env = {"LITELLM_MASTER_KEY": house.owners["master"], "LITELLM_SALT_KEY": house.owners["salt"]}
    house.gateway = f"http://127.0.0.1:{settings.gateway.port}"
    house.trainer = settings.rl.remote_url
    house.console = f"http://127.0.0.1:{settings.console.port}"
    shared = shared_env(settings, house.config) | env
    python = sys.executable
    for name, argv in (
        ("trainer", [python, "-m", "metaclaw_trainer", "--config", str(house.config)]),
        ("worker", [python, "-m", "metaclaw_plugin.worker"]),
        ("console", [python, "-m", "metaclaw_plugin.console"]),
    ):
        with (house.folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                argv, env={**os.environ, **shared}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        house.processes[name] = process
        stack.callback(stop, process)
    house.processes["gateway"] = start_gateway(house.folder, house.config, settings, env)
    stack.callback(stop, house.processes["gateway"])
    _wait_for(house, f"{house.trainer}/v1/health")
    _wait_for(house, f"{house.console}/healthz")


def _wait_for(house: House, url: str) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not house.dead():
        try:
            if httpx.get(url, timeout=5, verify=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(house.folder.glob("*.log")))
    pytest.fail(f"{url} did not answer; ended: {house.dead()}\n{logs}")
