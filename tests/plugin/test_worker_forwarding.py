"""Forwarding: at least once on the wire, once by id, in order, nothing lost and nothing that may not be trained."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Mode, Trace

from metaclaw_plugin.errors import TrainerRefusedError, TrainerUnavailableError
from metaclaw_plugin.store import forwarding as store
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import raise_generation, set_mode
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.worker_stage import accepted, answer, fill, rows, worker_context, worker_settings, write_hook


def turns(count: int, agent: str = "alpha", session: str = "s1", **changes: Any) -> list[Trace]:
    """A conversation whose every prompt extends the turn before."""
    made, history = [], (1, 2)
    for number in range(count):
        made.append(
            make_trace(
                id=f"{session}-{number}",
                agent=agent,
                session=session,
                turn=number,
                exchange=number,
                prompt_token_ids=history,
                **changes,
            )
        )
        history = (*history, 4, 5, 6)
    return made


async def scored(ctx: WorkerContext, *traces: Trace, **how: Any) -> None:
    fill(ctx.engine, *traces, **how)
    await Scorer(ctx).round()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    return tmp_path


async def test_a_conversation_goes_as_one_sample(home: Path) -> None:
    sent: list[dict[str, Any]] = []

    def take(bodies: list[dict[str, Any]]) -> httpx.Response:
        sent.extend(bodies)
        return accepted(bodies)

    with worker_context(worker_settings(home), answer(take)) as ctx:
        await scored(ctx, *turns(3))
        assert await Forwarder(ctx).round() == 1
        [body] = sent
        assert body["token_ids"] == [1, 2, 4, 5, 6, 4, 5, 6, 4, 5]
        assert [(t["trace_id"], t["start"], t["logprobs"], t["reward"]) for t in body["turns"]] == [
            ("s1-0", 2, [-0.5, -0.25], 0.5),
            ("s1-1", 5, [-0.5, -0.25], 0.5),
            ("s1-2", 8, [-0.5, -0.25], 0.5),
        ]
        assert rows(ctx.engine, "purpose", "forward") == [("query", "forwarded")] * 3
        assert await Forwarder(ctx).round() == 0
        assert len(sent) == 1


@pytest.mark.law(3)
async def test_while_the_trainer_is_away_nothing_is_lost_and_the_order_stays(home: Path) -> None:
    sent: list[str] = []
    away = True

    def sometimes(bodies: list[dict[str, Any]]) -> httpx.Response:
        if away:
            return httpx.Response(503)
        sent.extend(body["session"] for body in bodies)
        return accepted(bodies)

    with worker_context(worker_settings(home), answer(sometimes)) as ctx:
        await scored(ctx, *turns(1, session="a"), *turns(1, session="b"))
        with pytest.raises(TrainerUnavailableError):
            await Forwarder(ctx).round()
        await scored(ctx, *turns(1, session="c"))
        with pytest.raises(TrainerUnavailableError):
            await Forwarder(ctx).round()
        away = False
        assert await Forwarder(ctx).round() == 3
        assert sent == ["a", "b", "c"]


async def test_a_full_queue_of_one_agent_holds_up_no_other_and_its_order_stays(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[str] = []
    full, tries = True, 0

    def takes(bodies: list[dict[str, Any]]) -> httpx.Response:
        nonlocal tries
        if full and bodies[0]["agent"] == "alpha":
            tries += 1
            return httpx.Response(429, json={"error": {"message": "the queue of alpha is full", "type": "t"}})
        sent.extend(body["session"] for body in bodies)
        return accepted(bodies)

    with worker_context(worker_settings(home, worker={"max_backoff": 0.3}), answer(takes)) as ctx:
        forwarder = Forwarder(ctx)
        await scored(ctx, *turns(1, session="a1"), *turns(1, agent="beta", session="b"))
        assert await forwarder.round() == 1
        await scored(ctx, *turns(1, session="a2"), *turns(1, agent="gamma", session="c"))
        assert await forwarder.round() == 1
        assert sent == ["b", "c"]
        assert tries == 1, "it is asked again after a pause, not in every round"
        assert [r.getMessage() for r in caplog.records if "samples of alpha wait" in r.getMessage()] != []
        full = False
        deadline = time.monotonic() + 5
        while len(sent) < 4 and time.monotonic() < deadline:
            await forwarder.round()
            await asyncio.sleep(0.05)
        assert sent == ["b", "c", "a1", "a2"]


async def test_rows_of_one_agent_that_cannot_be_read_hold_up_no_other(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with worker_context(worker_settings(home), answer(accepted)) as ctx:
        await scored(ctx, *turns(1, session="a"), *turns(1, agent="beta", session="b"))
        with ctx.engine.begin() as c:
            damaged = sa.update(schema.traces).where(schema.traces.c.agent == "alpha")
            c.execute(damaged.values(prompt_token_ids=b"\x01\x02\x03"))
        assert await Forwarder(ctx).round() == 1
        assert rows(ctx.engine, "session", "forward") == [("a", "waiting"), ("b", "forwarded")]
        assert "forwarding of alpha failed" in caplog.text
        with ctx.engine.connect() as c:
            assert read_counters(c, "worker_failures") == {"worker_failures": {"forwarding of alpha": 1}}


@pytest.mark.law(3)
async def test_a_reply_that_got_lost_makes_the_same_sample_again(home: Path) -> None:
    seen: list[dict[str, Any]] = []

    def forgets(bodies: list[dict[str, Any]]) -> httpx.Response:
        seen.extend(bodies)
        if len(seen) == 1:
            raise httpx.ReadError("connection lost")
        return httpx.Response(200, json={"accepted": [], "duplicate": [b["id"] for b in bodies], "refused": []})

    with worker_context(worker_settings(home), answer(forgets)) as ctx:
        await scored(ctx, *turns(2))
        with pytest.raises(TrainerUnavailableError):
            await Forwarder(ctx).round()
        await Forwarder(ctx).round()
        assert seen[0] == seen[1]
        assert rows(ctx.engine, "forward") == [("forwarded",)] * 2


async def test_a_refused_sample_is_skipped_with_the_trainers_reason(home: Path) -> None:
    def refuses(bodies: list[dict[str, Any]]) -> httpx.Response:
        return httpx.Response(
            200, json={"accepted": [], "duplicate": [], "refused": [{"id": bodies[0]["id"], "reason": "too long"}]}
        )

    with worker_context(worker_settings(home), answer(refuses)) as ctx:
        await scored(ctx, *turns(1))
        assert await Forwarder(ctx).round() == 0
        assert rows(ctx.engine, "forward", "forward_reason") == [("skipped", "too long")]


async def test_a_request_refused_whole_costs_only_the_bad_sample(home: Path) -> None:
    def chokes(bodies: list[dict[str, Any]]) -> httpx.Response:
        if any(body["session"] == "bad" for body in bodies):
            return httpx.Response(413, json={"error": {"message": "too large", "type": "t", "code": "c"}})
        return accepted(bodies)

    with worker_context(worker_settings(home), answer(chokes)) as ctx:
        await scored(ctx, *turns(1, session="a"), *turns(1, session="bad"), *turns(1, session="c"))
        assert await Forwarder(ctx).round() == 2
        assert rows(ctx.engine, "session", "forward") == [("a", "forwarded"), ("bad", "skipped"), ("c", "forwarded")]


async def test_a_wrong_key_loses_nothing(home: Path) -> None:
    refuses = answer(lambda _: httpx.Response(401, json={"error": {"message": "no", "type": "t", "code": "c"}}))
    with worker_context(worker_settings(home), refuses) as ctx:
        await scored(ctx, *turns(1))
        with pytest.raises(TrainerRefusedError, match="401"):
            await Forwarder(ctx).round()
        assert rows(ctx.engine, "forward") == [("merged",)]


async def test_an_answer_that_leaves_samples_out_is_no_answer(home: Path) -> None:
    silent = answer(lambda _: httpx.Response(200, json={"accepted": [], "duplicate": [], "refused": []}))
    with worker_context(worker_settings(home), silent) as ctx:
        await scored(ctx, *turns(1))
        with pytest.raises(TrainerRefusedError, match="leaves out"):
            await Forwarder(ctx).round()
        assert rows(ctx.engine, "forward") == [("merged",)]


@pytest.mark.law(8)
async def test_what_the_evolver_was_shown_is_never_sent(home: Path) -> None:
    sent: list[str] = []

    def take(bodies: list[dict[str, Any]]) -> httpx.Response:
        sent.extend(t["trace_id"] for body in bodies for t in body["turns"])
        return accepted(bodies)

    with worker_context(worker_settings(home), answer(take)) as ctx:
        await scored(ctx, *turns(2))
        with ctx.engine.begin() as c:
            assert store.settle_support(c, ["s1-0"]) == ["s1-0"]
        await Forwarder(ctx).round()
        assert sent == ["s1-1"]
        with ctx.engine.begin() as c:
            assert store.settle_support(c, ["s1-0", "s1-1"]) == []  # settled is settled, both ways


@pytest.mark.law(8)
async def test_support_that_is_settled_between_look_and_mark_takes_its_sample_along(home: Path) -> None:
    with worker_context(worker_settings(home)) as ctx:
        await scored(ctx, *turns(2))
        with ctx.engine.begin() as c:
            run = store.mergeable(c, "alpha", time.time(), 0, 10)
            store.settle_support(c, ["s1-1"])
            assert store.mark_merged(c, {"s-x": run}) == []
        assert rows(ctx.engine, "purpose", "forward", "sample_id") == [
            ("unsettled", "waiting", None),
            ("support", "skipped", None),
        ]


@pytest.mark.law(8)
async def test_strict_query_sets_older_skill_generations_aside(home: Path) -> None:
    settings = worker_settings(home, worker={"merge_wait": 0, "strict_query": True})
    with worker_context(settings, answer(accepted)) as ctx:
        await scored(ctx, *turns(1, session="old"))
        with ctx.engine.begin() as c:
            raise_generation(c, "alpha")
        await scored(ctx, *turns(1, session="new", skill_generation=1))
        await Forwarder(ctx).round()
        assert rows(ctx.engine, "session", "forward") == [("old", "skipped"), ("new", "forwarded")]


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.SKILLS_ONLY])
async def test_only_agents_that_learn_are_forwarded(home: Path, mode: Mode) -> None:
    with worker_context(worker_settings(home), answer(accepted)) as ctx:
        await scored(ctx, *turns(1), *turns(1, agent="beta", session="b"))
        with ctx.engine.begin() as c:
            set_mode(c, "beta", mode)
        assert await Forwarder(ctx).round() == 1
        assert rows(ctx.engine, "agent", "forward") == [("alpha", "forwarded"), ("beta", "waiting")]


@pytest.mark.law(4)
async def test_a_sample_never_holds_traces_of_two_agents(home: Path) -> None:
    sent: list[dict[str, Any]] = []

    def take(bodies: list[dict[str, Any]]) -> httpx.Response:
        sent.extend(bodies)
        return accepted(bodies)

    with worker_context(worker_settings(home), answer(take)) as ctx:
        mine, theirs = turns(2)
        fill(ctx.engine, mine)
        with ctx.engine.begin() as c:
            from metaclaw_plugin.store.agents import add_agent
            from metaclaw_plugin.store.traces import insert_traces

            add_agent(c, "beta")
            insert_traces(c, [make_trace(**{**_fields(theirs), "agent": "beta"})])
        await Scorer(ctx).round()
        await Forwarder(ctx).round()
        assert sorted((body["agent"], len(body["turns"])) for body in sent) == [("alpha", 1), ("beta", 1)]


def _fields(trace: Trace) -> dict[str, Any]:
    return {name: getattr(trace, name) for name in ("id", "session", "turn", "exchange", "prompt_token_ids")}


async def test_an_open_session_waits_to_be_merged_and_a_closed_one_does_not(home: Path) -> None:
    settings = worker_settings(home, worker={"merge_wait": 60})
    with worker_context(settings, answer(accepted)) as ctx:
        await scored(ctx, *turns(1, session="open"))
        await scored(ctx, *turns(1, session="closed"), closed=True)
        assert await Forwarder(ctx).round() == 1
        assert rows(ctx.engine, "session", "forward") == [("open", "waiting"), ("closed", "forwarded")]
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).values(scored_at=time.time() - 61))
        assert await Forwarder(ctx).round() == 1


async def test_one_forwarder_at_a_time_has_an_agent(home: Path) -> None:
    settings = worker_settings(home)
    with (
        worker_context(settings, answer(accepted), owner="host:1:1") as one,
        worker_context(settings, answer(accepted), owner="host:2:2") as two,
    ):
        await scored(one, *turns(1))
        first, second = Forwarder(one), Forwarder(two)
        assert first._acquire("alpha")
        assert await second.round() == 0
        first._release("alpha")
        assert await second.round() == 1


async def test_what_versions_were_trained_on_is_marked(home: Path) -> None:
    with worker_context(worker_settings(home), answer(accepted)) as ctx:
        await scored(ctx, *turns(2))
        await Forwarder(ctx).round()
        with ctx.engine.begin() as c:
            assert store.mark_trained(c, ["s1-0", "gone"]) == 1
            assert store.mark_trained(c, ["s1-0"]) == 0
        assert rows(ctx.engine, "forward") == [("trained",), ("forwarded",)]


EVOLVING = {"evolution": {"model": "m", "support_share": 1.0}}


@pytest.mark.law(8)
async def test_a_session_that_may_still_fail_is_not_sent_before_its_end(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path, skills=EVOLVING), answer(accepted)) as ctx:
        await scored(ctx, *turns(2))
        assert await Forwarder(ctx).round() == 0
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.sessions).values(closed_at=time.time()))
            c.execute(sa.update(schema.traces).where(schema.traces.c.id == "s1-1").values(score="waiting"))
        assert await Forwarder(ctx).round() == 0
        await Scorer(ctx).round()
        assert await Forwarder(ctx).round() == 1


@pytest.mark.law(8)
async def test_a_failure_is_kept_for_the_evolver_in_the_moment_that_it_is_scored(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return -1.0 if trace.turn == 1 else 0.5\n")
    with worker_context(worker_settings(tmp_path, skills=EVOLVING), answer(accepted)) as ctx:
        await scored(ctx, *turns(3), *turns(1, session="s2"), closed=True)
        assert rows(ctx.engine, "id", "purpose") == [
            ("s1-0", "support"),
            ("s1-1", "support"),
            ("s1-2", "unsettled"),
            ("s2-0", "unsettled"),
        ]
        await Forwarder(ctx).round()
        assert rows(ctx.engine, "forward") == [("skipped",), ("skipped",), ("forwarded",), ("forwarded",)]
