"""One way to open the store, and two ways to use it.

``with engine.begin() as c:`` writes: on SQLite it takes the write lock at once (``BEGIN IMMEDIATE``), so that what is
read in it still holds when it writes. ``with engine.connect() as c:`` reads a consistent snapshot and locks nobody out;
do not write through it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.sqlite_file import file_of, make_private, stay_with_file
from metaclaw_plugin.store.upgrade import bring_up_to_date, is_up_to_date

_BUSY = 5.0  # seconds that a connection waits for another's lock
# libpq's, unless the URL says otherwise: a server that has vanished is known for it within seconds, and not after TCP's
# quarter of an hour. One that hangs keeps its connections; whoever waits for it must bound the wait.
_REMOTE = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # milliseconds
}
_WRITES = "metaclaw_writes"  # execution option of a connection whose transaction will write
_SET_UP_LOCK = 0x6D657461  # advisory lock that keeps two processes from creating tables at once


class StoreEngine(Engine):
    """An engine whose ``begin()`` announces that its transaction will write."""

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that writes; committed at the end of the block, rolled back when it raises."""
        with self.connect() as plain:
            connection = plain.execution_options(**{_WRITES: True})
            with connection.begin():
                yield connection


def open_store(url: str, statement_timeout: float | None = None) -> Engine:
    """Open the store at ``url``; an empty one gets its tables, one of an older release is upgraded.

    SQLite runs in WAL mode: what was committed survives ``kill -9`` of any process. ``statement_timeout``: seconds
    after which PostgreSQL ends a statement, for a process in which requests wait; an upgrade takes what it takes.

    Raises:
        StoreError: if the database cannot be opened.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        if (path := file_of(parsed)) is not None:
            make_private(Path(path))
        remote = parsed.get_backend_name() == "postgresql"
        given = {name: value for name, value in _REMOTE.items() if name not in parsed.query} if remote else {}
        plain = sa.create_engine(parsed, pool_pre_ping=remote, connect_args=given)
    except (SQLAlchemyError, OSError, ImportError, ValueError) as error:
        raise StoreError(f"cannot open the store {_shown(url)}: {error}; check metaclaw.store.url") from error
    engine = StoreEngine(plain.pool, plain.dialect, plain.url, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        sa.event.listen(plain, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    elif statement_timeout is not None:
        sa.event.listen(plain, "connect", partial(_limit_statements, statement_timeout))
    try:
        with engine.connect() as c:
            ready = is_up_to_date(c)
        if not ready:
            with engine.begin() as c:
                if engine.dialect.name == "postgresql":
                    c.exec_driver_sql("SET LOCAL statement_timeout = 0")
                    c.execute(sa.select(sa.func.pg_advisory_xact_lock(_SET_UP_LOCK)))
                bring_up_to_date(c)
    except SQLAlchemyError as error:
        raise StoreError(f"cannot open the store {_shown(url)}: {error}") from error
    stay_with_file(engine)
    return engine


def insert_or_ignore(c: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert ``rows``; those whose key is taken are left as they are. Returns how many were new."""
    statement = _ignoring_insert(c.dialect.name, table)
    return sum(c.execute(statement, dict(row)).first() is not None for row in rows)


def add_or_ignore(c: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert ``rows`` in one go; those whose key is taken are left as they are, and nobody is told."""
    if rows:
        c.execute(_silent_insert(c.dialect.name, table), [dict(row) for row in rows])


def put(c: Connection, table: sa.Table, row: Mapping[str, Any], replaced: tuple[str, ...]) -> None:
    """Insert ``row``; if its primary key is taken, set the columns ``replaced`` of the row that is there."""
    c.execute(_replacing_insert(c.dialect.name, table, replaced), dict(row))


def dialect_insert(c: Connection, table: sa.Table) -> Any:
    """An INSERT that knows ``on_conflict_do_update`` and ``on_conflict_do_nothing``, which both databases have."""
    return _insert(c.dialect.name, table)


@cache
def _ignoring_insert(dialect: str, table: sa.Table) -> Any:
    # RETURNING, since the row count of such a statement is not to be had from every driver.
    return _insert(dialect, table).on_conflict_do_nothing().returning(next(iter(table.primary_key)))


@cache
def _silent_insert(dialect: str, table: sa.Table) -> Any:
    return _insert(dialect, table).on_conflict_do_nothing()


@cache
def _replacing_insert(dialect: str, table: sa.Table, replaced: tuple[str, ...]) -> Any:
    insert = _insert(dialect, table)
    values = {name: insert.excluded[name] for name in replaced}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=values)


def _insert(dialect: str, table: sa.Table) -> Any:
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


def _shown(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "(not a database URL)"


def _limit_statements(seconds: float, connection: Any, _record: object) -> None:
    # Not among the connection's start-up options, which poolers such as PgBouncer refuse.
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {round(1000 * seconds)}")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _switch_to_wal(cursor: Any) -> None:
    """SQLite does not wait where two switch a new database at once, lest they wait for each other."""
    deadline = time.monotonic() + _BUSY
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
    connection.isolation_level = None  # the driver starts no transaction of its own; _begin_sqlite does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={int(1000 * _BUSY)}")
    _switch_to_wal(cursor)
    for pragma in (
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "secure_delete=ON",
        "journal_size_limit=1048576",  # a log that begins anew gives back what a burst made of it
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
