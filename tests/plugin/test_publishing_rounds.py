"""The publisher against a trainer's port: every step once, in order, and again after a kill anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_hooks.types import Kind
from metaclaw_hooks.wire import Refusal, ServedReply, VersionBody
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import TrainerUnavailableError, UnknownVersionError, VersionStateError
from metaclaw_plugin.gateway.routing import InFlight, pick_route
from metaclaw_plugin.settings import PublishSettings, Settings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.wishes import promote, rollback
from metaclaw_plugin.worker.heartbeats import HeartbeatWatch
from metaclaw_plugin.worker.publishing import Publisher


class Killed(BaseException):
    """kill -9, as seen from inside."""


@dataclass
class Trainer:
    """Answers as the trainer's routes do; ``kill_at`` dies before or after the n-th call."""

    made: list[VersionBody] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    history: list[list[str]] = field(default_factory=list)
    heads: list[tuple[str, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    down: bool = False
    kill_at: int | None = None
    calls: int = 0

    def _call(self) -> None:
        if self.down:
            raise TrainerUnavailableError("the trainer does not answer")
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed

    async def versions(self, after: int, wait: float = 0.0) -> list[VersionBody]:
        self._call()
        deadline = time.monotonic() + wait
        while not (new := [body for body in self.made if body.cursor > after][:2]) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return new

    async def set_served(self, versions: Sequence[str]) -> ServedReply:
        self._call()
        self.held = [name for name in versions if name not in self.broken]
        self.history.append(list(versions))
        failed = [Refusal(id=name, reason=self.broken[name]) for name in versions if name in self.broken]
        return ServedReply(held=self.held, failed=failed)

    async def set_head(self, agent: str, version: int) -> None:
        self._call()
        self.heads.append((agent, version))

    def make(self, number: int, agent: str = "ada", parent: int | None = None) -> None:
        parent = number - 1 if parent is None else parent
        self.made.append(
            VersionBody(
                agent=agent,
                number=number,
                base_model="m",
                parent=parent,
                trace_ids=[],
                step=number,
                metrics={},
                sha256="0" * 64,
                libraries={},
                path=f"/v/{agent}/{number}",
                created_at=float(number),
                cursor=len(self.made) + 1,
            )
        )


def unasked(request: httpx.Request) -> httpx.Response:
    """A vLLM that publishing leaves alone: the trainer has seen that the version answers."""
    raise AssertionError(f"vLLM was asked {request.url.path}")


@dataclass
class Plugins:
    """Opinions by plugin name, and what was called."""

    opinions: list[tuple[str, Any]] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    async def call(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        if hook == "adapter_published":
            self.published.append(kwargs["version"].name)
            return []
        return self.opinions

    async def call_first(self, hook: str, /, **kwargs: Any) -> Any:
        return None

    def implementers(self, hook: str, agent: str | None = None) -> list[str]:
        return []

    def scores_lone_reply(self, name: str) -> bool | None:
        return None


@dataclass
class Context:
    settings: Settings
    engine: Engine
    trainer: Trainer
    plugins: Plugins
    http: httpx.AsyncClient


@dataclass(frozen=True)
class Turn:
    session: str = "s"
    kind: Kind = Kind.SIDE
    new_exchange: bool = True
    adapter_version: int | None = None


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    settings = Settings(home=tmp_path, publish=PublishSettings(policy="always", retry_interval=0.001))
    return Context(
        settings,
        open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}"),
        Trainer(),
        Plugins(),
        httpx.AsyncClient(transport=httpx.MockTransport(unasked)),
    )


def states(ctx: Context, agent: str = "ada") -> dict[int, str]:
    with ctx.engine.connect() as c:
        return {r.version.number: str(r.version.state) for r in store.list_versions(c, agent)}


def route(ctx: Context, agent: str = "ada") -> int:
    with ctx.engine.connect() as c:
        return store.get_route(c, agent).version


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
        ticket = flights.begin(c, "ada", pick_route(c, "ada", Turn()).adapter_version)
    ctx.trainer.make(2)
    await publisher.round()
    await publisher.round()
    with ctx.engine.begin() as c:
        assert pick_route(c, "ada", Turn()).adapter_version == 2
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


async def published(ctx: Context, *numbers: int) -> Publisher:
    """A publisher that has put these versions in place one after the other."""
    publisher = Publisher(ctx)
    for number in numbers:
        ctx.trainer.make(number)
        await publisher.round()
    return publisher


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
