"""One way to open the store."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.schema import metadata


def open_store(url: str) -> Engine:
    """Open the store at ``url`` and create what is missing in it.

    SQLite runs in WAL mode: what was committed survives ``kill -9`` of any process.

    Raises:
        StoreError: if the database cannot be opened.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        engine = sa.create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _configure_sqlite)
        metadata.create_all(engine, checkfirst=True)
    except (SQLAlchemyError, OSError) as error:
        raise StoreError(f"cannot open the store {parsed.render_as_string(hide_password=True)}: {error}") from error
    return engine


def _configure_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
