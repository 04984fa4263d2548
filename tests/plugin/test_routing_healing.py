"""An adapter that vLLM forgot: loaded again and asked once more, or another version answers and says so."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Agent, Mode, VersionState
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest, Plan
from metaclaw_plugin.gateway.healing import HealingTransport
from metaclaw_plugin.gateway.routing import InFlight, Route
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import in_flight
from tests.publishing_cases import serve, version_body


@dataclass
class Upstream:
    """Answers as vLLM 0.32 does, as far as adapters go."""

    held: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        sent = json.loads(request.content)
        if request.url.path == "/v1/load_lora_adapter":
            name = sent["lora_name"]
            self.asked.append(f"load {name} from {sent['lora_path']}")
            if name in self.broken:
                return httpx.Response(404, json={"error": {"message": "No adapter found"}})
            if name in self.held:
                return httpx.Response(
                    400, json={"error": {"message": f"The lora adapter '{name}' has already been loaded"}}
                )
            self.held.add(name)
            return httpx.Response(200, text=f"Success: LoRA adapter '{name}' added successfully.")
        self.asked.append(sent["model"])
        if sent["model"] in self.held | {"metaclaw-base"}:
            return httpx.Response(200, json={"model": sent["model"]})
        return httpx.Response(404, json={"error": {"message": f"The model `{sent['model']}` does not exist."}})


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        serve(c, 1)
        serve(c, 2)
    return engine


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def counted() -> dict[str, int]:
    return {}


@pytest.fixture
def client(engine: Engine, upstream: Upstream, counted: dict[str, int]) -> httpx.AsyncClient:
    def count(name: str, agent: str, n: int) -> None:
        counted[name] = counted.get(name, 0) + n

    transport = HealingTransport(httpx.MockTransport(upstream), engine, InFlight(engine, "p1"), count)
    return httpx.AsyncClient(transport=transport, base_url="http://vllm")


@pytest.fixture
def current(engine: Engine) -> CurrentRequest:
    current = CurrentRequest("chat", {})
    current.plan = Plan("tr-1", Agent("ada", Mode.RL), Route("metaclaw/ada@v2", 2), None, None)
    return current


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": model, "messages": []})


@pytest.mark.law(5)
async def test_law_5_a_forgotten_adapter_is_loaded_again_and_the_request_answered(
    client: httpx.AsyncClient, upstream: Upstream, counted: dict[str, int], current: CurrentRequest
) -> None:
    CURRENT.set(current)
    answer = await ask(client, "ada@v2")
    assert (answer.status_code, answer.json()) == (200, {"model": "ada@v2"})
    assert upstream.asked == ["ada@v2", "load ada@v2 from /versions/ada/2", "ada@v2"]
    assert counted == {"adapters_reloaded": 1}
    assert current.plan is not None
    assert current.plan.route.adapter_version == 2


@pytest.mark.law(6)
async def test_law_6_what_cannot_be_loaded_is_answered_by_the_last_good_version_and_the_request_says_so(
    client: httpx.AsyncClient, upstream: Upstream, counted: dict[str, int], engine: Engine, current: CurrentRequest
) -> None:
    CURRENT.set(current)
    upstream.broken = {"ada@v2"}
    assert (await ask(client, "ada@v2")).json() == {"model": "ada@v1"}
    assert current.plan is not None
    assert current.plan.route == Route("metaclaw/ada@v1", 1, left=2)
    assert counted == {"adapters_reloaded": 1, "adapter_fallbacks": 1}
    with engine.connect() as c:  # v1 is held for as long as this request is in flight
        assert c.execute(sa.select(in_flight.c.version, in_flight.c.requests)).all() == [(1, 1)]


async def test_when_no_version_can_be_loaded_the_base_model_answers(
    client: httpx.AsyncClient, upstream: Upstream, current: CurrentRequest
) -> None:
    CURRENT.set(current)
    upstream.broken = {"ada@v1", "ada@v2"}
    assert (await ask(client, "ada@v2")).json() == {"model": "metaclaw-base"}
    assert current.plan is not None
    assert current.plan.route.adapter_version == 0


async def test_a_version_that_was_retired_meanwhile_is_not_moved_to(
    client: httpx.AsyncClient, upstream: Upstream, engine: Engine, current: CurrentRequest
) -> None:
    CURRENT.set(current)
    upstream.broken = {"ada@v2"}
    with engine.begin() as c:
        store.set_state(c, "ada", 1, VersionState.RETIRED)
    assert (await ask(client, "ada@v2")).json() == {"model": "metaclaw-base"}


async def test_a_404_that_is_about_no_adapter_passes_untouched(client: httpx.AsyncClient, upstream: Upstream) -> None:
    answer = await ask(client, "some-model")
    assert (answer.status_code, upstream.asked) == (404, ["some-model"])
    assert "does not exist" in answer.json()["error"]["message"]


@pytest.mark.law(4)
async def test_law_4_no_other_agents_version_ever_stands_in(
    client: httpx.AsyncClient, upstream: Upstream, engine: Engine, current: CurrentRequest
) -> None:
    CURRENT.set(current)
    with engine.begin() as c:
        store.record_candidate(c, version_body(9, "bob"))
        store.set_state(c, "bob", 9, VersionState.SERVING)
    upstream.held, upstream.broken = {"bob@v9"}, {"ada@v1", "ada@v2"}
    assert (await ask(client, "ada@v2")).json() == {"model": "metaclaw-base"}
