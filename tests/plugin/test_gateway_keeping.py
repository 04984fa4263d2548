"""What is kept of an answer when its client leaves, when recording it failed, and when the store is full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.answer import Answer
from metaclaw_plugin.gateway.current import CurrentRequest
from metaclaw_plugin.gateway.identity import CLAIM, KeyFacts
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.runtime import create_gateway
from metaclaw_plugin.settings import Settings, parse_settings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import STORED_BYTES, iter_traces, stored_bytes

KEY = KeyFacts(ours=True, metadata={CLAIM: {"key": "k", "agents": ["alpha"]}})
SKILL = "---\nname: be-terse\ndescription: answer about rain in few words\n---\nBe terse about rain.\n"
GROWING = (schema.sessions, schema.injections, schema.skill_exposures, schema.traces)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    skill = tmp_path / "skills" / "_shared" / "be-terse" / "SKILL.md"
    skill.parent.mkdir(parents=True)
    skill.write_text(SKILL)
    raw = {"home": str(tmp_path), "skills": {"starter": False, "withheld_share": 0.0, "min_relevance": 0.0}}
    return parse_settings(raw | {"sessions": {"held_out_one_in": 0}}, "test")


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        add_agent(c, "alpha", Mode.SKILLS_ONLY)
    yield engine
    engine.dispose()


@pytest.fixture
def gateway(settings: Settings, engine: Engine) -> Iterator[Gateway]:
    gateway = create_gateway(settings, engine)
    yield gateway
    assert gateway.close(10)


def with_quota(settings: Settings, engine: Engine, max_bytes: int) -> Gateway:
    store = settings.store.model_copy(update={"max_bytes": max_bytes})
    return create_gateway(settings.model_copy(update={"store": store}), engine)


async def asked(gateway: Gateway, *messages: dict[str, Any]) -> tuple[CurrentRequest, dict[str, Any]]:
    """A request on its way, answered by "ho"."""
    current, data = CurrentRequest("chat", {}), {"model": "openclaw", "messages": list(messages)}
    await gateway.prepare(current, KEY, data, listed=False)
    gateway.attempt(current, {"model": "m"})
    recording = current.recording
    assert recording is not None
    if recording.kept:
        recording.status = 200
        choice = {"index": 0, "message": {"role": "assistant", "content": "ho"}, "finish_reason": "stop"}
        recording.reply.add_body({"id": "r", "choices": [choice]})
        recording.complete = True
    recording.end()
    return current, data


async def answered(gateway: Gateway, *messages: dict[str, Any]) -> tuple[CurrentRequest, dict[str, Any]]:
    current, data = await asked(gateway, *messages)
    await gateway.commit(current)
    gateway.close_request(current)
    return current, data


def says(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


HO = {"role": "assistant", "content": "ho"}


def rows(engine: Engine) -> list[int]:
    """How many rows each of the tables has that must not grow past the quota."""
    with engine.connect() as c:
        return [c.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in GROWING]


@pytest.mark.law(3)
async def test_law_3_a_client_that_leaves_while_a_plugin_thinks_leaves_its_trace(
    gateway: Gateway, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking, calls = asyncio.Event(), 0

    async def call_first(_: Plugins, hook: str, **__: Any) -> None:
        nonlocal calls
        calls += 1
        if hook == "redact_trace" and calls == 1:
            thinking.set()
            await asyncio.sleep(60)

    current, _ = await asked(gateway, says("hi"))
    monkeypatch.setattr(Plugins, "call_first", call_first)
    stream = asyncio.create_task(gateway.commit(current))
    await thinking.wait()
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream
    gateway.close_request(current)
    await asyncio.sleep(0.05)
    assert gateway.close(10)
    with engine.connect() as c:
        assert [trace.response["content"] for trace in iter_traces(c)] == ["ho"]


@pytest.mark.law(5)
async def test_a_process_that_ends_while_a_plugin_thinks_counts_the_loss(
    gateway: Gateway, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call_first(*_: Any, **__: Any) -> None:
        await asyncio.sleep(60)

    current, _ = await asked(gateway, says("hi"))
    monkeypatch.setattr(Plugins, "call_first", call_first)
    others = asyncio.all_tasks()
    gateway.close_request(current)
    [background] = asyncio.all_tasks() - others
    await asyncio.sleep(0.01)
    background.cancel()
    await asyncio.wait([background])
    assert gateway.close(10)
    with engine.connect() as c:
        assert read_counters(c, "traces_lost") == {"traces_lost": {"alpha": 1}}


@pytest.mark.law(5)
async def test_an_answer_that_makes_no_trace_reaches_the_client_and_is_counted(
    gateway: Gateway, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(*_: object) -> None:
        raise TypeError("secret words of somebody")

    monkeypatch.setattr("metaclaw_plugin.gateway.keeping.traces_of", odd)
    current, _ = await asked(gateway, says("hi"))
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    answer = Answer(current, gateway, send)
    await answer.take({"type": "http.response.start", "status": 200, "headers": []})
    await answer.take({"type": "http.response.body", "body": b"{}"})
    gateway.close_request(current)
    assert sent == ["http.response.start", "http.response.body"]
    [said] = [record.getMessage() for record in caplog.records if "makes no trace" in record.getMessage()]
    assert said.startswith("an answer to alpha makes no trace: TypeError in odd; ")
    assert gateway.close(10)
    assert 'name="traces_lost"} 1.0' in gateway.metrics.render().decode()


@pytest.mark.law(5)
async def test_an_answer_whose_recording_failed_is_counted_and_said_once(
    gateway: Gateway, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    current, _ = await asked(gateway, says("hi"))
    assert current.recording is not None
    current.recording.reply.failure = "AttributeError in somewhere"
    await gateway.commit(current)
    gateway.close_request(current)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "an answer to alpha makes no trace: AttributeError in somewhere"
    ]
    assert gateway.close(10)
    assert rows(engine)[-1] == 0
    with engine.connect() as c:
        assert read_counters(c, "traces_lost") == {"traces_lost": {"alpha": 1}}


@pytest.mark.law(5)
async def test_past_its_quota_the_store_grows_no_more_and_it_shows(settings: Settings, engine: Engine) -> None:
    gateway = with_quota(settings, engine, 1)
    await answered(gateway, says("rain?"))
    before = rows(engine)
    assert before[-1] == 0
    for n in range(5):
        current, data = await answered(gateway, says(f"rain {n}?"))
        assert current.plan is not None
        assert (current.plan.turn, current.plan.over_quota, data["messages"]) == (
            None,
            True,
            [says(f"rain {n}?")],
        )
    assert gateway.close(10)
    assert rows(engine) == before
    with engine.connect() as c:
        assert read_counters(c, "traces_over_quota") == {"traces_over_quota": {"alpha": 6}}
        assert stored_bytes(c) == 0
    page = gateway.metrics.render().decode()
    assert 'metaclaw_events_total{agent="alpha",name="traces_over_quota"} 6.0' in page
    assert 'metaclaw_commit_seconds_count{stored="over_quota"} 1.0' in page


@pytest.mark.law(7)
async def test_law_7_a_session_keeps_its_place_and_its_skills_past_the_quota_and_after_it(
    settings: Settings, engine: Engine
) -> None:
    plenty = create_gateway(settings, engine)
    first, shown = await answered(plenty, says("rain?"))
    assert plenty.close(10)
    block = shown["messages"][0]
    assert "Be terse" in block["content"]
    with engine.connect() as c:
        gateway = with_quota(settings, engine, stored_bytes(c))
    before = rows(engine)
    talk = [says("rain?"), HO]
    for n in range(3):
        talk.append(says(f"and rain number {n}?"))
        current, data = await answered(gateway, *talk)
        assert current.plan is not None
        assert current.plan.turn is not None
        assert current.plan.over_quota
        assert (current.plan.turn.turn, data["messages"]) == (n + 1, [block, *talk])
        talk.append(HO)
    assert rows(engine) == before
    assert gateway.close(10)
    roomy = create_gateway(settings, engine)
    talk.append(says("and rain now?"))
    current, data = await answered(roomy, *talk)
    assert roomy.close(10)
    assert current.plan is not None
    assert current.plan.turn is not None
    assert first.plan is not None
    assert first.plan.turn is not None
    assert (current.plan.turn.session, current.plan.turn.turn) == (first.plan.turn.session, 4)
    assert data["messages"] == [block, *talk]
    with engine.connect() as c:
        assert [trace.turn for trace in iter_traces(c)] == [0, 4]
        assert set(read_counters(c)) == {"traces_over_quota", STORED_BYTES}
