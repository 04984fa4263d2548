"""Idle windows, as a real gateway and a real store see traffic: what is not kept is traffic as well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.current import CurrentRequest
from metaclaw_plugin.gateway.heartbeat import HEARTBEAT
from metaclaw_plugin.gateway.identity import CLAIM, KeyFacts
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.runtime import create_gateway
from metaclaw_plugin.settings import parse_settings
from metaclaw_plugin.store.agents import add_agent, remove_agent, set_record, set_settings
from metaclaw_plugin.store.last_requests import ANYONE, CLOCKS_DIFFER, note_requests, read_last_requests
from metaclaw_plugin.store.schema import sessions
from tests.windows_cases import Context, make_context

IDLE = 60.0  # seconds


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    """``ada`` waits until nobody asks for anything, ``own`` until nobody asks her."""
    ctx = make_context(tmp_path)
    with ctx.engine.begin() as c:
        for name, scope in (("ada", "all"), ("own", "agent")):
            add_agent(c, name, Mode.AUTO)
            set_settings(c, name, {"windows": {"idle_after": IDLE, "idle_scope": scope}})
        for name in ("off", "unrecorded", "kept"):
            add_agent(c, name, Mode.OFF if name == "off" else Mode.SKILLS_ONLY)
        set_record(c, "unrecorded", record=False)
    return ctx


@pytest.fixture
def gateway(ctx: Context, tmp_path: Path) -> Iterator[Gateway]:
    gateway = create_gateway(parse_settings({"home": str(tmp_path), "skills": {"starter": False}}, "test"), ctx.engine)
    yield gateway
    assert gateway.close(10)


async def begin(gateway: Gateway, agent: str | None, **headers: str) -> CurrentRequest:
    claim = {"key": "k", "agents": [agent] if agent else []} | ({"internal": True} if agent == "our judge" else {})
    current = CurrentRequest("chat", {name.replace("_", "-"): value for name, value in headers.items()})
    gateway.open_request()
    data = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
    await gateway.prepare(current, KeyFacts(ours=True, metadata={CLAIM: claim}), data, listed=agent is None)
    return current


async def is_open(ctx: Context, after: float) -> dict[str, bool]:
    """Of both agents, ``after`` seconds from now."""
    ctx.now = time.time() + after
    found = await ctx.modes.permissions()
    return {name: found[name].open for name in ("ada", "own")}


@pytest.mark.parametrize(
    ("agent", "headers"),
    [("off", {}), ("unrecorded", {}), ("kept", {"x_metaclaw_record": "no"}), ("kept", {}), (None, {})],
    ids=["mode off", "recording off", "x-metaclaw-record", "recorded", "no agent"],
)
async def test_what_is_not_kept_is_traffic_too(
    ctx: Context, gateway: Gateway, agent: str | None, headers: dict[str, str]
) -> None:
    assert await is_open(ctx, 0) == {"ada": True, "own": True}
    gateway.close_request(await begin(gateway, agent, **headers))
    gateway.traffic.flush()
    assert await is_open(ctx, 0) == {"ada": False, "own": True}
    assert await is_open(ctx, IDLE - 5) == {"ada": False, "own": True}
    assert await is_open(ctx, IDLE + 1) == {"ada": True, "own": True}
    with ctx.engine.connect() as c:
        assert set(read_last_requests(c)) == {ANYONE, *([agent] if agent else [])}
        assert (c.scalar(sa.select(sessions.c.agent)) == "kept") is (agent == "kept" and not headers)


async def test_an_agents_own_requests_keep_it_waiting_until_the_last_has_ended(ctx: Context, gateway: Gateway) -> None:
    current = await begin(gateway, "own")
    gateway.traffic.flush()
    with ctx.engine.begin() as c:
        note_requests(c, {"own": time.time() - CLOCKS_DIFFER - 1, ANYONE: time.time() - CLOCKS_DIFFER - 1})
    gateway.traffic.flush()  # it is still on its way
    assert await is_open(ctx, 0) == {"ada": False, "own": False}
    gateway.close_request(current)
    gateway.traffic.flush()
    assert await is_open(ctx, 0) == {"ada": False, "own": False}
    assert await is_open(ctx, IDLE + 1) == {"ada": True, "own": True}


async def test_our_own_judge_keeps_nobody_waiting(ctx: Context, gateway: Gateway) -> None:
    gateway.close_request(await begin(gateway, "our judge"))
    gateway.traffic.flush()
    assert await is_open(ctx, 0) == {"ada": True, "own": True}


async def test_the_heartbeat_writes_one_row_for_each_agent_and_no_request_does(ctx: Context, gateway: Gateway) -> None:
    writes: list[str] = []
    sa.event.listen(ctx.engine, "before_cursor_execute", lambda *given: writes.append(given[2]))
    began = time.monotonic()
    for _ in range(20):
        gateway.close_request(await begin(gateway, "off"))
        gateway.close_request(await begin(gateway, "kept", x_metaclaw_record="no"))
    while not any("INSERT INTO last_requests" in line for line in writes):
        assert time.monotonic() - began < 60, "nothing beats"
        await asyncio.sleep(0.05)
    await asyncio.sleep(HEARTBEAT / 2)
    beats = (time.monotonic() - began) / HEARTBEAT + 1
    assert sum("INSERT INTO last_requests" in line for line in writes) <= 3 * beats
    with ctx.engine.begin() as c:
        assert set(read_last_requests(c)) == {ANYONE, "off", "kept"}
        remove_agent(c, "off")
        assert set(read_last_requests(c)) == {ANYONE, "kept"}


def test_the_newest_request_stands_unless_a_clock_was_set_back(store: Engine) -> None:
    with store.begin() as c:
        for at, stands in ((1000.0, 1000.0), (990.0, 1000.0), (1010.0, 1010.0), (900.0, 900.0)):
            note_requests(c, {"ada": at})
            assert read_last_requests(c) == {"ada": stands}
