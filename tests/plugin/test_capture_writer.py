"""Traces are stored before anyone is told so, and what cannot be stored is counted (laws 3 and 5)."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Kind, Sampling, Trace
from sqlalchemy.engine import Engine

from metaclaw_plugin.capture import writer as writing
from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.capture.quota import Quota
from metaclaw_plugin.capture.writer import LATE, LOST, UNRECORDED, TraceWriter, Written
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.counters import count_all, read_counters
from metaclaw_plugin.store.deletion import delete_all
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import OVER_QUOTA, STORED_BYTES, TraceFilter, get_trace, stored_bytes

TRACE = Trace(
    id="tr-0", request_id="tr-0", agent="alpha", session="s", turn=0, exchange=0, kind=Kind.MAIN, route="chat",
    model="metaclaw-base", adapter_version=0, messages=({"role": "user", "content": "hi"},), tools=(),
    response={"role": "assistant", "content": "ho"}, finish_reason="stop", prompt_token_ids=(1, 2),
    response_token_ids=(3,), response_logprobs=(-0.1,), sampling=Sampling(1.0, 1.0), skills=(), skill_generation=0,
    chat_template_hash=None, response_id="r", started_at=1.0, first_token_at=1.1, finished_at=1.2, trainable=True,
    reason=None,
)  # fmt: skip


def nothing(_: sa.Connection) -> None:
    return


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def engine(database: Path) -> Iterator[Engine]:
    engine = open_store(f"sqlite:///{database}")
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Iterator[GroupCommit]:
    store = GroupCommit(engine)
    yield store
    assert store.close(10)


class Told(Counter[str]):
    """What a writer was counted for."""

    def __call__(self, name: str, agent: str, n: int) -> None:
        self[name] += n


@pytest.fixture
def told() -> Told:
    return Told()


class Hold:
    """Keeps SQLite's write lock, as a store that does not answer would."""

    def __init__(self, database: Path) -> None:
        self._connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


def stored(database: Path) -> list[str]:
    """Ids that another process would see."""
    with sqlite3.connect(database) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM traces ORDER BY seq")]


@pytest.mark.law(3)
async def test_when_write_returns_true_another_process_sees_the_trace(
    store: GroupCommit, database: Path, told: Told, engine: Engine
) -> None:
    assert await TraceWriter(store, Quota(None), told).write("alpha", [TRACE], nothing, 5.0) is Written.STORED
    assert stored(database) == ["tr-0"]
    with engine.connect() as c:
        assert get_trace(c, "tr-0") == TRACE


async def test_what_comes_after_is_in_the_same_transaction(store: GroupCommit, database: Path, told: Told) -> None:
    def fail(_: sa.Connection) -> None:
        raise ValueError("no")

    assert await TraceWriter(store, Quota(None), told).write("alpha", [TRACE], fail, 5.0) is Written.LATE
    assert stored(database) == []
    assert told == {LATE: 1, LOST: 1}


@pytest.mark.law(3)
async def test_a_trace_written_twice_is_stored_once(store: GroupCommit, database: Path, told: Told) -> None:
    writer = TraceWriter(store, Quota(None), told)
    assert await writer.write("alpha", [TRACE], nothing, 5.0) is Written.STORED
    assert await writer.write("alpha", [TRACE], nothing, 5.0, alone=True) is Written.STORED
    assert stored(database) == ["tr-0"]


async def test_a_request_that_is_alone_waits_for_its_commit_and_for_nothing_else(
    store: GroupCommit, database: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_MOMENT", 5.0)
    put_off: list[str] = []
    asyncio.get_running_loop().call_soon(put_off.append, "the upstream's log")
    assert (
        await TraceWriter(store, Quota(None), told).write("alpha", [TRACE], nothing, 5.0, alone=True) is Written.STORED
    )
    assert stored(database) == ["tr-0"]
    assert put_off == []


@pytest.mark.law(5)
async def test_a_store_that_does_not_answer_costs_the_wait_and_no_more(
    store: GroupCommit, database: Path, told: Told
) -> None:
    hold = Hold(database)
    written = await TraceWriter(store, Quota(None), told).write("alpha", [TRACE], nothing, 0.05, alone=True)
    assert written is Written.LATE
    assert told == {LATE: 1}
    hold.release()
    await until(lambda: stored(database) == ["tr-0"])


@pytest.mark.law(5)
async def test_a_store_that_refuses_is_tried_again_and_nothing_is_lost(
    store: GroupCommit, database: Path, told: Told, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_RETRY_DELAYS", (0.05, 0.05, 0.05))
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE traces RENAME TO gone")
    write = asyncio.create_task(TraceWriter(store, Quota(None), told).write("alpha", [TRACE], nothing, 5.0))
    assert await write is Written.LATE
    assert told == {LATE: 1}, "the process may die before it is stored"
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE gone RENAME TO traces")
    await until(lambda: stored(database) == ["tr-0"])
    assert LOST not in told


@pytest.mark.law(5)
async def test_what_is_lost_for_good_is_counted_in_the_store(
    store: GroupCommit, told: Told, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_RETRY_DELAYS", ())
    writer = TraceWriter(store, Quota(None), told)
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE traces RENAME TO gone")
    await writer.write("alpha", [TRACE, replace(TRACE, id="tr-1")], nothing, 5.0)
    await until(lambda: counters(engine) == {LOST: {"alpha": 2}, LATE: {"alpha": 1}})
    assert told == {LOST: 2, LATE: 1}


@pytest.mark.law(5)
async def test_what_was_counted_while_the_store_was_away_is_in_it_as_soon_as_it_answers_without_any_trace(
    store: GroupCommit, database: Path, engine: Engine, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_COUNT_AGAIN", 0.02)
    writer = TraceWriter(store, Quota(None), told)
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE counters RENAME TO gone")
    for _ in range(3):
        writer.count(UNRECORDED, "alpha", 2)
        await asyncio.sleep(0.03)
    assert told == {UNRECORDED: 6}
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE gone RENAME TO counters")
    await until(lambda: counters(engine) == {UNRECORDED: {"alpha": 6}})
    assert stored(database) == []


@pytest.mark.law(5)
async def test_a_process_that_ends_tries_what_waits_once_more_and_tells_the_store_what_it_counted(
    store: GroupCommit, database: Path, engine: Engine, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_RETRY_DELAYS", (600.0,))
    monkeypatch.setattr(writing, "_COUNT_AGAIN", 600.0)
    writer = TraceWriter(store, Quota(None), told)
    hold = Hold(database)
    with engine.connect() as c:
        c.exec_driver_sql("PRAGMA busy_timeout=10")  # of the one connection that there is: the pool's
    late = await writer.write("alpha", [TRACE], nothing, 0.05)
    await until(lambda: bool(writer._waiting))
    hold.release()
    assert late is Written.LATE
    assert stored(database) == []
    assert writer.close(10)
    assert stored(database) == ["tr-0"]
    assert counters(engine) == {LATE: {"alpha": 1}}


@pytest.mark.law(5)
async def test_counts_that_no_store_took_are_in_the_log(
    store: GroupCommit, engine: Engine, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TraceWriter(store, Quota(None), told)
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE counters RENAME TO gone")
    writer.count(UNRECORDED, "alpha", 2)
    assert writer.close(10)
    assert "did not take what was counted: {'requests_unrecorded of alpha': 2}" in caplog.text


@pytest.mark.law(5)
async def test_over_its_quota_the_store_takes_no_more_and_says_so(
    store: GroupCommit, database: Path, told: Told, engine: Engine
) -> None:
    writer = TraceWriter(store, Quota(1), told)
    assert await writer.write("alpha", [TRACE], nothing, 5.0) is Written.OVER_QUOTA
    assert stored(database) == []
    assert counters(engine) == {OVER_QUOTA: {"alpha": 1}}
    assert told == {OVER_QUOTA: 1}


def test_traces_of_one_transaction_do_not_pass_the_quota_together(store: GroupCommit, engine: Engine) -> None:
    rows = [encode_trace(replace(TRACE, id=f"tr-{n}")) for n in range(3)]
    quota = Quota(2 * rows[0]["size"])
    gate = threading.Event()
    store.submit(lambda _: None, prepare=gate.wait)
    futures = [
        store.submit(lambda c, row=row: quota.insert(c, [row]), counts=lambda report: report.counts)  # type: ignore[misc]
        for row in rows
    ]
    gate.set()
    assert [len(future.result(5).stored) for future in futures] == [1, 1, 0]
    with engine.connect() as c:
        assert stored_bytes(c) == 2 * rows[0]["size"]


def test_a_store_is_full_from_the_first_trace_that_does_not_fit_until_one_is_deleted(engine: Engine) -> None:
    rows = [encode_trace(replace(TRACE, id=f"tr-{n}")) for n in range(2)]
    quota = Quota(int(1.5 * rows[0]["size"]))
    full = []
    for row in rows:
        with engine.begin() as c:
            count_all(c, quota.insert(c, [row]).counts)
        with engine.begin() as c:
            full.append(quota.is_full(c))
    assert full == [False, True]
    delete_all(engine, TraceFilter(id="tr-0"))
    with engine.begin() as c:
        assert not quota.is_full(c)


def counters(engine: Engine) -> dict[str, dict[str, int]]:
    """What the store counts, but for its own size."""
    with engine.connect() as c:
        return {name: labels for name, labels in read_counters(c).items() if name != STORED_BYTES}


async def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
