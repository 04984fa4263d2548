"""Scoring: when, by whom, exactly once, and what comes of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Kind, Reward

from metaclaw_plugin.store import leases, schema
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.rewards import Outcome, put_rewards, record_outcomes
from metaclaw_plugin.worker.combine import best_hint, combine
from metaclaw_plugin.worker.scoring import Scorer, settle_side_traces, store_hook_counters
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook


async def test_a_reward_for_lone_replies_scores_at_once(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(finished_at=time.time()))
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "score", "reward", "lease_owner") == [("scored", 0.5, None)]
        with ctx.engine.connect() as c:
            [stored] = c.execute(sa.select(schema.rewards)).all()
        assert (stored.source, stored.value) == ("r", 0.5)
        assert await Scorer(ctx).round() == 0


async def test_a_reward_that_reads_what_followed_waits_for_it(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace, next_trace): return 1.0 if next_trace else -1.0\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(finished_at=time.time()))
        assert await Scorer(ctx).round() == 0
        fill(ctx.engine, make_trace(id="t2", turn=1, exchange=1, finished_at=time.time()))
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "id", "score", "reward") == [("t1", "scored", 1.0), ("t2", "waiting", None)]


async def test_a_side_request_is_not_what_followed(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace, next_trace): return 1.0\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(finished_at=time.time()), make_trace(id="t2", turn=1, kind=Kind.SIDE))
        assert await Scorer(ctx).round() == 0
        assert settle_side_traces(ctx) == 1
        assert rows(ctx.engine, "id", "score", "forward") == [
            ("t1", "waiting", "waiting"),
            ("t2", "unscored", "skipped"),
        ]


@pytest.mark.parametrize("closed", [True, False])
async def test_it_is_scored_without_at_session_end_or_deadline(tmp_path: Path, closed: bool) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace, next_trace): return -1.0 if next_trace is None else 1.0\n")
    settings = worker_settings(tmp_path, worker={"evidence_timeout": 1e9 if closed else 60})
    with worker_context(settings) as ctx:
        fill(ctx.engine, make_trace(finished_at=time.time() - 61), closed=closed)
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "reward") == [(-1.0,)]


async def test_no_opinion_is_unscored_and_never_zero(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return None\n")
    write_hook(tmp_path, "s", "def score_trace(trace): return float('nan')\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "score", "reward", "forward") == [("unscored", None, "waiting")]


async def test_a_held_out_session_is_scored_and_never_forwarded(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", session="s2"), held_out=("s1",))
        await Scorer(ctx).round()
        assert rows(ctx.engine, "id", "reward", "purpose", "forward") == [
            ("t1", 0.5, "held_out", "skipped"),
            ("t2", 0.5, "unsettled", "waiting"),
        ]


async def test_what_is_not_trainable_is_scored_and_skipped_with_the_reason(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(trainable=False, reason="greedy", response_logprobs=None))
        await Scorer(ctx).round()
        assert rows(ctx.engine, "reward", "forward", "forward_reason") == [(0.5, "skipped", "greedy")]


@pytest.mark.law(3)
async def test_several_workers_score_each_trace_once(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    write_hook(
        tmp_path,
        "r",
        f"def score_trace(trace):\n    open({str(log)!r}, 'a').write(trace.id + '\\n')\n    return 0.5\n",
    )
    settings = worker_settings(tmp_path, worker={"concurrency": 4})
    with (
        worker_context(settings, owner="host:1:1") as one,
        worker_context(settings, owner="host:2:2") as two,
        worker_context(settings, owner="host:3:3") as three,
    ):
        fill(one.engine, *(make_trace(id=f"t{i}", session=f"s{i}") for i in range(60)))
        done = await asyncio.gather(*(Scorer(ctx).round() for ctx in (one, two, three)))
        assert sum(done) == 60
        assert sorted(log.read_text().split()) == sorted(f"t{i}" for i in range(60))


@pytest.mark.law(3)
async def test_a_dead_workers_trace_is_scored_by_the_next_and_its_late_result_is_dropped(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        ready = leases.ready_to_score(time.time(), 600, ["alpha"])
        with ctx.engine.begin() as c:
            [seq] = leases.claim_traces(c, ready, "elsewhere:1:1", time.time() + 0.3, 10)
        assert await Scorer(ctx).round() == 0
        await asyncio.sleep(0.35)
        assert await Scorer(ctx).round() == 1
        late = Outcome(seq, "t1", "alpha", (Reward("late", -1.0),), -1.0, None, False, None, None)
        with ctx.engine.begin() as c:
            assert record_outcomes(c, [late], "elsewhere:1:1", time.time()) == []
        assert rows(ctx.engine, "reward") == [(0.5,)]


async def test_the_leases_of_a_dead_process_here_are_known_as_such() -> None:
    assert not leases.is_dead(leases.this_worker())
    host, _, started = leases.this_worker().rsplit(":", 2)
    assert leases.is_dead(f"{host}:4194305:{started}")  # past the kernel's largest pid
    assert not leases.is_dead(f"other-{host}:1:1")


async def test_feedback_that_comes_while_scoring_is_not_overlooked(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        ready = leases.ready_to_score(time.time(), 600, ["alpha"])
        with ctx.engine.begin() as c:
            [seq] = leases.claim_traces(c, ready, ctx.owner, time.time() + 60, 10)
            put_rewards(c, "t1", [Reward("feedback", -1.0)], time.time())
            unaware = Outcome(seq, "t1", "alpha", (Reward("r", 0.5),), 0.5, None, False, None, None)
            assert record_outcomes(c, [unaware], ctx.owner, time.time()) == []
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "reward") == [(-1.0,)]


async def test_weights_choose_and_switch_off_rewards_per_agent(tmp_path: Path) -> None:
    write_hook(tmp_path, "a", "def score_trace(trace): return 1.0\n")
    write_hook(tmp_path, "b", "def score_trace(trace): return -1.0\n")
    weights = {"weights": {"a": 3.0}, "per_agent": {"beta": {"a": 0.0}}}
    with worker_context(worker_settings(tmp_path, rewards=weights)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", agent="beta", session="s2"))
        await Scorer(ctx).round()
        assert rows(ctx.engine, "agent", "reward") == [("alpha", 0.5), ("beta", -1.0)]


async def test_combine_rewards_overrides_the_mean_and_sees_all(tmp_path: Path) -> None:
    write_hook(
        tmp_path,
        "mine",
        "def score_trace(trace): return 1.0\n"
        "def combine_rewards(trace, rewards): return min(r.value for r in rewards) / 2\n",
    )
    write_hook(tmp_path, "other", "def score_trace(trace): return -1.0\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        await Scorer(ctx).round()
        assert rows(ctx.engine, "reward") == [(-0.5,)]


async def test_a_damaged_trace_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", session="s2"))
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).where(schema.traces.c.id == "t1").values(body=b"no zlib"))
        await Scorer(ctx).round()
        assert rows(ctx.engine, "id", "score") == [("t1", "unscored"), ("t2", "scored")]
        assert "damaged" in rows(ctx.engine, "forward_reason")[0][0]


async def test_what_hooks_did_is_counted_in_the_store(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    write_hook(tmp_path, "bad", "def score_trace(trace): raise OSError\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", session="s2"))
        await Scorer(ctx).round()
        store_hook_counters(ctx)
        store_hook_counters(ctx)
        with ctx.engine.connect() as c:
            counted = read_counters(c)
        assert counted["hook_calls"] == {"r:score_trace": 2, "bad:score_trace": 2}
        assert counted["hook_failures"] == {"bad:score_trace": 2}


def test_the_mean_is_weighed_by_weight_and_confidence() -> None:
    opinions = [Reward("a", 1.0, confidence=0.5), Reward("b", -1.0, confidence=1.0)]
    assert combine(opinions, lambda _: 1.0) == pytest.approx((0.5 - 1.0) / 1.5)
    assert combine(opinions, {"a": 1.0, "b": 0.0}.__getitem__) == 1.0
    assert combine(opinions, lambda _: 0.0) is None
    assert combine([], lambda _: 1.0) is None
    assert combine([*opinions, Reward("feedback", 0.25)], lambda _: 1.0) == 0.25


def test_the_hint_of_the_surest_is_kept() -> None:
    assert best_hint([Reward("a", 0, hint="x", confidence=0.2), Reward("b", 0, hint="y")]) == "y"
    assert best_hint([Reward("a", 0)]) is None


@pytest.mark.law(5)
async def test_an_agent_whose_rewards_hang_does_not_hold_up_the_others(tmp_path: Path) -> None:
    write_hook(tmp_path, "slow/r", "import asyncio\nasync def score_trace(trace):\n    await asyncio.sleep(60)\n")
    write_hook(tmp_path, "quick/r", "def score_trace(trace): return 0.5\n")
    settings = worker_settings(tmp_path, worker={"concurrency": 4})
    with worker_context(settings) as ctx:
        fill(ctx.engine, *(make_trace(id=f"s{n}", agent="slow", session=f"s{n}") for n in range(10)))
        fill(ctx.engine, *(make_trace(id=f"q{n}", agent="quick", session=f"q{n}") for n in range(10)))
        running = asyncio.create_task(Scorer(ctx).round())
        for _ in range(500):
            if rows(ctx.engine, "reward", agent="quick") == [(0.5,)] * 10:
                break
            await asyncio.sleep(0.02)
        assert rows(ctx.engine, "reward", agent="quick") == [(0.5,)] * 10
        running.cancel()
