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
from metaclaw_plugin.capture.writer import LATE, LOST, UNRECORDED, TraceWriter
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import get_trace

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
    assert await TraceWriter(store, None, told).write("alpha", [TRACE], nothing, 5.0)
    assert stored(database) == ["tr-0"]
    with engine.connect() as c:
        assert get_trace(c, "tr-0") == TRACE


async def test_what_comes_after_is_in_the_same_transaction(store: GroupCommit, database: Path, told: Told) -> None:
    def fail(_: sa.Connection) -> None:
        raise ValueError("no")

    assert not await TraceWriter(store, None, told).write("alpha", [TRACE], fail, 5.0)
    assert stored(database) == []
    assert told == {LOST: 1}


@pytest.mark.law(3)
async def test_a_trace_written_twice_is_stored_once(store: GroupCommit, database: Path, told: Told) -> None:
    writer = TraceWriter(store, None, told)
    assert await writer.write("alpha", [TRACE], nothing, 5.0)
    assert await writer.write("alpha", [TRACE], nothing, 5.0, alone=True)
    assert stored(database) == ["tr-0"]


async def test_a_request_that_is_alone_waits_for_its_commit_and_for_nothing_else(
    store: GroupCommit, database: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_MOMENT", 5.0)
    put_off: list[str] = []
    asyncio.get_running_loop().call_soon(put_off.append, "the upstream's log")
    assert await TraceWriter(store, None, told).write("alpha", [TRACE], nothing, 5.0, alone=True)
    assert stored(database) == ["tr-0"]
    assert put_off == []


@pytest.mark.law(5)
async def test_a_store_that_does_not_answer_costs_the_wait_and_no_more(
    store: GroupCommit, database: Path, told: Told
) -> None:
    hold = Hold(database)
    assert not await TraceWriter(store, None, told).write("alpha", [TRACE], nothing, 0.05, alone=True)
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
    write = asyncio.create_task(TraceWriter(store, None, told).write("alpha", [TRACE], nothing, 5.0))
    assert not await write
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE gone RENAME TO traces")
    await until(lambda: stored(database) == ["tr-0"])
    assert LOST not in told


@pytest.mark.law(5)
async def test_what_is_lost_for_good_is_counted_in_the_store_as_soon_as_it_answers(
    store: GroupCommit, told: Told, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_RETRY_DELAYS", ())
    writer = TraceWriter(store, None, told)
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE traces RENAME TO gone")
    assert not await writer.write("alpha", [TRACE, replace(TRACE, id="tr-1")], nothing, 5.0)
    await until(lambda: told[LOST] == 2)
    with engine.begin() as c:
        c.exec_driver_sql("ALTER TABLE gone RENAME TO traces")
    assert await writer.write("alpha", [replace(TRACE, id="tr-2")], nothing, 5.0)
    with engine.connect() as c:
        assert read_counters(c, LOST) == {LOST: {"alpha": 2}}


@pytest.mark.law(5)
async def test_what_went_unrecorded_is_counted_in_the_store_with_the_next_trace(
    store: GroupCommit, engine: Engine, told: Told
) -> None:
    writer = TraceWriter(store, None, told)
    writer.count(UNRECORDED, "alpha", 2)
    assert told == {UNRECORDED: 2}
    assert await writer.write("alpha", [TRACE], nothing, 5.0)
    assert await writer.write("alpha", [replace(TRACE, id="tr-1")], nothing, 5.0)
    with engine.connect() as c:
        assert read_counters(c, UNRECORDED) == {UNRECORDED: {"alpha": 2}}


@pytest.mark.law(5)
async def test_over_its_quota_the_store_takes_no_more_and_says_so(
    store: GroupCommit, database: Path, told: Told, engine: Engine
) -> None:
    writer = TraceWriter(store, 1, told)
    assert await writer.write("alpha", [TRACE], nothing, 5.0)
    assert stored(database) == []
    with engine.connect() as c:
        assert read_counters(c, "traces_over_quota") == {"traces_over_quota": {"alpha": 1}}


def test_jobs_that_wait_together_share_a_transaction(store: GroupCommit, database: Path) -> None:
    gate = threading.Event()
    first = store.submit(lambda _: gate.wait(5))
    commits: list[int] = []
    later = [store.submit(lambda c: commits.append(id(c.get_transaction()))) for _ in range(20)]
    gate.set()
    assert first.result(5)
    for future in later:
        future.result(5)
    assert len(set(commits)) == 1


def test_a_job_that_fails_takes_no_other_with_it(store: GroupCommit, engine: Engine) -> None:
    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))

    def half(c: sa.Connection) -> None:
        add_agent(c, "half")
        raise ValueError("after the write")

    before = store.submit(lambda c: add_agent(c, "before"))
    failed = store.submit(half)
    after = store.submit(lambda c: add_agent(c, "after"))
    gate.set()
    before.result(5)
    after.result(5)
    with pytest.raises(ValueError, match="after the write"):
        failed.result(5)
    with engine.connect() as c:
        assert set(c.scalars(sa.select(schema.agents.c.name))) == {"before", "after"}


def test_a_store_in_trouble_is_told_as_our_own_error(store: GroupCommit, engine: Engine) -> None:
    with pytest.raises(StoreError):
        store.submit(lambda c: c.exec_driver_sql("SELECT * FROM nowhere")).result(5)


def test_slow_preparation_holds_no_lock(store: GroupCommit, engine: Engine) -> None:
    gate, reached = threading.Event(), threading.Event()

    def prepare() -> None:
        reached.set()
        gate.wait(5)

    slow = store.submit(lambda c: add_agent(c, "slow"), prepare)
    assert reached.wait(5)
    with engine.begin() as c:
        add_agent(c, "quick")
    gate.set()
    assert slow.result(5).name == "slow"


def test_a_job_that_was_cancelled_in_time_is_never_run(store: GroupCommit) -> None:
    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))
    ran: list[bool] = []
    unwanted = store.submit(lambda _: ran.append(True))
    assert unwanted.cancel()
    gate.set()
    store.submit(lambda _: None).result(5)
    assert not ran


async def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_result_that_was_rolled_back_is_given_up(store: GroupCommit, engine: Engine) -> None:
    taken: list[str] = []
    given_up: list[str] = []

    def take(c: sa.Connection) -> str:
        taken.append(f"ticket {len(taken)}")
        return taken[-1]

    def fail(_: sa.Connection) -> None:
        raise ValueError("no")

    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))
    kept = store.submit(take, discard=given_up.append)
    failed = store.submit(fail)
    gate.set()
    assert isinstance(failed.exception(10), ValueError)
    assert kept.result(10) == "ticket 1"
    assert given_up == ["ticket 0"]
