"""Revisions make the tables of the trainer's schema, and an older store is upgraded when it is opened."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from metaclaw_trainer import upgrade
from metaclaw_trainer.errors import StoreError
from metaclaw_trainer.migrations import HEAD
from metaclaw_trainer.schema import metadata
from metaclaw_trainer.store import Store, open_store

NEXT = f'''"""Add a note to agents."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{HEAD}", None, None


def upgrade() -> None:
    with op.batch_alter_table("agents") as batch_op:
        batch_op.add_column(sa.Column("note", sa.Text()))
'''


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'queue.db'}"


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(upgrade.MIGRATIONS))
    return made


def differences(store: Store) -> list[object]:
    with store.read() as c:
        found = compare_metadata(MigrationContext.configure(c, opts={"compare_type": True}), metadata)
    return [change for change in found if "alembic_version" not in str(change)]


def test_revisions_make_what_the_schema_says(url: str) -> None:
    store = open_store(url)
    with store.write() as c:
        metadata.drop_all(c)
        c.exec_driver_sql("DROP TABLE alembic_version")
        given = config()
        given.attributes["connection"] = c
        command.upgrade(given, "head")
    assert differences(store) == []
    assert ScriptDirectory.from_config(config()).get_heads() == [HEAD]


def test_two_trainers_may_open_a_new_store_at_once(url: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(open_store, [url] * 8))
    for store in stores:
        assert differences(store) == []
        store.close()


def test_an_older_store_is_upgraded_once_with_what_it_holds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(url)
    with store.write() as c:
        c.exec_driver_sql("INSERT INTO counters (name, label, value) VALUES ('versions', 'cursor', 7)")
    store.close()
    later = tmp_path / "migrations"
    shutil.copytree(upgrade.MIGRATIONS, later)
    (later / "versions" / "9999_next.py").write_text(NEXT, encoding="utf-8")
    monkeypatch.setattr(upgrade, "MIGRATIONS", later)
    monkeypatch.setattr(upgrade, "HEAD", "9999")
    for _ in range(2):
        store = open_store(url)
        with store.read() as c:
            assert "note" in {column["name"] for column in sa.inspect(c).get_columns("agents")}
            assert c.exec_driver_sql("SELECT value FROM counters").scalar_one() == 7
        store.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE alembic_version SET version_num = '7777'", "'7777', which this release does not know"),
        ("DROP TABLE recalled_traces", "belongs to something else"),
        ("DROP TABLE alembic_version; DROP TABLE agents; CREATE TABLE agents (name TEXT)", "did not make"),
    ],
)
def test_a_database_of_something_else_is_left_alone(url: str, statement: str, words: str) -> None:
    store = open_store(url)
    with store.write() as c:
        for part in statement.split("; "):
            c.exec_driver_sql(part)
    store.close()
    with pytest.raises(StoreError, match=words):
        open_store(url)
