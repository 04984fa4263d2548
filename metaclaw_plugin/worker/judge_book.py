"""What the judge said and spent, in the store, so that neither a restart nor a second worker asks or pays again."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.rewards.judge import Judgement, Spent
from sqlalchemy.engine import Engine

from metaclaw_plugin.store.counters import count, read_counters
from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import judgements, traces

KEPT = 30 * 86_400.0  # seconds
_CALLS, _DOLLARS = "judge_calls", "judge_microdollars"  # counters, by day


class StoreJudgeBook:
    """A ``metaclaw_hooks.rewards.judge.JudgeBook`` over the store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find(self, key: str, day: str) -> tuple[dict[str, Any] | None, Spent]:
        with self._engine.connect() as c:
            found = c.execute(sa.select(judgements.c.value).where(judgements.c.key == key)).scalar_one_or_none()
            calls = read_counters(c, _CALLS).get(_CALLS, {}).get(day, 0)
            microdollars = read_counters(c, _DOLLARS).get(_DOLLARS, {}).get(day, 0)
        return (None if found is None else dict(found)), Spent(calls, microdollars / 1e6)

    def enter(self, day: str, spent: Spent, judgement: Judgement | None) -> None:
        if not spent.calls and judgement is None:
            return
        with self._engine.begin() as c:
            if spent.calls:
                count(c, _CALLS, day, spent.calls)
            if spent.dollars:
                count(c, _DOLLARS, day, round(spent.dollars * 1e6))
            if judgement is not None:
                result = dict(judgement.result)
                values = {"key": judgement.key, "trace_id": judgement.trace_id, "value": result, "at": time.time()}
                c.execute(dialect_insert(c, judgements).values(**values).on_conflict_do_nothing())

    def forget_old(self) -> int:
        """Drop judgements of more than thirty days ago, and of traces that were deleted; returns how many."""
        gone = ~sa.exists().where(traces.c.id == judgements.c.trace_id)
        with self._engine.begin() as c:
            return c.execute(sa.delete(judgements).where(sa.or_(judgements.c.at < time.time() - KEPT, gone))).rowcount
