"""The clock is set back an hour after it was an hour ahead: nothing waits until it has caught up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from metaclaw_plugin.store import schema
from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.worker_stage import accepted, answer, fill, rows, worker_context, worker_settings, write_hook

HOUR = 3600.0


@pytest.mark.law(5)
async def test_what_ended_an_hour_from_now_is_scored(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace, next_trace): return 1.0\n")
    settings = worker_settings(tmp_path, worker={"evidence_timeout": 60})
    with worker_context(settings) as ctx:
        fill(ctx.engine, make_trace(finished_at=time.time() + HOUR), make_trace(id="t2", finished_at=time.time() + 5))
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "id", "score") == [("t1", "scored"), ("t2", "waiting")]


@pytest.mark.law(5)
async def test_what_was_scored_an_hour_from_now_is_forwarded(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 1.0\n")
    settings = worker_settings(tmp_path, worker={"merge_wait": 60})
    with worker_context(settings, answer(accepted)) as ctx:
        fill(ctx.engine, make_trace())
        assert await Scorer(ctx).round() == 1
        assert await Forwarder(ctx).round() == 0
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).values(scored_at=time.time() + HOUR))
        assert await Forwarder(ctx).round() == 1
