"""A SQLite store stays the file at its path.

Linux lets a process go on writing to a file that was removed or moved, and nobody will ever read what it wrote. So each
connection that is taken from the pool is compared with what lies at the path: where nothing does, the store does not
answer, and what could not be kept is counted; where another file lies (a backup was restored), it is opened.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DisconnectionError

_FILE = "metaclaw_file"  # in a pooled connection's info: device and number of the file that it has open


def file_of(url: sa.URL) -> str | None:
    """Path of the SQLite file at ``url``; ``None`` for a database in memory, or another kind."""
    path = url.database
    if url.get_backend_name() != "sqlite" or not path or path == ":memory:" or path.startswith("file:"):
        return None
    return path


def make_private(path: Path) -> None:
    """Make an empty database that its owner alone may read; SQLite gives its side files the same rights."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


def stay_with_file(engine: Engine) -> None:
    """Watch the file of ``engine``, which is there by now; does nothing for a database that is no file."""
    if (path := file_of(engine.url)) is None:
        return

    def connecting(_dialect: object, _record: object, _arguments: object, _options: object) -> None:
        if _identity(path) is None:  # SQLite would make an empty one
            raise sqlite3.OperationalError(f"the file {path} is gone; put it back, or restore a backup")

    def connected(_connection: object, record: Any) -> None:
        record.info[_FILE] = _identity(path)

    def taken(_connection: object, record: Any, _proxy: object) -> None:
        there = _identity(path)
        if there is None:
            raise sqlite3.OperationalError(f"the file {path} is gone; put it back, or restore a backup")
        if record.info.setdefault(_FILE, there) != there:
            raise DisconnectionError(f"another file lies at {path} now")

    engine.dispose()  # of connections that were made before this, it is not known what they have open
    sa.event.listen(engine, "do_connect", connecting)
    sa.event.listen(engine, "connect", connected)
    sa.event.listen(engine, "checkout", taken)


def _identity(path: str) -> tuple[int, int] | None:
    """Device and number of the file at ``path``; None if there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - for every transaction, and three times as fast
    except OSError:
        return None
    return found.st_dev, found.st_ino
