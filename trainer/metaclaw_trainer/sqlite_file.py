"""The trainer's SQLite store is the file at its path: one that was moved or removed is not written to any more.

A process could go on with a file that has no name, and acknowledge samples that nobody will find again.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DisconnectionError

_FILE = "file"  # in a pooled connection's info


def keep_to_path(engine: sa.Engine) -> None:
    """Let each use of a connection of ``engine`` fail while its file, which is there now, is gone.

    Where another file has taken its place, that one is opened.
    """
    path = engine.url.database
    if not path or path == ":memory:" or path.startswith("file:"):
        return

    def present() -> tuple[int, int]:
        try:
            found = os.stat(path)  # noqa: PTH116 - for every transaction, and three times as fast
        except OSError as error:
            raise sqlite3.OperationalError(f"the file {path} is gone; put it back, or restore a backup") from error
        return found.st_dev, found.st_ino

    def connecting(_dialect: object, _record: object, _arguments: object, _options: object) -> None:
        present()

    def connected(_connection: object, record: Any) -> None:
        record.info[_FILE] = present()

    def taken(_connection: object, record: Any, _proxy: object) -> None:
        if record.info.setdefault(_FILE, found := present()) != found:
            raise DisconnectionError(f"another file lies at {path} now")

    engine.dispose()  # of connections that were made before this, it is not known what they have open
    sa.event.listen(engine, "do_connect", connecting)
    sa.event.listen(engine, "connect", connected)
    sa.event.listen(engine, "checkout", taken)
