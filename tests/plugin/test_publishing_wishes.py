"""What people wish of versions: promoted, rolled back, and taken back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Kind, VersionState
from metaclaw_hooks.wire import ServedReply

from metaclaw_plugin.errors import UnknownVersionError, VersionStateError
from metaclaw_plugin.gateway.routing import pick_route
from metaclaw_plugin.store.adapters import record_candidate
from metaclaw_plugin.store.wishes import promote, rollback
from tests.publishing_cases import (
    Context,
    Turn,
    context,
    hold,
    in_trial,
    published,
    replaced,
    route,
    states,
    version,
    version_body,
)


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(tmp_path)


async def test_rollback_brings_back_the_version_before_and_trains_on_from_it(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    with ctx.engine.begin() as c:
        assert "as soon as vLLM has loaded it" in rollback(c, "ada")
    assert route(ctx) == 2  # not one request without a version
    ctx.trainer.make(3)  # trained from 2: never to serve by itself
    await publisher.round()
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})
    assert ctx.trainer.heads == [("ada", 1)]
    assert ctx.trainer.held == ["ada@v1"]
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    assert route(ctx) == 0  # there was none before: the base model, at once
    await publisher.round()
    await publisher.round()
    assert (states(ctx)[1], ctx.trainer.held, ctx.trainer.heads[-1]) == ("rejected", [], ("ada", 0))


async def test_rollback_finds_the_version_before_though_the_clock_was_set_back(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = await published(ctx, 1, 2)
    monkeypatch.setattr("metaclaw_plugin.store.adapters.time.time", lambda: 1000.0)
    ctx.trainer.make(3)
    await publisher.round()
    with ctx.engine.begin() as c:
        assert rollback(c, "ada").startswith("ada@v2 ")


async def test_rollback_to_a_version_that_still_drains_takes_effect_at_once(ctx: Context) -> None:
    await replaced(ctx)
    with ctx.engine.begin() as c:
        assert rollback(c, "ada") == "ada@v1 serves now"
    assert route(ctx) == 1


async def test_promote_puts_a_rejected_version_in_place_and_rollback_takes_it_back(ctx: Context) -> None:
    publisher = await published(ctx, 1)
    ctx.plugins.opinions = [("guard", False)]
    ctx.trainer.make(2)
    await publisher.round()
    assert (route(ctx), states(ctx)[2]) == (1, "rejected")
    with ctx.engine.begin() as c:
        promote(c, "ada", 2)
    await publisher.round()
    await publisher.round()
    assert (route(ctx), ctx.trainer.heads[-1]) == (2, ("ada", 2))
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    await publisher.round()
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected"})


async def test_a_wish_that_cannot_be_carried_out_leaves_what_serves_and_may_be_taken_back(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    ctx.trainer.broken["ada@v1"] = "no such folder"
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    await publisher.round()
    assert route(ctx) == 2
    with ctx.engine.begin() as c:
        assert promote(c, "ada", 2) == "ada@v2 is serving already"
    await publisher.round()
    assert states(ctx) == {1: "retired", 2: "serving"}


async def test_what_cannot_be_wished_is_refused_by_name(ctx: Context) -> None:
    await published(ctx, 1)
    with ctx.engine.begin() as c:
        with pytest.raises(VersionStateError, match="nothing to take back"):
            rollback(c, "bob")
        with pytest.raises(UnknownVersionError, match="no adapter version 9"):
            promote(c, "ada", 9)
        with pytest.raises(VersionStateError, match="is what serves"):
            rollback(c, "ada", 1)


async def test_rollback_while_a_round_is_under_way_holds_against_what_was_trained_from_it(ctx: Context) -> None:
    publisher = await replaced(ctx)
    ask = ctx.trainer.set_served

    async def meanwhile(*arguments: Any) -> ServedReply:
        ctx.trainer.set_served = ask  # type: ignore[method-assign]
        reply = await ask(*arguments)
        with ctx.engine.begin() as c:
            assert rollback(c, "ada") == "ada@v1 serves now"
        return reply

    ctx.trainer.set_served = meanwhile  # type: ignore[method-assign]
    ctx.trainer.make(3)
    for _ in range(3):
        await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})


async def test_a_verdict_is_given_again_when_the_route_has_turned_meanwhile(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    hold(ctx, 2)
    settled: list[bool] = []
    settle = publisher._settle

    def meanwhile(*arguments: Any) -> None:
        if not settled:
            with ctx.engine.begin() as c:
                rollback(c, "ada", 0)
        settle(*arguments)
        settled.append(version(ctx, 3).version.state is not VersionState.CANDIDATE)

    publisher._settle = meanwhile  # type: ignore[method-assign]
    ctx.trainer.make(3, parent=1)  # judged against v2, which no longer serves when the verdict is there
    await publisher.round()
    await publisher.round()
    assert settled == [False, True]
    assert route(ctx) == 3


async def test_rollback_during_a_trial_takes_back_the_canary_and_what_was_trained_from_it(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    in_trial(ctx)
    ctx.trainer.make(3, parent=1)
    await publisher.round()
    ctx.trainer.make(4)
    await publisher.round()
    assert (version(ctx, 3).canary, states(ctx)[4]) == (True, "candidate")
    with ctx.engine.begin() as c:
        rollback(c, "ada", 1)
    assert not version(ctx, 3).canary  # at once, though v1 is not loaded yet
    for _ in range(3):
        await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected", 4: "rejected"})


async def test_what_was_trained_from_a_version_goes_with_it_though_it_served_itself(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2, 3, 4)
    with ctx.engine.begin() as c:
        promote(c, "ada", 2)  # over what was trained from it
    await publisher.round()
    with ctx.engine.begin() as c:
        rollback(c, "ada", 1)
    ctx.trainer.make(5)  # from v4
    for _ in range(3):
        await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving"} | dict.fromkeys((2, 3, 4, 5), "rejected"))


async def test_rollback_takes_back_a_promotion_though_what_served_was_trained_from_the_promoted(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2, 3)
    with ctx.engine.begin() as c:
        promote(c, "ada", 2)
    await publisher.round()
    with ctx.engine.begin() as c:
        record_candidate(c, version_body(4, parent=3, cursor=4))
        assert rollback(c, "ada").startswith("ada@v3 ")
    for _ in range(2):
        await publisher.round()
    assert (route(ctx), states(ctx)) == (4, {1: "retired", 2: "rejected", 3: "retired", 4: "serving"})


async def test_rollback_goes_to_what_had_the_route_before_though_it_was_decided_about_earlier(ctx: Context) -> None:
    publisher = await replaced(ctx)
    with ctx.engine.begin() as c:
        assert promote(c, "ada", 1) == "ada@v1 serves now"
    ctx.trainer.make(3, parent=1)
    await publisher.round()
    assert route(ctx) == 3
    with ctx.engine.begin() as c:
        assert rollback(c, "ada").startswith("ada@v1 ")


async def test_rollback_never_goes_to_a_canary_that_did_not_take_the_route(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    in_trial(ctx)
    ctx.trainer.make(3)
    await publisher.round()
    with ctx.engine.begin() as c:
        promote(c, "ada", 1)
    await publisher.round()
    assert route(ctx) == 1
    with ctx.engine.begin() as c:
        assert rollback(c, "ada").startswith("ada@v2 ")


async def test_to_promote_what_was_to_be_taken_back_clears_it(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    ctx.trainer.broken["ada@v1"] = "no such folder"
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    await publisher.round()
    with ctx.engine.begin() as c:
        assert promote(c, "ada", 2) == "ada@v2 is serving already"
    assert (version(ctx, 2).decision or {})["accepted"]
    ctx.trainer.make(3)
    await publisher.round()
    assert route(ctx) == 3
    with ctx.engine.begin() as c:
        assert rollback(c, "ada").startswith("ada@v2 ")


async def test_rollback_goes_back_to_the_base_model_where_that_was_before(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    with ctx.engine.begin() as c:
        rollback(c, "ada", 0)
    ctx.trainer.make(3, parent=0)
    await publisher.round()
    assert route(ctx) == 3
    with ctx.engine.begin() as c:
        assert rollback(c, "ada") == "the base model serves ada now"


async def test_rollback_said_twice_is_said_once(ctx: Context) -> None:
    await published(ctx, 1, 2, 3)
    with ctx.engine.begin() as c:
        said = rollback(c, "ada")
        assert said.startswith("ada@v2 will serve as soon as")
        assert rollback(c, "ada") == said


async def test_a_wish_that_is_dropped_leaves_a_rejected_version_rejected(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    await publisher.round()
    await publisher.round()
    with ctx.engine.begin() as c:
        promote(c, "ada", 2)
        promote(c, "ada", 1)
    ctx.trainer.make(3)  # from v2
    await publisher.round()
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})


async def test_what_drains_stays_taken_back_whatever_is_wished_next(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    hold(ctx, 2)
    with ctx.engine.begin() as c:
        rollback(c, "ada", 0)
        promote(c, "ada", 1)
    assert version(ctx, 2).withdrawn
    await publisher.round()
    with ctx.engine.begin() as c:
        assert rollback(c, "ada") == "the base model serves ada now"


async def test_the_files_that_rollback_needs_are_kept(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2, 3)
    ctx.trainer.make(1, "bob", parent=0)
    await publisher.round()
    assert (ctx.trainer.held, ctx.trainer.kept) == (["ada@v3", "bob@v1"], ["ada@v2"])
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    await publisher.round()
    await publisher.round()
    assert (ctx.trainer.held, ctx.trainer.kept) == (["ada@v2", "bob@v1"], ["ada@v1"])


async def test_a_wish_for_a_version_whose_files_are_gone_is_a_problem_that_says_so(ctx: Context) -> None:
    publisher = await published(ctx, 1, 2)
    ctx.trainer.broken["ada@v1"] = "its files were removed to save space"
    with ctx.engine.begin() as c:
        rollback(c, "ada")
    for _ in range(3):
        await publisher.round()
    assert route(ctx) == 2
    with ctx.engine.connect() as c:
        assert pick_route(c, "ada", Turn(kind=Kind.SIDE)).adapter_version == 2
    problem = version(ctx, 1).problem
    assert problem is not None
    assert problem.startswith("its files were removed to save space; you wished for it")
