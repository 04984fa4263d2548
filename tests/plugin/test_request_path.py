"""The way of one request, without LiteLLM: what is decided before the call, and what happens when the store is away."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Mode
from metaclaw_hooks.watching import FolderWatch
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import ForbiddenAgentError, UnknownAgentError
from metaclaw_plugin.gateway.answer import Answer
from metaclaw_plugin.gateway.current import CurrentRequest
from metaclaw_plugin.gateway.identity import CLAIM, KeyFacts
from metaclaw_plugin.gateway.limits import too_many
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.runtime import create_gateway
from metaclaw_plugin.settings import Settings, parse_settings
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.store.agents import add_agent, set_mode, set_record
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.engine import open_store

KEY = KeyFacts(ours=True, metadata={CLAIM: {"key": "k", "agents": ["alpha", "beta"]}})
# What a vLLM would take from the model's generation_config.json, if nobody said otherwise.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
INTERNAL = KeyFacts(ours=True, metadata={CLAIM: {"internal": True}})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    gateway = {"commit_timeout": 1.0, "max_messages": 3, "max_tools": 2}
    return parse_settings({"home": str(tmp_path), "gateway": gateway, "skills": {"starter": False}}, "test")


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        add_agent(c, "alpha")
        add_agent(c, "beta", Mode.SKILLS_ONLY)
    yield engine
    engine.dispose()


@pytest.fixture
def gateway(settings: Settings, engine: Engine) -> Iterator[Gateway]:
    gateway = create_gateway(settings, engine)
    yield gateway
    assert gateway.close(10)


def request(**headers: str) -> tuple[CurrentRequest, dict[str, Any]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return CurrentRequest("chat", named), {"model": "openclaw", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.law(5)
async def test_a_hook_that_hangs_lets_the_request_go_on_after_a_moment(engine: Engine, settings: Settings) -> None:
    settings.hooks_path.mkdir()
    (settings.hooks_path / "slow.py").write_text(
        "import time\ndef select_skills(agent, messages, library): time.sleep(60)\n"
    )
    assert settings.hooks.request_timeout == 2.0
    impatient = settings.model_copy(update={"hooks": settings.hooks.model_copy(update={"request_timeout": 0.1})})
    gateway = create_gateway(impatient, engine)
    current, data = request()
    started = time.monotonic()
    await gateway.prepare(current, KEY, data, listed=False)
    assert time.monotonic() - started < 10, "not a minute"
    assert current.plan is not None
    assert gateway.close(10)


@pytest.mark.parametrize("embeds", [False, True], ids=["words", "vectors"])
async def test_skills_are_never_selected_on_the_event_loop(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch, embeds: bool
) -> None:
    selected_on: list[threading.Thread] = []
    select = Retriever.select

    def noted(self: Retriever, *args: Any) -> Any:
        selected_on.append(threading.current_thread())
        return select(self, *args)

    gateway = create_gateway(settings, engine)
    monkeypatch.setattr(Retriever, "select", noted)
    monkeypatch.setattr(Retriever, "takes_long", embeds)  # an embedder is asked before the store's transaction
    current, data = request()
    await gateway.prepare(current, KEY, data, listed=False)
    assert len(selected_on) == 1
    assert selected_on[0] is not threading.current_thread()
    assert gateway.close(10)


async def test_a_hook_that_is_dropped_in_while_the_gateway_runs_is_picked_up_and_counted(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = functools.partial(FolderWatch, interval=0.02, report_every=0.02)
    monkeypatch.setattr("metaclaw_plugin.gateway.runtime.FolderWatch", quick)
    assert not settings.hooks_path.exists()
    gateway = create_gateway(settings, engine)
    settings.hooks_path.mkdir()
    (settings.hooks_path / "own.py").write_text("def select_skills(agent, messages, library): return []\n")
    deadline = time.monotonic() + 10
    counted: dict[str, int] = {}
    while not counted and time.monotonic() < deadline:
        current, data = request()
        await gateway.prepare(current, KEY, data, listed=False)
        await asyncio.sleep(0.02)
        with engine.connect() as c:
            counted = read_counters(c, "hook_calls").get("hook_calls", {})
    assert counted["own:select_skills"] >= 1
    assert gateway.close(10)


async def test_a_request_gets_its_agents_model_a_session_and_a_ticket(gateway: Gateway) -> None:
    current, data = request()
    await gateway.prepare(current, KEY, data, listed=False)
    plan = current.plan
    assert plan is not None
    assert plan.turn is not None
    assert data["model"] == "metaclaw/alpha"
    assert (plan.upstream_name, plan.route.adapter_version, plan.turn.turn) == ("metaclaw-base", 0, 0)
    assert plan.ticket is not None
    gateway.close_request(current)
    assert plan.ticket.ended


async def test_a_header_chooses_among_the_keys_agents_alone(gateway: Gateway) -> None:
    current, data = request(x_agent_id="beta")
    await gateway.prepare(current, KEY, data, listed=False)
    assert data["model"] == "metaclaw/beta"
    with pytest.raises(ForbiddenAgentError):
        await gateway.prepare(*_with_key(request(x_agent_id="gamma")), listed=False)


def _with_key(asked: tuple[CurrentRequest, dict[str, Any]]) -> tuple[CurrentRequest, KeyFacts, dict[str, Any]]:
    return asked[0], KEY, asked[1]


async def test_an_agent_that_is_gone_is_told(gateway: Gateway) -> None:
    current, data = request()
    with pytest.raises(UnknownAgentError):
        await gateway.prepare(current, KeyFacts(True, {CLAIM: {"agents": ["gone"]}}), data, listed=False)


async def test_our_own_calls_are_neither_routed_nor_kept(gateway: Gateway) -> None:
    current, data = request()
    await gateway.prepare(current, INTERNAL, data, listed=False)
    assert current.plan is None
    assert data["model"] == "openclaw"
    assert gateway.attempt(current, {"model": "m"}) == {"model": "m"}


async def test_a_listed_deployment_is_passed_through_and_kept(gateway: Gateway) -> None:
    current, data = request()
    await gateway.prepare(current, KEY, data | {"model": "cloud"}, listed=True)
    assert current.plan is not None
    assert (current.plan.on_own_model, current.plan.upstream_name) == (False, "cloud")
    assert current.plan.ticket is None


@pytest.mark.parametrize("how", ["header", "agent", "mode"])
async def test_what_is_not_to_be_kept_is_routed_and_nothing_more(gateway: Gateway, engine: Engine, how: str) -> None:
    with engine.begin() as c:
        if how == "agent":
            set_record(c, "alpha", False)
        elif how == "mode":
            set_mode(c, "alpha", Mode.OFF)
    current, data = request(**({"x_metaclaw_record": "No"} if how == "header" else {}))
    await gateway.prepare(current, KEY, data, listed=False)
    assert current.plan is not None
    assert current.plan.turn is None
    call = gateway.attempt(current, {"model": "hosted_vllm/alpha"})
    assert call == {"model": "hosted_vllm/alpha"}
    assert current.recording is not None
    assert (current.recording.kept, current.recording.model) == (False, "metaclaw-base")
    with engine.connect() as c:
        assert c.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0


@pytest.mark.parametrize(
    ("agent", "asked", "added"),
    [
        ("alpha", {}, {"temperature": 1.0, "top_p": 1.0, **PLAIN, "logprobs": True}),
        ("alpha", {"temperature": 0.0, "top_p": 0.5}, {**PLAIN, "logprobs": True}),
        ("alpha", {"temperature": 1, "extra_body": {"top_p": 1, **PLAIN, "top_k": 5}}, {"logprobs": True}),
        ("beta", {}, {"logprobs": True}),
        ("alpha", {"temperature": 1, "top_p": 1, **PLAIN, "top_logprobs": 3}, {}),
        ("alpha", {"temperature": 1, "top_p": 1, **PLAIN, "top_k": 7, "top_logprobs": 3, "logprobs": True}, {}),
    ],
)
async def test_an_attempt_asks_for_what_capture_needs_and_for_defaults(
    gateway: Gateway, agent: str, asked: dict[str, Any], added: dict[str, Any]
) -> None:
    current, data = request(x_agent_id=agent)
    await gateway.prepare(current, KEY, data, listed=False)
    assert gateway.attempt(current, {"model": "m", **asked}) == {
        "model": "m",
        **asked,
        **added,
        "return_token_ids": True,
    }


@pytest.mark.law(5)
async def test_when_the_store_does_not_answer_the_request_goes_out_and_is_counted(
    gateway: Gateway, settings: Settings
) -> None:
    lock = sqlite3.connect(settings.home / "metaclaw.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        current, data = request()
        await gateway.prepare(current, KEY, data, listed=False)
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert current.plan is not None
    assert (current.plan.turn, current.plan.upstream_name, data["model"]) == (None, "metaclaw-base", "metaclaw/alpha")
    assert b'name="requests_unrecorded"' in gateway.metrics.render()


@pytest.mark.law(5)
async def test_a_virtual_key_is_taken_for_what_it_was_while_the_store_does_not_answer(
    gateway: Gateway, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = KeyFacts(ours=False, metadata={"agent_id": "ann-notes"}, user_id="ann")
    stranger = KeyFacts(ours=False, metadata={"agent_id": "ann-notes"}, user_id="eve")
    current, data = request()
    await gateway.prepare(current, key, data, listed=False)
    monkeypatch.setattr("metaclaw_plugin.gateway.keys.FRESH", 0.0)
    lock = sqlite3.connect(settings.home / "metaclaw.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        current, data = request()
        await gateway.prepare(current, key, data, listed=False)
        with pytest.raises(TimeoutError):
            await gateway.prepare(request()[0], stranger, request()[1], listed=False)
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert current.plan is not None
    assert (current.plan.agent.name, current.plan.turn, data["model"]) == ("ann-notes", None, "metaclaw/ann-notes")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"messages": [{}] * 4}, "4 messages"),
        ({"input": [{}] * 4}, "4 input"),
        ({"tools": [{}] * 3}, "3 tools"),
    ],
)
def test_limits_say_what_there_is_too_much_of(settings: Settings, data: dict[str, Any], said: str) -> None:
    assert said in (too_many(data, settings.gateway) or "")


@pytest.mark.parametrize("data", [{}, {"messages": [{}] * 3, "tools": [{}] * 2, "input": "x" * 1000}, {"messages": 7}])
def test_what_is_within_limits_passes(settings: Settings, data: dict[str, Any]) -> None:
    assert too_many(data, settings.gateway) is None


@pytest.mark.parametrize(("status", "stored"), [(200, 1), (500, 0)])
async def test_what_the_client_never_got_is_not_kept(
    gateway: Gateway, engine: Engine, status: int, stored: int
) -> None:
    current, data = request()
    await gateway.prepare(current, KEY, data, listed=False)
    gateway.attempt(current, {"model": "m"})
    assert current.recording is not None
    current.recording.status = 200
    choice = {"index": 0, "message": {"role": "assistant", "content": "ho"}, "finish_reason": "stop"}
    current.recording.reply.add_body({"id": "r", "choices": [choice]})
    current.recording.end()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        with engine.connect() as c:
            sent.append((message["type"], c.exec_driver_sql("SELECT count(*) FROM traces").scalar()))

    answer = Answer(current, gateway, send)
    await answer.take({"type": "http.response.start", "status": status, "headers": []})
    await answer.take({"type": "http.response.body", "body": b"{}"})
    gateway.close_request(current)
    assert sent == [("http.response.start", 0), ("http.response.body", stored)]


@pytest.mark.parametrize(
    ("status", "tapped", "said"),
    [
        (404, None, ["a request of alpha was answered 404 past LiteLLM's hook before the call"]),
        (404, False, ["a request of alpha was answered 404 past the tap"]),
        (404, True, []),  # vLLM's own answer to the version that it was asked for
        (400, None, []),  # LiteLLM's own answer, before any call
    ],
)
@pytest.mark.parametrize("dialect", ["chat", "messages", "responses"])
async def test_a_404_that_did_not_pass_the_tap_is_reported(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, status: int, tapped: bool | None, said: list[str], dialect: str
) -> None:
    current, data = CurrentRequest(dialect, {}), request()[1]
    await gateway.prepare(current, KEY, data, listed=False)
    if tapped is not None:
        gateway.attempt(current, {"model": "hosted_vllm/alpha"})
        assert current.recording is not None
        current.recording.status = 404 if tapped else None

    async def send(_: object) -> None:
        return

    await Answer(current, gateway, send).take({"type": "http.response.start", "status": status, "headers": []})
    assert [r.getMessage() for r in caplog.records if "404" in r.getMessage()] == said
