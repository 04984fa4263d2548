"""One way to open the trainer's store: SQLite in WAL mode by default, PostgreSQL by URL."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_trainer.errors import StoreError
from metaclaw_trainer.sqlite_file import keep_to_path
from metaclaw_trainer.upgrade import upgrade

BUSY_TIMEOUT_MS = 10_000
_SET_UP_LOCK = 0x6D637472  # advisory lock of whoever creates the tables


class Store:
    """Transactions on the trainer's database. Any number of threads and processes may use it.

    A write transaction on SQLite takes the write lock at once, so read-then-write is safe; on PostgreSQL the rows that
    decide are locked by the statements themselves.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._writer = engine.execution_options(metaclaw_write=True)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with _translated(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is durable when the block ends, and undone when it raises."""
        with _translated(), self._writer.begin() as connection:
            yield connection

    @property
    def is_postgresql(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    def close(self) -> None:
        self.engine.dispose()


def open_store(url: str) -> Store:
    """Open the store at ``url`` and create what is missing in it.

    Raises:
        StoreError: if the database cannot be opened.
    """
    try:
        parsed = sa.make_url(url)
    except SQLAlchemyError as error:
        raise StoreError("setting metaclaw.trainer.store is no database URL; see SQLAlchemy's database URLs") from error
    if parsed.drivername in {"postgresql", "postgres"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    try:
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            _make_private(Path(parsed.database))
        engine = sa.create_engine(
            parsed,
            pool_pre_ping=parsed.get_backend_name() != "sqlite",
            pool_timeout=30,
            hide_parameters=True,
        )
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _configure_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
        store = Store(engine)
        with store.write() as connection:
            if store.is_postgresql:  # two processes that start at once must not both create
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SET_UP_LOCK)))
            upgrade(connection)
        if engine.dialect.name == "sqlite":
            keep_to_path(engine)
    except (SQLAlchemyError, OSError, ModuleNotFoundError) as error:
        raise StoreError(f"cannot open the trainer's store {shown}: {_first_line(error)}") from error
    return store


def _make_private(path: Path) -> None:
    """Make an empty database that its owner alone may read; SQLite gives its side files the same rights."""
    if path.name == ":memory:" or str(path).startswith("file:"):
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


def insert_missing(c: sa.Connection, table: sa.Table, values: dict[str, Any]) -> None:
    """Insert a row unless one of its key is there; two processes that do so at once both succeed."""
    insert: Any = (postgresql if c.dialect.name == "postgresql" else sqlite).insert(table)
    c.execute(insert.values(**values).on_conflict_do_nothing())


def _switch_to_wal(cursor: Any) -> None:
    """SQLite does not wait where two switch a new database at once, lest they wait for each other."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    _switch_to_wal(cursor)
    # FULL: a sample that was acknowledged survives a loss of power, not only of the process.
    for pragma in ("synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("metaclaw_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreError(f"the trainer's store failed: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).splitlines()[0][:300] if str(cause) else type(cause).__name__
