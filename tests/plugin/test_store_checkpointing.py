"""SQLite's log is written back beside the requests."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from metaclaw_plugin.store import checkpointing
from metaclaw_plugin.store.checkpointing import checkpoint_beside, write_back
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces, iter_traces
from tests.store_cases import a_trace


def fill(engine: sa.Engine, count: int, first: int = 0) -> None:
    tokens = tuple(range(20_000))
    for number in range(first, first + count):
        with engine.begin() as c:
            insert_traces(c, [a_trace(id=f"tr-{number}", prompt_token_ids=tokens)])


def test_no_commit_writes_the_log_back_and_the_thread_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "LONG", 500_000)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    checkpoint_beside(engine)
    with engine.connect() as c:
        assert c.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar() == 0
    database, log = tmp_path / "metaclaw.db", tmp_path / "metaclaw.db-wal"
    before = database.stat().st_size
    fill(engine, 1)
    while log.stat().st_size < 500_000:
        fill(engine, 10, first=log.stat().st_size)
    deadline = time.monotonic() + 20
    while database.stat().st_size == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert database.stat().st_size > before


def test_log_that_was_written_back_begins_anew_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "LONG", 100_000)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    log = tmp_path / "metaclaw.db-wal"
    assert not write_back(engine, log)
    fill(engine, 30)
    long = log.stat().st_size
    assert write_back(engine, log)
    fill(engine, 5, first=100)
    assert log.stat().st_size <= max(long, 1_048_576)
    engine.dispose()
    with open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}").connect() as c:
        assert len(list(iter_traces(c))) == 35


def test_writers_go_on_while_a_reader_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "LONG", 100_000)
    monkeypatch.setattr(checkpointing, "TOO_LONG", 10**9)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    fill(engine, 10)
    reader = sqlite3.connect(tmp_path / "metaclaw.db")
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM traces").fetchone() == (10,)
    fill(engine, 10, first=10)
    assert write_back(engine, tmp_path / "metaclaw.db-wal")
    fill(engine, 10, first=20)
    assert reader.execute("SELECT count(*) FROM traces").fetchone() == (10,)
    reader.close()


def test_a_store_without_such_a_log_is_left_alone() -> None:
    assert checkpoint_beside(sa.create_engine("sqlite://")) is None
