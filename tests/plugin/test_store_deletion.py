"""Deletion and retention: complete, counted, and carried to the trainer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.wire import RecallReply
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.settings import StoreSettings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.deletion import (
    BY_OWNER,
    BY_RETENTION,
    TRAINED_AND_DELETED,
    DeletionReport,
    delete_all,
    delete_empty_sessions,
    delete_traces,
    open_recalls,
    settle_recalls,
)
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.retention import DAY, EXPIRED, due, retain, sweep_sessions
from metaclaw_plugin.store.sessions import Evidence, Place, close_session, settle_turn
from metaclaw_plugin.store.traces import TraceFilter, insert_traces, iter_traces, stored_bytes
from metaclaw_plugin.worker.retention import Retention, recall_round
from tests.store_cases import TRACE, a_trace, opened
from tests.worker_stage import worker_context, worker_settings

SECRET = "the launch code is 7 7 7"


def furnish(store: Engine, agent: str, turns: int = 2, at: float = 1.0) -> str:
    """A session of ``agent`` with everything that a session can have; returns its id."""
    with store.begin() as c:
        session = opened(c, agent, Evidence("x-session-id", SECRET), at)
        settle_turn(c, agent, Place(session, False, 0, 0, True, None), [f"{agent}-hash"], at, None)
        injection = {"session": session, "anchor": "system", "block": SECRET, "skills": [], "at": at}
        c.execute(schema.injections.insert().values(**injection))
        for turn in range(turns):
            trace = a_trace(
                id=f"{agent}-{turn}",
                agent=agent,
                session=session,
                turn=turn,
                messages=({"role": "user", "content": SECRET},),
                response_id=f"resp-{agent}-{turn}",
                finished_at=at,
            )
            insert_traces(c, [trace])
            reward = {"source": "judge", "value": 1.0, "confidence": 1.0, "rationale": SECRET, "at": at}
            c.execute(schema.rewards.insert().values(trace_id=trace.id, **reward))
        for n, target in enumerate((f"{agent}-0", f"resp-{agent}-1")):
            feedback = {"agent": agent, "value": 1.0, "comment": SECRET, "at": at, "target": target}
            c.execute(schema.feedback.insert().values(id=f"{agent}-f{n}", **feedback))
    return session


def rows(store: Engine, table: sa.Table) -> list[Any]:
    with store.connect() as c:
        return list(c.execute(sa.select(table)))


def test_deletion_takes_everything_of_the_agent_and_reports_it(store: Engine) -> None:
    furnish(store, "alpha")
    report = delete_all(store, TraceFilter(agent="alpha"))
    assert report == DeletionReport(
        traces=2, bytes=report.bytes, rewards=2, feedback=2, sessions=1, chain=1, injections=1, recalls=0
    )
    assert report.bytes > 0
    for table in schema.metadata.sorted_tables:
        assert table.name == "counters" or rows(store, table) == []
    with store.connect() as c:
        assert stored_bytes(c) == 0


@pytest.mark.law(4)
def test_law_4_deletion_leaves_other_agents_alone(store: Engine) -> None:
    furnish(store, "alpha")
    session = furnish(store, "beta")
    tables = (schema.rewards, schema.feedback, schema.injections, schema.chain)
    delete_all(store, TraceFilter(agent="alpha"))
    assert [len(rows(store, table)) for table in tables] == [2, 2, 1, 1]
    with store.connect() as c:
        assert [trace.session for trace in iter_traces(c)] == [session] * 2
        assert stored_bytes(c) == sum(encode_trace(trace)["size"] for trace in iter_traces(c))


def test_part_of_a_session_leaves_the_session(store: Engine) -> None:
    furnish(store, "alpha")
    report = delete_all(store, TraceFilter(id="alpha-0"))
    assert (report.traces, report.rewards, report.feedback, report.sessions) == (1, 1, 1, 0)
    assert len(rows(store, schema.sessions)) == len(rows(store, schema.chain)) == 1


def test_session_with_a_request_under_way_keeps_its_row_and_nothing_else(store: Engine) -> None:
    session = furnish(store, "alpha", at=time.time())
    report = delete_all(store, TraceFilter(session=session))
    assert (report.traces, report.sessions, report.chain, report.injections) == (2, 0, 1, 1)
    (row,) = rows(store, schema.sessions)
    assert (row.id, row.close_reason) == (session, "deleted")
    with store.begin() as c:
        insert_traces(c, [a_trace(session=session)])
        assert delete_empty_sessions(c, time.time() + 1).sessions == 0
    delete_all(store, TraceFilter())
    with store.begin() as c:
        assert delete_empty_sessions(c, time.time() + 1).sessions == 1


def test_deletion_by_age(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}", finished_at=float(n)) for n in range(10)])
    assert delete_all(store, TraceFilter(until=4.0)).traces == 4
    with store.connect() as c:
        assert [trace.finished_at for trace in iter_traces(c)] == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_deletion_goes_in_small_transactions(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}") for n in range(450)])
        assert delete_traces(c, TraceFilter()).traces == 200
    assert delete_all(store, TraceFilter()).traces == 250


def test_deleted_text_is_gone_from_the_files_of_sqlite(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    furnish(store, "alpha")
    needles = [SECRET.encode(), encode_trace(a_trace(messages=({"role": "user", "content": SECRET},)))["body"][:40]]

    def found() -> bool:
        content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        return any(needle in content for needle in needles)

    assert found()
    delete_all(store, TraceFilter(agent="alpha"))
    assert not found()
    store.dispose()


def sent(store: Engine, forward: str) -> None:
    """Three traces in one sample, and one in another."""
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}") for n in range(4)])
        t = schema.traces
        c.execute(t.update().where(t.c.id != "tr-3").values(forward=forward, sample_id="s-1"))
        c.execute(t.update().where(t.c.id == "tr-3").values(forward=forward, sample_id="s-2"))


def test_what_was_merged_with_a_deleted_trace_is_merged_anew(store: Engine) -> None:
    sent(store, "merged")
    assert delete_all(store, TraceFilter(id="tr-1")).recalls == 1
    found = {row.id: (row.forward, row.sample_id) for row in rows(store, schema.traces)}
    assert found == {"tr-0": ("waiting", None), "tr-2": ("waiting", None), "tr-3": ("merged", "s-2")}


def test_trainer_is_told_until_it_answers(store: Engine) -> None:
    sent(store, "forwarded")
    delete_all(store, TraceFilter(id="tr-1"))
    with store.begin() as c:
        assert open_recalls(c) == ["tr-1"]
        settle_recalls(c, ["tr-1"], RecallReply(removed=["s-1"], trained_into=["alpha@v4"]))
        assert open_recalls(c) == []
        assert read_counters(c, TRAINED_AND_DELETED) == {TRAINED_AND_DELETED: {"alpha@v4": 1}}
    found = {row.id: row.forward for row in rows(store, schema.traces)}
    assert found == {"tr-0": "skipped", "tr-2": "skipped", "tr-3": "forwarded"}


def test_traces_that_never_left_are_not_recalled(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [TRACE])
    assert delete_all(store, TraceFilter()).recalls == 0


async def test_worker_carries_recalls_to_the_trainer(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def trainer(request: httpx.Request) -> httpx.Response:
        asked.append(request.content)
        if len(asked) == 1:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"removed": ["s-1"], "trained_into": []})

    settings = worker_settings(tmp_path)
    with worker_context(settings, httpx.MockTransport(trainer)) as ctx:
        assert not await recall_round(ctx)
        sent(ctx.engine, "forwarded")
        delete_all(ctx.engine, TraceFilter(id="tr-1"))
        with pytest.raises(TrainerUnavailableError):
            await recall_round(ctx)
        assert await recall_round(ctx)
        assert not await recall_round(ctx)
    assert [b'"tr-1"' in body for body in asked] == [True, True]


def test_retention_by_age(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}", finished_at=n * DAY) for n in range(10)])
        settings = StoreSettings(keep_days=3.0)
        assert due(c, settings, 9 * DAY)
        assert retain(c, settings, 9 * DAY).traces == 6
        assert not due(c, settings, 9 * DAY)
        assert retain(c, settings, 9 * DAY) == DeletionReport()
        assert [trace.id for trace in iter_traces(c)] == ["tr-6", "tr-7", "tr-8", "tr-9"]
        assert read_counters(c, EXPIRED) == {EXPIRED: {"age": 6}}


def test_retention_by_size_deletes_the_oldest_and_no_more_than_it_must(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}") for n in range(10)])
        size = stored_bytes(c) // 10
        assert due(c, StoreSettings(keep_bytes=7 * size), 0.0)
        assert retain(c, StoreSettings(keep_bytes=7 * size), 0.0).traces == 3
        assert not due(c, StoreSettings(keep_bytes=7 * size), 0.0)
        assert retain(c, StoreSettings(keep_bytes=7 * size), 0.0).traces == 0
        assert [trace.id for trace in iter_traces(c)] == [f"tr-{n}" for n in range(3, 10)]


def test_what_goes_for_its_age_or_for_room_is_recalled_but_is_no_deletion_by_the_owner(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}", finished_at=n * DAY) for n in range(4)])
        c.execute(schema.traces.update().values(forward="trained", sample_id="s-1"))
        assert retain(c, StoreSettings(keep_days=3.0), 4 * DAY).sent == (("alpha", "tr-0"),)
        assert retain(c, StoreSettings(keep_bytes=stored_bytes(c) - 1), 0.0).traces == 1
        assert delete_traces(c, TraceFilter(id="tr-2")).traces == 1
        assert open_recalls(c) == ["tr-0", "tr-1", "tr-2"]
    causes = {row.trace_id: row.cause for row in rows(store, schema.recalls)}
    assert causes == {"tr-0": BY_RETENTION, "tr-1": BY_RETENTION, "tr-2": BY_OWNER}


def test_retention_keeps_everything_by_default(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(finished_at=0.0)])
        assert not due(c, StoreSettings(), 1e12)
        assert retain(c, StoreSettings(), 1e12).traces == 0


def test_closed_sessions_without_a_trace_are_forgotten_in_the_end(store: Engine) -> None:
    with store.begin() as c:
        gone = opened(c, "alpha", Evidence("x-session-id", "gone"), 0.0)
        still_open = opened(c, "alpha", Evidence("x-session-id", "open"), 0.0)
        close_session(c, gone, "idle", 1.0)
        assert sweep_sessions(c, 6 * DAY).sessions == 0
        assert sweep_sessions(c, 8 * DAY).sessions == 1
    assert [row.id for row in rows(store, schema.sessions)] == [still_open]


async def test_worker_deletes_batch_by_batch_until_nothing_is_due(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path, store={"keep_days": 1.0})
    with worker_context(settings) as ctx:
        with ctx.engine.begin() as c:
            insert_traces(c, [a_trace(id=f"old-{n}", finished_at=1.0) for n in range(150)])
            insert_traces(c, [a_trace(id="new", finished_at=time.time())])
            gone = opened(c, "alpha", Evidence("x-session-id", "gone"), 0.0)
            close_session(c, gone, "idle", 1.0)
        retention = Retention(ctx)
        rounds = 0
        while await retention.round():
            rounds += 1
        assert rounds == 2
        with ctx.engine.connect() as c:
            assert [trace.id for trace in iter_traces(c)] == ["new"]
            assert c.execute(sa.select(schema.sessions)).all() == []
