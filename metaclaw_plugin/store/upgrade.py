"""A store that is opened is brought to this release's tables, once, by whoever comes first."""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.migrations import HEAD
from metaclaw_plugin.store.schema import metadata

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
_stamp = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))


def is_up_to_date(c: Connection) -> bool:
    """Whether the store is of this release; reads only."""
    return _revision(c) == HEAD


def bring_up_to_date(c: Connection) -> None:
    """Make the tables of an empty store, or run the revisions that an older one lacks.

    ``c`` must hold the only writing transaction; all is done in it, or nothing.

    Raises:
        StoreError: if the store is of a newer release, or of none.
    """
    found = _revision(c)
    if found == HEAD:
        return
    if found is not None:
        _run_revisions(c, found)
        return
    metadata.create_all(c, checkfirst=True)
    if missing := _missing_columns(c):
        raise StoreError(
            f"the store lacks {', '.join(missing[:3])} and names no release that it is of; move it away and start anew"
        )
    _stamp.create(c, checkfirst=True)
    c.execute(_stamp.insert().values(version_num=HEAD))


def _revision(c: Connection) -> str | None:
    if not sa.inspect(c).has_table(_stamp.name):
        return None
    found = c.execute(sa.select(_stamp.c.version_num)).scalar_one_or_none()
    return None if found is None else str(found)


def _missing_columns(c: Connection) -> list[str]:
    inspector = sa.inspect(c)
    missing = []
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        missing += [f"{table.name}.{column.name}" for column in table.columns if column.name not in there]
    return missing


def _run_revisions(c: Connection, found: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = c
    try:
        ScriptDirectory.from_config(config).get_revision(found)
    except CommandError as error:
        raise StoreError(
            f"the store is of revision {found!r}, which this release does not know; upgrade metaclaw-plugin"
        ) from error
    logger.info("the store is brought from revision %s to %s", found, HEAD)
    command.upgrade(config, HEAD)
