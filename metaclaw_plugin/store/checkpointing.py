"""SQLite's log is written back into the database beside the requests, not inside one of their commits.

A commit that finds the log long writes it back and waits for the disk, twice; on a busy disk that takes seconds, and in
the gateway a client waits for that commit. A passive checkpoint locks no writer out. See https://sqlite.org/wal.html.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.store.sqlite_file import file_of

logger = logging.getLogger(__name__)

LONG = 4 * 2**20  # bytes of log from which on it is written back; SQLite's own measure is 1,000 pages
TOO_LONG = 64 * 2**20  # bytes; from here on writers wait for once, so that the log begins anew
_EVERY = 1.0  # seconds between two looks at the log


def checkpoint_beside(engine: Engine) -> threading.Thread | None:
    """Take the checkpoints of this process out of its commits; ``None`` where there is no log of SQLite's.

    The thread ends with the process.
    """
    if (path := file_of(engine.url)) is None:
        return None
    sa.event.listen(engine, "connect", _no_checkpoint_in_commits)
    engine.dispose()  # connections made before take them still
    thread = threading.Thread(target=_watch, args=(engine, Path(f"{path}-wal")), name="metaclaw-log", daemon=True)
    thread.start()
    return thread


def write_back(engine: Engine, log: Path) -> bool:
    """Write a long log back; whether it was long. The next commit then begins it anew, shorter.

    Raises:
        SQLAlchemyError: if the database does not take it now; the log stays, nothing is lost.
    """
    length = log.stat().st_size if log.exists() else 0
    if length < LONG:
        return False
    with engine.connect() as c:
        raw = c.connection.cursor()  # a checkpoint is refused inside a transaction, which SQLAlchemy would begin
        raw.execute("PRAGMA wal_checkpoint(PASSIVE)")
        if length >= TOO_LONG:
            raw.execute("PRAGMA wal_checkpoint(RESTART)")
        raw.close()
    return True


def _watch(engine: Engine, log: Path) -> None:
    while True:
        time.sleep(_EVERY)
        try:
            write_back(engine, log)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("the store's log could not be written back: %s", type(error).__name__)


def _no_checkpoint_in_commits(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA wal_autocheckpoint=0")
    cursor.close()
