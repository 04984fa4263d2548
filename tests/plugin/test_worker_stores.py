"""The worker's queries on both kinds of store."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from metaclaw_hooks.rewards.judge import Judgement, Spent

from metaclaw_plugin.store import forwarding, leases
from metaclaw_plugin.store.rewards import add_feedback, score_again
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.judge_book import StoreJudgeBook
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.worker_stage import accepted, answer, fill, rows, worker_context, worker_settings, write_hook


@pytest.mark.law(3)
async def test_a_trace_comes_from_waiting_to_trained(tmp_path: Path, store_url: str) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace, session): return 0.5\n")
    settings = worker_settings(tmp_path, store={"url": store_url}, worker={"evidence_timeout": 0, "merge_wait": 60})
    with (
        worker_context(settings, answer(accepted), owner="a:1:1") as one,
        worker_context(settings, answer(accepted), owner="b:2:2") as two,
    ):
        traces = [make_trace(id=f"t{n}", session=f"s{n}", response_id=f"r{n}") for n in range(20)]
        fill(one.engine, *traces, closed=True, held_out=("s0",))
        assert sum(await asyncio.gather(Scorer(one).round(), Scorer(two).round())) == 20
        with one.engine.begin() as c:
            assert forwarding.settle_support(c, ["t1"]) == ["t1"]
            add_feedback(c, "alpha", "r2", -1.0, "no", time.time())
        assert await feedback_round(one) == 1
        assert sum(await asyncio.gather(Forwarder(one).round(), Forwarder(two).round())) == 18
        with one.engine.begin() as c:
            assert forwarding.mark_trained(c, ["t2", "t3"]) == 2
            assert score_again(c, "alpha", trace_id="t4") == 1
        found = rows(one.engine, "reward", "purpose", "forward", "score")
        assert found[:5] == [
            (0.5, "held_out", "skipped", "scored"),
            (0.5, "support", "skipped", "scored"),
            (-1.0, "query", "trained", "scored"),
            (0.5, "query", "trained", "scored"),
            (0.5, "query", "forwarded", "waiting"),
        ]


def test_a_lease_is_one_owners_until_it_ends_or_is_given_back(store_url: str, tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path, store={"url": store_url})) as ctx, ctx.engine.begin() as c:
        assert leases.acquire(c, "x", "a", 100.0, 10.0)
        assert leases.acquire(c, "x", "a", 105.0, 10.0)
        assert not leases.acquire(c, "x", "b", 114.0, 10.0)
        assert leases.acquire(c, "x", "b", 116.0, 10.0)
        leases.release(c, "x", "a")
        assert leases.holders(c) == {"b"}
        leases.release_all(c, "b")
        assert leases.acquire(c, "x", "a", 117.0, 10.0)


def test_the_judges_book_is_kept(store_url: str, tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path, store={"url": store_url})) as ctx:
        book = StoreJudgeBook(ctx.engine)
        book.enter("2026-11-22", Spent(1, 0.5), Judgement("k", "gone", {"value": 1.0}))
        assert book.find("k", "2026-11-22") == ({"value": 1.0}, Spent(1, 0.5))
        assert book.forget_old() == 1
