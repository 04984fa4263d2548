"""Two who decide about a version at once: one after the other, on either database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import VersionState
from sqlalchemy.engine import Engine

from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.wishes import promote, rollback
from metaclaw_plugin.worker.publishing import Publisher
from metaclaw_plugin.worker.verdicts import Decision
from tests.publishing_cases import Context, context, published, replaced, route, states, version, version_body

PAUSE = 0.5  # seconds; the second has this long to come between, if it can

GOOD, BAD = Decision(True, "good", {}), Decision(False, "bad", {})


@pytest.fixture
def ctx(store: Engine, tmp_path: Path) -> Context:
    return context(tmp_path, store)


def race(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object], second: Callable[[], object]) -> None:
    """``second`` begins when ``first``, a settlement, has read what it decides by and has written nothing yet."""
    has_read, is_done, read = threading.Event(), threading.Event(), store.get_route

    def reading(c: sa.Connection, agent: str) -> store.RouteRow:
        found = read(c, agent)
        if threading.current_thread() is not threading.main_thread():
            has_read.set()
            is_done.wait(PAUSE)
        return found

    monkeypatch.setattr(store, "get_route", reading)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(first)
        assert has_read.wait(30)
        second()
        is_done.set()
        ended.result(30)
    monkeypatch.undo()


def candidate(ctx: Context, number: int) -> store.VersionRecord:
    with ctx.engine.begin() as c:
        store.record_candidate(c, version_body(number, parent=number - 1, cursor=number))
    return version(ctx, number)


async def test_of_two_publishers_that_disagree_the_first_is_right(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, other = await published(ctx, 1), Publisher(ctx)
    made = candidate(ctx, 2)
    race(monkeypatch, lambda: publisher._settle(made, BAD, 1), lambda: other._settle(made, GOOD, 1))
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected"})


async def test_a_promotion_during_a_rejection_holds(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = await published(ctx, 1)
    made = candidate(ctx, 2)

    def wish() -> None:
        with ctx.engine.begin() as c:
            promote(c, "ada", 2)

    race(monkeypatch, lambda: publisher._settle(made, BAD, 1), wish)
    await publisher.round()
    assert (route(ctx), version(ctx, 2).version.state) == (2, VersionState.SERVING)


async def test_a_rollback_during_an_acceptance_holds(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = await replaced(ctx)
    made = candidate(ctx, 3)

    def wish() -> None:
        with ctx.engine.begin() as c:
            rollback(c, "ada", 1)

    race(monkeypatch, lambda: publisher._settle(made, GOOD, 2), wish)
    for _ in range(2):
        await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "retired", 3: "rejected"})


async def test_a_verdict_on_what_came_after_a_rollback_does_not_undo_it(ctx: Context) -> None:
    publisher = await replaced(ctx)
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    publisher._settle(candidate(ctx, 3), GOOD, 1)  # listed meanwhile, by another publisher
    assert (route(ctx), states(ctx)[3]) == (1, "rejected")


async def test_a_head_that_is_chosen_while_the_trainer_is_told_another_is_told_next(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await published(ctx, 1, 2)
    with ctx.engine.begin() as c:
        store.set_head(c, "ada", 2)

    def wish() -> None:
        with ctx.engine.begin() as c:
            rollback(c, "ada", 0)

    with ThreadPoolExecutor(1) as pool:
        race(monkeypatch, lambda: pool.submit(asyncio.run, publisher._tell_heads()).result(), wish)
    await publisher.round()
    assert ctx.trainer.heads == [("ada", 2), ("ada", 0)]
