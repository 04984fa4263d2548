"""The publisher against a trainer's port: every step once, in order, and again after a kill anywhere."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
import pytest
from metaclaw_hooks.types import Kind

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.gateway.routing import InFlight, pick_route
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.trainer_client import TrainerClient
from metaclaw_plugin.worker.heartbeats import HeartbeatWatch
from metaclaw_plugin.worker.publishing import Publisher
from tests.publishing_cases import Context, Killed, Turn, context, route, states


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(tmp_path)


async def test_a_new_version_serves_and_the_old_one_is_unloaded(ctx: Context) -> None:
    publisher = Publisher(ctx)
    ctx.trainer.make(1)
    await publisher.round()
    assert (route(ctx), ctx.trainer.held, ctx.plugins.published) == (1, ["ada@v1"], ["ada@v1"])
    ctx.trainer.make(2)
    await publisher.round()
    assert (route(ctx), states(ctx)) == (2, {1: "retired", 2: "serving"})
    assert ctx.trainer.history[-2:] == [["ada@v1", "ada@v2"], ["ada@v2"]]  # both, then the new one alone
    assert ctx.plugins.published == ["ada@v1", "ada@v2"]


@pytest.mark.law(5)
async def test_law_5_publishing_waits_for_requests_and_no_request_waits_for_it(ctx: Context) -> None:
    publisher, flights = Publisher(ctx), InFlight(ctx.engine)
    ctx.trainer.make(1)
    await publisher.round()
    with ctx.engine.begin() as c:
        ticket = flights.begin(c, "ada", pick_route(c, "ada", Turn(kind=Kind.SIDE)).adapter_version)
    ctx.trainer.make(2)
    await publisher.round()
    await publisher.round()
    with ctx.engine.begin() as c:
        assert pick_route(c, "ada", Turn(kind=Kind.SIDE)).adapter_version == 2
    assert ctx.trainer.held == ["ada@v1", "ada@v2"]
    flights.end(ticket)
    flights.flush()
    await publisher.round()
    assert ctx.trainer.held == ["ada@v2"]


async def test_a_new_version_ends_the_pause_between_two_rounds(ctx: Context) -> None:
    publisher = Publisher(ctx)
    ctx.trainer.make(1)
    await publisher.round()
    started = time.monotonic()
    await publisher.wait_for_news(0.05)  # nothing comes: the whole pause
    assert time.monotonic() - started >= 0.05
    pause = asyncio.create_task(publisher.wait_for_news(20.0))
    await asyncio.sleep(0.02)
    ctx.trainer.make(2)
    await asyncio.wait_for(pause, 5)
    await publisher.round()
    with ctx.engine.connect() as c:
        assert store.get_route(c, "ada").version == 2


@pytest.mark.law(5)
async def test_a_round_reads_as_little_however_many_versions_there_were(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    real = store._record
    monkeypatch.setattr(store, "_record", lambda row: read.append(row.number) or real(row))
    publisher, cost = Publisher(ctx), []
    for number in range(1, 31):
        ctx.trainer.make(number)
        read.clear()
        await publisher.round()
        await publisher.round()
        cost.append(len(read))
    assert states(ctx)[30] == "serving"
    assert cost[29] == cost[4]


async def test_when_several_versions_wait_only_the_newest_is_loaded(ctx: Context) -> None:
    for number in range(1, 6):
        ctx.trainer.make(number)
    await Publisher(ctx).round()
    assert states(ctx) == {1: "retired", 2: "retired", 3: "retired", 4: "retired", 5: "serving"}
    assert ctx.trainer.history[0] == ["ada@v5"]


async def test_what_cannot_be_loaded_is_a_problem_shown_and_the_serving_version_goes_on(ctx: Context) -> None:
    publisher = Publisher(ctx)
    ctx.trainer.make(1)
    await publisher.round()
    ctx.trainer.make(2)
    ctx.trainer.broken["ada@v2"] = "adapter_model.safetensors is cut off"
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "candidate"})
    with ctx.engine.connect() as c:
        assert store.get_version(c, "ada", 2).problem == "adapter_model.safetensors is cut off"
    ctx.trainer.broken.clear()
    await publisher.round()
    assert route(ctx) == 2
    with ctx.engine.connect() as c:
        assert store.get_version(c, "ada", 2).problem is None


async def test_a_vetoed_version_is_rejected_and_the_trainer_goes_back(ctx: Context) -> None:
    publisher = Publisher(ctx)
    ctx.trainer.make(1)
    await publisher.round()
    ctx.plugins.opinions = [("guard", False), ("other", True)]
    ctx.trainer.make(2)
    await publisher.round()
    ctx.plugins.opinions = []
    ctx.trainer.make(3)  # trained from 2 before the trainer heard of it
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})
    assert ctx.trainer.heads == [("ada", 1)]
    ctx.trainer.make(4, parent=1)
    await publisher.round()
    assert route(ctx) == 4
    with ctx.engine.connect() as c:
        decision = store.get_version(c, "ada", 2).decision
    assert decision is not None
    assert decision["sentence"] == "v2: the policy is always, rejected: vetoed by guard"
    assert decision["vetoes"] == ["guard"]


async def test_a_trainer_that_is_down_stops_no_draining(ctx: Context) -> None:
    publisher, flights = Publisher(ctx), InFlight(ctx.engine)
    ctx.trainer.make(1)
    await publisher.round()
    with ctx.engine.begin() as c:
        ticket = flights.begin(c, "ada", 1)
    ctx.trainer.make(2)
    await publisher.round()
    ctx.trainer.down = True
    flights.end(ticket)
    flights.flush()
    with pytest.raises(TrainerUnavailableError):
        await publisher.round()
    assert states(ctx) == {1: "retired", 2: "serving"}
    ctx.trainer.down = False
    await publisher.round()
    assert ctx.trainer.held == ["ada@v2"]


@pytest.mark.law(3)
@pytest.mark.parametrize("kill_at", range(1, 9))
async def test_law_3_a_kill_at_any_call_changes_nothing_in_the_end(ctx: Context, kill_at: int) -> None:
    ctx.trainer.kill_at = kill_at
    publisher = Publisher(ctx)
    for number in (1, 2):
        ctx.trainer.make(number)
        try:
            await publisher.round()
        except Killed:
            publisher = Publisher(ctx)
    for _ in range(2):
        try:
            await publisher.round()
        except Killed:
            publisher = Publisher(ctx)
    assert (route(ctx), states(ctx)[2]) == (2, "serving")
    assert states(ctx)[1] == "retired"
    assert ctx.trainer.held == ["ada@v2"]


async def test_two_publishers_at_once_do_no_more_than_one(ctx: Context) -> None:
    first, second = Publisher(ctx), Publisher(ctx)
    ctx.trainer.make(1)
    await first._read_new()
    await second._read_new()
    await first._reconcile()
    await second._reconcile()
    await first._judge()
    await second._judge()
    assert states(ctx) == {1: "serving"}
    assert route(ctx) == 1


@pytest.mark.law(4)
async def test_law_4_publishing_one_agent_leaves_the_others_where_they_are(ctx: Context) -> None:
    publisher = Publisher(ctx)
    ctx.trainer.make(1, "ada")
    ctx.trainer.make(1, "bob", parent=0)
    await publisher.round()
    ctx.trainer.make(2, "ada")
    await publisher.round()
    assert (route(ctx, "ada"), route(ctx, "bob")) == (2, 1)
    assert states(ctx, "bob") == {1: "serving"}
    assert ctx.trainer.held == ["ada@v2", "bob@v1"]


def test_a_process_is_dead_when_its_stamp_stands_still_whatever_the_stamps_say() -> None:
    now = [100.0]
    watch = HeartbeatWatch(30.0, clock=lambda: now[0])
    assert watch.dead({"a": 5.0, "b": 9e9}) == []
    now[0] += 29.0
    assert watch.dead({"a": 4.0, "b": 9e9}) == []  # a lives, though its clock went back
    now[0] += 2.0
    assert watch.dead({"a": 4.0, "b": 9e9}) == ["b"]
    assert watch.dead({"a": 4.0}) == []
    assert watch.dead({"a": 4.0, "b": 9e9}) == []  # seen anew: watched anew


async def test_the_trainer_is_told_what_to_load_and_what_to_keep() -> None:
    told: list[object] = []

    def trainer(request: httpx.Request) -> httpx.Response:
        told.append((request.method, request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"held": ["ada@v2"], "failed": []})

    async with httpx.AsyncClient(transport=httpx.MockTransport(trainer)) as http:
        await TrainerClient(http, "http://trainer").set_served(["ada@v2"], ["ada@v1"])
    assert told == [("PUT", "/v1/served", {"versions": ["ada@v2"], "keep": ["ada@v1"]})]
