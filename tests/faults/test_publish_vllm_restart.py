"""vLLM is killed and starts again: its adapters come back by themselves, and no request is failed by their absence."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from metaclaw_hooks.plugins import create_plugin_manager
from metaclaw_hooks.types import Agent, Mode

from benchmarks.telltale import Telltale, TelltaleMaker
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest, Plan
from metaclaw_plugin.gateway.healing import HealingTransport
from metaclaw_plugin.gateway.routing import InFlight, Route
from metaclaw_plugin.settings import PublishSettings, Settings, VllmSettings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.publishing import Publisher
from tests.publish_trainer import LocalTrainer
from tests.vllm_server import pick_free_port, start_vllm, stop_group, wait_until_ready

pytestmark = pytest.mark.vllm

AGENTS = ("ada", "bob")


class Context:
    """What a worker would hand to its publisher."""

    def __init__(self, home: Path, url: str) -> None:
        self.settings = Settings(home=home, publish=PublishSettings(policy="always"), vllm=VllmSettings(url=url))
        self.engine = open_store(self.settings.store_url)
        self.plugins = create_plugin_manager(packages=False)
        self.http = httpx.AsyncClient(trust_env=False)
        (home / "trainer").mkdir()
        self.trainer = LocalTrainer(home / "trainer", url)


async def say(http: httpx.AsyncClient, url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Speak."}], "max_tokens": 6, "temperature": 0}
    answer = await http.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.law(5)
async def test_law_5_after_a_kill_of_vllm_every_version_speaks_again(tmp_path: Path, tiny_model: Path) -> None:
    port = pick_free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "vllm.log"
    process = start_vllm(tiny_model, port, log)
    try:
        wait_until_ready(f"{url}/health", process, log)
        ctx = Context(tmp_path, url)
        maker = TelltaleMaker(tiny_model, tmp_path / "trainer" / "made")
        spoken: dict[str, Telltale] = {}
        for agent in AGENTS:
            spoken[agent] = maker.make(agent)
            ctx.trainer.commit(agent, spoken[agent])
        await Publisher(ctx).round()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        ctx.trainer.reconciler.once()  # finds nobody there, and goes on
        process = start_vllm(tiny_model, port, log)
        wait_until_ready(f"{url}/health", process, log)
        first, second = AGENTS
        # Asked at once, before the trainer has looked again: the gateway brings the adapter back.
        assert spoken[first].speaks(await ask_through_gateway(ctx, url, first))
        with ctx.engine.connect() as c:
            assert {record.shown_state for record in store.list_versions(c)} == {"serving"}
        ctx.trainer.reconciler.once()  # and of the other one the trainer does, unasked
        assert spoken[second].speaks(await say(ctx.http, url, f"{second}@v1"))
        assert spoken[first].speaks(await say(ctx.http, url, f"{first}@v1"))
    finally:
        stop_group(process)


async def ask_through_gateway(ctx: Context, url: str, agent: str) -> str:
    """A request as the gateway sends it: planned for v1, through the transport that heals."""
    current = CurrentRequest("chat", {})
    current.plan = Plan("tr", Agent(agent, Mode.RL), Route(f"metaclaw/{agent}@v1", 1), None, None)
    CURRENT.set(current)
    transport = HealingTransport(
        httpx.AsyncHTTPTransport(), ctx.engine, InFlight(ctx.engine, "gateway"), lambda name, agent, n: None
    )
    async with httpx.AsyncClient(transport=transport) as http:
        text = await say(http, url, f"{agent}@v1")
    assert current.plan.route.adapter_version == 1
    return text
