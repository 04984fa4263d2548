"""What people wish of versions: promoted, rolled back, and taken back again."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaclaw_plugin.errors import UnknownVersionError, VersionStateError
from metaclaw_plugin.gateway.routing import InFlight
from metaclaw_plugin.store.wishes import promote, rollback
from tests.publishing_cases import Context, context, published, route, states


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
    publisher, flights = await published(ctx, 1), InFlight(ctx.engine)
    with ctx.engine.begin() as c:
        flights.begin(c, "ada", 1)
    ctx.trainer.make(2)
    await publisher.round()
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
