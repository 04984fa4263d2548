"""A canary: a share of new sessions, a trial by live rewards, and an end either way."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Kind

from metaclaw_plugin.gateway.routing import pick_route
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.schema import routes, traces
from metaclaw_plugin.store.traces import insert_traces
from metaclaw_plugin.store.wishes import promote, rollback
from metaclaw_plugin.worker.canary import welch_difference
from metaclaw_plugin.worker.publishing import Publisher
from tests.publishing_cases import Context, Turn, context, in_trial, published, route, states
from tests.session_cases import add_session
from tests.store_cases import a_trace


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(tmp_path)


@pytest.fixture
async def trial(ctx: Context) -> Publisher:
    """v1 serves, v2 is on trial."""
    in_trial(ctx)
    publisher = await published(ctx, 1, 2)
    with ctx.engine.begin() as c:
        assert store.get_route(c, "ada").canary == 2
    return publisher


def earn(ctx: Context, version: int, rewards: list[float]) -> None:
    with ctx.engine.begin() as c:
        for number, reward in enumerate(rewards):
            name = f"{version}-{number}-{random.random()}"
            trace = replace(a_trace(id=name), agent="ada", adapter_version=version, started_at=time.time())
            insert_traces(c, [trace])
            c.execute(traces.update().where(traces.c.id == name).values(reward=reward, score="scored"))


def test_the_interval_covers_the_truth_though_sides_differ_in_size_and_spread() -> None:
    dice = random.Random(3)
    hits = 0
    for _ in range(2000):
        mine = [dice.gauss(0.2, 1.5) for _ in range(8)]
        found = welch_difference(mine, [dice.gauss(0.0, 0.3) for _ in range(25)])
        assert found is not None
        hits += abs(found.mean - 0.2) <= found.half_width
    assert 0.935 < hits / 2000 < 0.965
    assert welch_difference([1.0], [0.0, 1.0]) is None


async def test_the_share_of_new_sessions_is_tried_and_old_ones_stay(ctx: Context, trial: Publisher) -> None:
    with ctx.engine.begin() as c:
        for number in range(1000):
            add_session(c, f"new-{number}")
        add_session(c, "old")
        c.execute(sa.text("UPDATE sessions SET started_at = 1 WHERE id LIKE 'old%'"))
        picked = [pick_route(c, "ada", Turn(session=f"new-{n}")).adapter_version for n in range(1000)]
        again = [pick_route(c, "ada", Turn(session=f"new-{n}")).adapter_version for n in range(1000)]
        side = [pick_route(c, "ada", Turn(session=f"new-{n}", kind=Kind.SIDE)).adapter_version for n in range(50)]
        old = pick_route(c, "ada", Turn(session="old")).adapter_version
    assert 250 < picked.count(2) < 350
    assert picked == again  # a session stays on its side
    assert (set(side), old) == ({1}, 1)


async def test_a_canary_that_earns_more_is_promoted(ctx: Context, trial: Publisher) -> None:
    await trial.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "serving"})
    earn(ctx, 1, [0.0, 0.1] * 4)
    earn(ctx, 2, [0.5, 0.6] * 4)
    await trial.round()
    await trial.round()
    assert (route(ctx), states(ctx)) == (2, {1: "retired", 2: "serving"})
    with ctx.engine.connect() as c:
        decision = store.get_version(c, "ada", 2).decision
    assert decision is not None
    assert decision["sentence"].startswith("v2 against v1: +0.50 ±")
    assert decision["canary"]["rewards"] == [8, 8]


async def test_a_canary_that_earns_less_is_taken_back_and_training_with_it(ctx: Context, trial: Publisher) -> None:
    settings = ctx.settings.publish.model_copy(update={"policy": "not_worse"})
    ctx.settings = ctx.settings.model_copy(update={"publish": settings})
    earn(ctx, 1, [0.5, 0.6] * 4)
    earn(ctx, 2, [0.0, 0.1] * 4)
    await trial.round()
    await trial.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected"})
    assert ctx.trainer.heads == [("ada", 1)]
    assert ctx.trainer.held == ["ada@v1"]


async def test_a_trial_ends_with_its_time_even_without_rewards(ctx: Context, trial: Publisher) -> None:
    with ctx.engine.begin() as c:
        c.execute(routes.update().values(canary_since=time.time() - 25 * 3600))
    await trial.round()
    assert route(ctx) == 2
    with ctx.engine.connect() as c:
        assert "too few live rewards" in (store.get_version(c, "ada", 2).decision or {})["sentence"]


async def test_a_newer_candidate_waits_for_the_end_of_the_trial(ctx: Context, trial: Publisher) -> None:
    ctx.trainer.make(3)
    await trial.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "serving", 3: "candidate"})


async def test_the_owner_ends_a_trial_either_way(ctx: Context, trial: Publisher) -> None:
    with ctx.engine.begin() as c:
        assert rollback(c, "ada") == "the trial of ada@v2 is ended; what serves goes on"
    await trial.round()
    await trial.round()
    assert (route(ctx), states(ctx), ctx.trainer.heads) == (1, {1: "serving", 2: "rejected"}, [("ada", 1)])
    ctx.trainer.make(3, parent=1)
    await trial.round()
    with ctx.engine.begin() as c:
        assert store.get_version(c, "ada", 3).shown_state == "canary"
        assert promote(c, "ada", 3) == "ada@v3 serves now"
    assert route(ctx) == 3


async def test_an_agents_first_version_needs_no_trial(ctx: Context, tmp_path: Path) -> None:
    settings = ctx.settings.publish.model_copy(update={"canary_share": 0.3})
    ctx.settings = ctx.settings.model_copy(update={"publish": settings})
    await published(ctx, 1)
    assert route(ctx) == 1
