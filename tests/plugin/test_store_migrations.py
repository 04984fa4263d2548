"""Revisions make the tables of the schema, on both databases, and an older store is upgraded when it is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store import upgrade
from metaclaw_plugin.store.engine import StoreEngine, open_store
from metaclaw_plugin.store.migrations import HEAD
from metaclaw_plugin.store.schema import metadata
from metaclaw_plugin.store.traces import get_trace, insert_traces
from metaclaw_plugin.store.upgrade import MIGRATIONS
from tests.store_cases import TRACE

NEXT = '''"""Add a note to agents."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None


def upgrade() -> None:
    with op.batch_alter_table("agents") as batch_op:
        batch_op.add_column(sa.Column("note", sa.Text()))
'''


def differences(engine: Engine) -> list[object]:
    with engine.connect() as c:
        context = MigrationContext.configure(c, opts={"compare_type": True, "compare_server_default": False})
        found = compare_metadata(context, metadata)
    return [change for change in found if "alembic_version" not in str(change)]


@pytest.fixture
def empty(store_url: str) -> Engine:
    """The database before anything was made in it."""
    opened = open_store(store_url)
    with opened.begin() as c:
        metadata.drop_all(c)
        c.exec_driver_sql("DROP TABLE alembic_version")
    return opened


def run_all_revisions(engine: Engine) -> None:
    from alembic import command

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as c:
        config.attributes["connection"] = c
        command.upgrade(config, "head")


def test_revisions_make_what_the_schema_says(empty: Engine) -> None:
    run_all_revisions(empty)
    assert differences(empty) == [], "run: python scripts/new_migration.py 'WHAT CHANGED'"


def test_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_new_store_is_stamped_and_complete(store_url: str) -> None:
    engine = open_store(store_url)
    assert differences(engine) == []
    with engine.connect() as c:
        assert c.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == HEAD
    engine.dispose()


def test_older_store_is_upgraded_with_what_it_holds(
    empty: Engine, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all_revisions(empty)
    with empty.begin() as c:
        insert_traces(c, [TRACE])
        c.exec_driver_sql("INSERT INTO agents (name, settings, created_at) VALUES ('alpha', '{}', 1.0)")
    later = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, later)
    (later / "versions" / "9999_next.py").write_text(NEXT.format(head=HEAD), encoding="utf-8")
    monkeypatch.setattr(upgrade, "MIGRATIONS", later)
    monkeypatch.setattr(upgrade, "HEAD", "9999")
    for _ in range(2):
        engine = open_store(store_url)
        with engine.connect() as c:
            assert "note" in {column["name"] for column in sa.inspect(c).get_columns("agents")}
            assert c.exec_driver_sql("SELECT name, note, record FROM agents").all() == [("alpha", None, True)]
            assert get_trace(c, TRACE.id) == TRACE
        engine.dispose()


def test_store_of_a_newer_release_is_left_alone(store_url: str) -> None:
    engine = open_store(store_url)
    with engine.begin() as c:
        c.exec_driver_sql("UPDATE alembic_version SET version_num = '7777'")
    with pytest.raises(StoreError, match=r"7777.*upgrade metaclaw-plugin"):
        open_store(store_url)
    engine.dispose()


def test_tables_of_something_else_are_not_taken_for_ours(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    other = sa.create_engine(url)
    with other.begin() as c:
        c.exec_driver_sql("CREATE TABLE agents (name TEXT PRIMARY KEY)")
    with pytest.raises(StoreError, match=r"lacks agents\.mode"):
        open_store(url)
    with other.connect() as c:
        assert sa.inspect(c).get_table_names() == ["agents"]
    other.dispose()


def test_sqlite_writes_take_the_lock_at_once_and_reads_take_none(tmp_path: Path) -> None:
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    assert isinstance(engine, StoreEngine)
    with engine.begin() as writer, engine.connect() as reader:
        assert list(reader.execute(sa.select(metadata.tables["agents"]))) == []
        insert_traces(writer, [TRACE])
        with engine.connect() as second:
            second.exec_driver_sql("PRAGMA busy_timeout=1")
            with pytest.raises(sa.exc.OperationalError, match="locked"):
                second.exec_driver_sql("DELETE FROM agents")
    engine.dispose()
