"""Our own routes, over HTTP into the application; who calls is told by a stand-in for LiteLLM's authentication."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Header
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import SkillError, StoreError
from metaclaw_plugin.gateway.process import GatewayProcess
from metaclaw_plugin.gateway.routes import create_router
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import agents, overview, schema
from metaclaw_plugin.store.sessions import Evidence
from metaclaw_plugin.store.traces import insert_traces, load_session
from tests.store_cases import a_trace, opened

ALPHA = {"authorization": "alpha"}
BETA = {"authorization": "beta"}
POOL = {"authorization": "alpha,beta"}
NOBODY = {"authorization": ""}


def authenticate(authorization: Annotated[str, Header()] = "") -> Any:
    names = [name for name in authorization.split(",") if name]
    return SimpleNamespace(authenticated_by_custom_auth=True, metadata={"metaclaw": {"agents": names}} if names else {})


@pytest.fixture
async def client(store: Engine) -> AsyncIterator[httpx.AsyncClient]:
    with store.begin() as c:
        for name in ("alpha", "beta"):
            agents.add_agent(c, name)
        insert_traces(
            c,
            [
                a_trace(),
                a_trace(id="tr-1", response_id="chatcmpl-2", session="ses-1"),
                a_trace(id="tr-b", agent="beta", response_id="chatcmpl-b"),
            ],
        )
    app = FastAPI()
    app.include_router(create_router(authenticate, lambda: GatewayProcess(Settings(), store)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway/metaclaw/v1") as found:
        yield found


def feedback_rows(store: Engine) -> list[Any]:
    with store.connect() as c:
        return list(c.execute(sa.select(schema.feedback).order_by(schema.feedback.c.at)))


@pytest.mark.parametrize("target", [{"trace_id": "tr-0"}, {"response_id": "chatcmpl-1"}])
async def test_feedback_names_a_trace_or_a_response(
    client: httpx.AsyncClient, store: Engine, target: dict[str, str]
) -> None:
    reply = await client.post("/feedback", json={**target, "value": -0.5, "comment": "too long"}, headers=ALPHA)
    assert reply.status_code == 200
    assert (reply.json()["agent"], reply.json()["trace_id"]) == ("alpha", "tr-0")
    (row,) = feedback_rows(store)
    assert (row.agent, row.target, row.value, row.comment, row.applied_at) == ("alpha", "tr-0", -0.5, "too long", None)


async def test_feedback_before_its_trace_is_kept_for_it(client: httpx.AsyncClient, store: Engine) -> None:
    reply = await client.post("/feedback", json={"response_id": "chatcmpl-9", "value": 1}, headers=ALPHA)
    assert (reply.status_code, reply.json()["trace_id"]) == (200, None)
    assert feedback_rows(store)[0].target == "chatcmpl-9"


async def test_feedback_of_a_pool_key_goes_to_the_agent_that_answered(client: httpx.AsyncClient) -> None:
    reply = await client.post("/feedback", json={"trace_id": "tr-b", "value": 1}, headers=POOL)
    assert (reply.json()["agent"], reply.json()["trace_id"]) == ("beta", "tr-b")


@pytest.mark.law(4)
async def test_law_4_feedback_on_anothers_trace_reaches_nobody(client: httpx.AsyncClient, store: Engine) -> None:
    reply = await client.post("/feedback", json={"trace_id": "tr-b", "value": 1}, headers=ALPHA)
    assert (reply.json()["agent"], reply.json()["trace_id"]) == ("alpha", None)
    assert [row.agent for row in feedback_rows(store)] == ["alpha"]
    other = await client.post(
        "/feedback", json={"trace_id": "tr-b", "value": 1}, headers=ALPHA | {"x-agent-id": "beta"}
    )
    assert other.status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"trace_id": "tr-0"}',
        b'{"value": 1}',
        b'{"trace_id": "tr-0", "response_id": "x", "value": 1}',
        b'{"trace_id": "tr-0", "value": 1.5}',
        b'{"trace_id": "tr-0", "value": NaN}',
        b'{"trace_id": "tr-0", "value": true, "more": 1}',
        b'{"trace_id": "", "value": 1}',
        b"\xff\xfe",
    ],
)
@pytest.mark.law(9)
async def test_law_9_bad_feedback_is_400_and_changes_nothing(
    client: httpx.AsyncClient, store: Engine, body: bytes
) -> None:
    reply = await client.post("/feedback", content=body, headers=ALPHA | {"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert feedback_rows(store) == []


async def test_session_is_ended_by_our_id_or_the_clients(client: httpx.AsyncClient, store: Engine) -> None:
    with store.begin() as c:
        one = opened(c, "alpha", Evidence("x-session-id", "chat 1"), 1.0)
        two = opened(c, "alpha", Evidence("x-session-id", "chat 2"), 1.0)
    first = await client.post("/sessions/chat%201/end", headers=ALPHA)
    second = await client.post(f"/sessions/{two}/end", headers=ALPHA)
    again = await client.post(f"/sessions/{two}/end", headers=ALPHA)
    assert [reply.json() for reply in (first, second, again)] == [
        {"session": one, "closed": True},
        {"session": two, "closed": True},
        {"session": two, "closed": False},
    ]


@pytest.mark.law(4)
async def test_law_4_anothers_session_is_not_there(client: httpx.AsyncClient, store: Engine) -> None:
    with store.begin() as c:
        session = opened(c, "beta", Evidence("x-session-id", "chat"), 1.0)
    for name in (session, "chat", "nosuch"):
        reply = await client.post(f"/sessions/{name}/end", headers=ALPHA)
        assert reply.status_code == 404
    with store.connect() as c:
        assert load_session(c, session).closed_at is None


@pytest.mark.law(4)
async def test_law_4_a_pool_key_ends_the_session_of_the_agent_that_it_names(
    client: httpx.AsyncClient, store: Engine
) -> None:
    with store.begin() as c:
        alphas = opened(c, "alpha", Evidence("x-session-id", "s1"), 1.0)
        betas = opened(c, "beta", Evidence("x-session-id", "s1"), 2.0)
    reply = await client.post("/sessions/s1/end", headers=POOL | {"x-agent-id": "alpha"})
    assert reply.json() == {"session": alphas, "closed": True}
    with store.connect() as c:
        assert load_session(c, betas).closed_at is None
    again = await client.post("/sessions/s1/end", headers=POOL | {"x-agent-id": "alpha"})
    assert again.status_code == 404
    assert (await client.post("/sessions/s1/end", headers=POOL)).json()["session"] == betas


@pytest.mark.law(4)
async def test_law_4_every_route_is_held_to_the_agent_that_is_named(client: httpx.AsyncClient) -> None:
    beta = POOL | {"x-agent-id": "beta"}
    assert [row["id"] for row in (await client.get("/traces", headers=beta)).json()["data"]] == ["tr-b"]
    assert (await client.get("/traces", params={"agent": "alpha"}, headers=beta)).status_code == 404
    assert (await client.get("/traces/tr-0", headers=beta)).status_code == 404
    assert [row["agent"] for row in (await client.get("/status", headers=beta)).json()["agents"]] == ["beta"]
    late = await client.post("/feedback", json={"trace_id": "tr-0", "value": 1}, headers=beta)
    assert (late.json()["agent"], late.json()["trace_id"]) == ("beta", None)


@pytest.mark.law(4)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/sessions/s1/end"), ("GET", "/traces"), ("GET", "/traces/tr-0"), ("GET", "/status")]
)
async def test_law_4_an_agent_that_the_key_does_not_act_for_is_403(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    reply = await client.request(method, path, headers=ALPHA | {"x-agent-id": "beta"})
    assert reply.status_code == 403


@pytest.mark.law(4)
async def test_law_4_traces_are_the_callers_own(client: httpx.AsyncClient) -> None:
    mine = (await client.get("/traces", headers=ALPHA)).json()
    assert [row["id"] for row in mine["data"]] == ["tr-0", "tr-1"]
    assert (await client.get("/traces", params={"agent": "beta"}, headers=ALPHA)).status_code == 404
    assert (await client.get("/traces", headers=NOBODY)).status_code == 404
    assert (await client.get("/traces/tr-b", headers=ALPHA)).status_code == 404
    assert (await client.get("/traces/tr-b", headers=BETA)).json()["agent"] == "beta"
    assert (await client.get("/traces/chatcmpl-1", headers=ALPHA)).json()["id"] == "tr-0"


async def test_traces_come_in_pages(client: httpx.AsyncClient) -> None:
    first = (await client.get("/traces", params={"limit": 1}, headers=ALPHA)).json()
    second = (await client.get("/traces", params={"limit": 1, "after": first["after"]}, headers=ALPHA)).json()
    last = (await client.get("/traces", params={"limit": 1, "after": second["after"]}, headers=ALPHA)).json()
    assert [page["data"][0]["id"] for page in (first, second)] == ["tr-0", "tr-1"]
    assert last == {"data": [], "after": None}
    assert len((await client.get("/traces", params={"session": "ses-1"}, headers=ALPHA)).json()["data"]) == 1
    assert (await client.get("/traces", params={"limit": 0}, headers=ALPHA)).status_code == 400


async def test_status_tells_of_the_callers_agents(client: httpx.AsyncClient, store: Engine) -> None:
    with store.begin() as c:
        c.execute(schema.traces.update().where(schema.traces.c.id == "tr-0").values(reward=0.5))
        c.execute(schema.routes.insert().values(agent="alpha", version=4, changed_at=1.0))
    (alpha,) = (await client.get("/status", headers=ALPHA)).json()["agents"]
    assert (alpha["agent"], alpha["mode"], alpha["adapter_version"]) == ("alpha", "rl", 4)
    assert (alpha["traces"], alpha["recent_reward"], alpha["model"]) == (2, 0.5, "metaclaw/alpha")
    assert (await client.get("/status", headers=NOBODY)).json() == {"agents": []}


@pytest.mark.law(9)
async def test_law_9_a_store_that_fails_is_503_without_its_details(store: Engine) -> None:
    broken = sa.create_engine("sqlite:////proc/nowhere/secret.db")
    app = FastAPI()
    app.include_router(create_router(authenticate, lambda: GatewayProcess(Settings(), broken)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway/metaclaw/v1") as client:
        reply = await client.get("/status", headers=ALPHA)
    assert reply.status_code == 503
    assert "secret" not in reply.text


@pytest.mark.law(9)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreError("the store is busy"), 503),
        (sa.exc.OperationalError("select secret", {}, Exception("database is locked")), 503),
        (SkillError("what no route foresees, and names secret"), 500),
        (sa.exc.IntegrityError("insert secret", {}, Exception("not unique")), 500),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_law_9_a_fault_of_our_own_is_not_told_as_a_store_that_is_away(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(overview, "agent_overview", fail)
    reply = await client.get("/status", headers=ALPHA)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, str(status))
    assert "secret" not in reply.text
