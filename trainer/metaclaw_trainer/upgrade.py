"""The trainer's store is brought to this release's tables when it is opened."""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa

from metaclaw_trainer.errors import StoreError
from metaclaw_trainer.migrations import HEAD
from metaclaw_trainer.schema import metadata

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
_OURS = "recalled_traces"  # a table that no other store of this project has
_stamp = sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))


def upgrade(c: sa.Connection) -> None:
    """Make the tables of an empty store, or run the revisions that an older one lacks: all in ``c``'s transaction.

    Raises:
        StoreError: if the database is of a newer release, or holds tables of something else.
    """
    there = set(sa.inspect(c).get_table_names())
    if _stamp.name not in there:
        metadata.create_all(c)
        if missing := _missing_columns(c):
            raise StoreError(
                f"the database has tables that the trainer did not make (no column {missing[0]}); "
                "give metaclaw.trainer.store one of its own"
            )
        _stamp.create(c)
        c.execute(_stamp.insert().values(version_num=HEAD))
        return
    if _OURS not in there:
        raise StoreError("the database belongs to something else: give metaclaw.trainer.store one of its own")
    found = str(c.scalar(sa.select(_stamp.c.version_num)))
    if found != HEAD:
        _run_revisions(c, found)


def _missing_columns(c: sa.Connection) -> list[str]:
    inspector = sa.inspect(c)
    return [
        f"{table.name}.{column.name}"
        for table in metadata.sorted_tables
        for column in table.columns
        if column.name not in {there["name"] for there in inspector.get_columns(table.name)}
    ]


def _run_revisions(c: sa.Connection, found: str) -> None:
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
            f"the trainer's store is of revision {found!r}, which this release does not know; upgrade metaclaw-plugin"
        ) from error
    log.info("the trainer's store is brought from revision %s to %s", found, HEAD)
    command.upgrade(config, HEAD)
