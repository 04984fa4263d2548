"""Deleted traces, and the versions that had learned from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import VersionState
from sqlalchemy.engine import Engine

from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.deletion import BY_OWNER, BY_RETENTION
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.lineage import learned_from_deleted, retrain_without_deleted
from metaclaw_plugin.store.schema import recalls
from metaclaw_plugin.store.wishes import promote
from metaclaw_plugin.worker.publishing import Publisher
from metaclaw_plugin.worker.verdicts import Decision
from tests.publishing_cases import Context, context, hold, in_trial, published, route, states, version, version_body


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """v1 <- v2 <- v3 <- v4 (candidate); each was trained on the trace of its number."""
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        for number in (1, 2, 3, 4):
            store.record_candidate(c, version_body(number, parent=number - 1))
            if number < 4:
                store.set_state(c, "ada", number, VersionState.SERVING, {"accepted": True, "sentence": "good"})
                store.set_route(c, "ada", number)
        store.set_state(c, "ada", 1, VersionState.RETIRED)
    return engine


def delete(c: sa.Connection, trace: str, agent: str = "ada", cause: str = BY_OWNER) -> None:
    c.execute(recalls.insert().values(trace_id=trace, agent=agent, cause=cause, at=1.0))


def test_a_version_learns_from_all_that_its_ancestors_learned_from(engine: Engine) -> None:
    with engine.begin() as c:
        assert learned_from_deleted(c, "ada") == []
        delete(c, "t3")
        assert learned_from_deleted(c, "ada") == [3, 4]
        delete(c, "t1")
        assert learned_from_deleted(c, "ada") == [1, 2, 3, 4]


def test_retraining_goes_back_to_the_last_version_that_did_not_learn_from_them(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t3")
        said = retrain_without_deleted(c, "ada")
        assert said == "v3, v4 learned from deleted traces; training goes on from v2; ada@v2 serves now"
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (2, 2)
        assert store.get_version(c, "ada", 3).wish == store.WISH_WITHDRAW
        assert store.get_version(c, "ada", 4).version.state is VersionState.REJECTED


def test_when_all_have_learned_from_them_the_base_model_serves(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t1")
        assert "training goes on from the base model" in retrain_without_deleted(c, "ada")
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (0, 0)


def test_what_serves_stays_when_only_a_candidate_has_learned_from_them(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t4")
        assert "what serves has not learned from them" in retrain_without_deleted(c, "ada")
        assert (store.get_route(c, "ada").version, store.get_route(c, "ada").head) == (3, 3)
        assert store.get_version(c, "ada", 4).version.state is VersionState.REJECTED


@pytest.mark.law(4)
def test_law_4_another_agents_deletion_changes_nothing(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t3", agent="bob")
        assert "nothing is to be done" in retrain_without_deleted(c, "ada")
        assert store.get_route(c, "ada").version == 3


def test_what_aged_out_is_no_deletion_by_the_owner(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t1", cause=BY_RETENTION)
        assert learned_from_deleted(c, "ada") == []
        delete(c, "t3")
        assert learned_from_deleted(c, "ada") == [3, 4]
        assert "training goes on from v2" in retrain_without_deleted(c, "ada")


def test_to_retrain_twice_changes_nothing_more(engine: Engine) -> None:
    with engine.begin() as c:
        delete(c, "t3")
        retrain_without_deleted(c, "ada")
        store.set_head(c, "ada", None)  # the trainer was told
        assert "nothing is to be done" in retrain_without_deleted(c, "ada")
        assert store.get_route(c, "ada").head is None


def test_retraining_goes_back_to_what_served_last_not_to_what_the_owner_had_left(engine: Engine) -> None:
    with engine.begin() as c:
        promote(c, "ada", 2)  # over v3
        store.record_candidate(c, version_body(5, parent=2))
        store.set_state(c, "ada", 5, VersionState.SERVING, {"accepted": True, "sentence": "good"})
        store.set_route(c, "ada", 5)
        delete(c, "t5")
        assert "training goes on from v2" in retrain_without_deleted(c, "ada")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(tmp_path)


async def test_a_canary_that_has_learned_from_them_answers_nobody_any_more(ctx: Context) -> None:
    publisher = await published(ctx, 1)
    in_trial(ctx)
    ctx.trainer.make(2)
    await publisher.round()
    assert version(ctx, 2).canary
    with ctx.engine.begin() as c:
        delete(c, "t2")
        assert "what serves has not learned from them" in retrain_without_deleted(c, "ada")
        assert store.get_route(c, "ada").canary is None
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected"})


async def test_what_drains_and_has_learned_from_them_is_taken_back(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    hold(ctx, 2)
    ctx.trainer.make(3, parent=1)
    await publisher.round()
    assert version(ctx, 2).shown_state == "draining"
    with ctx.engine.begin() as c:
        delete(c, "t2")
        retrain_without_deleted(c, "ada")
    assert (route(ctx), version(ctx, 2).withdrawn) == (3, True)


async def test_a_version_that_comes_after_the_retraining_does_not_undo_it(ctx: Context) -> None:
    publisher = await published(ctx, 1)
    with ctx.engine.begin() as c:
        delete(c, "t2")
        retrain_without_deleted(c, "ada")
    ctx.trainer.make(2)  # its step had begun before the trainer heard of the deletion
    ctx.trainer.make(3)  # and this one was trained from it
    await publisher.round()
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})
    assert ctx.trainer.heads == [("ada", 1)]
    ctx.trainer.make(4, parent=1)
    await publisher.round()
    assert route(ctx) == 4


async def test_a_verdict_on_what_came_after_the_retraining_does_not_undo_it(ctx: Context) -> None:
    publisher = await published(ctx, 1)
    with ctx.engine.begin() as c:
        delete(c, "t2")
        retrain_without_deleted(c, "ada")
        store.record_candidate(c, version_body(2, parent=1))  # by another publisher
    publisher._settle(version(ctx, 2), Decision(True, "good", {}), 1)
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected"})


async def test_without_retraining_what_has_learned_from_them_may_serve(ctx: Context) -> None:
    publisher = Publisher(ctx)
    with ctx.engine.begin() as c:
        delete(c, "t1")
    ctx.trainer.make(1)
    await publisher.round()
    assert route(ctx) == 1
    with ctx.engine.begin() as c:
        assert learned_from_deleted(c, "ada") == [1]
