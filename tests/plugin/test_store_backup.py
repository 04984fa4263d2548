"""Backup and restore: whole, checked, and from one database to the other."""

from __future__ import annotations

import io
import json
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from metaclaw_plugin.backup import back_up, restore
from metaclaw_plugin.cli.backup import app
from metaclaw_plugin.errors import BackupError, ProcessError, StoreError
from metaclaw_plugin.settings import Settings, parse_settings
from metaclaw_plugin.store import agents, schema
from metaclaw_plugin.store.counters import count, read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces, iter_traces
from metaclaw_plugin.supervisor.state import Home
from tests.store_cases import TRACE, a_trace


def settings_of(home: Path, url: str | None = None) -> Settings:
    return parse_settings({"home": str(home), "store": {"url": url}}, "test")


def furnish(settings: Settings) -> str:
    """A home with everything; returns the agent's key."""
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        agents.add_agent(c, "alpha")
        key = agents.new_key(c, ["alpha"])
        insert_traces(c, [TRACE, a_trace(id="tr-1")])
        count(c, "hits", "alpha", 3)
        c.execute(schema.in_flight.insert().values(process="p", agent="alpha", version=1, requests=1, at=1.0))
    engine.dispose()
    for name, content in {
        "skills/alpha/be-terse/SKILL.md": "Be terse.",
        "logs/gateway.log": "noise",
        "run/supervisor.json": "{}",
        "internal.key": "mci-x",
        "trainer/adapters/alpha/1/adapter_model.safetensors": "weights",
    }.items():
        path = settings.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    database = sqlite3.connect(settings.home / "trainer" / "trainer.db")
    database.executescript(
        "PRAGMA journal_mode=WAL; CREATE TABLE samples (id TEXT); INSERT INTO samples VALUES ('s-1');"
    )
    database.close()
    return key.secret


def check(settings: Settings, key: str) -> None:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        assert agents.agents_of_key(c, key) is not None
        assert list(iter_traces(c)) == [TRACE, a_trace(id="tr-1")]
        assert read_counters(c, "hits") == {"hits": {"alpha": 3}}
        assert c.execute(sa.select(schema.in_flight)).all() == []
        insert_traces(c, [a_trace(id="tr-2")])
        assert c.execute(sa.select(sa.func.max(schema.traces.c.seq))).scalar_one() == 3
    engine.dispose()
    assert (settings.home / "skills/alpha/be-terse/SKILL.md").read_text(encoding="utf-8") == "Be terse."
    assert (settings.home / "trainer/adapters/alpha/1/adapter_model.safetensors").read_bytes() == b"weights"
    assert not (settings.home / "logs").exists()
    database = sqlite3.connect(settings.home / "trainer" / "trainer.db")
    assert database.execute("SELECT id FROM samples").fetchall() == [("s-1",)]
    database.close()


def test_home_comes_back_as_it_was(tmp_path: Path) -> None:
    old, new = settings_of(tmp_path / "old"), settings_of(tmp_path / "new")
    key = furnish(old)
    archive = tmp_path / "backup.tar.gz"
    saved = back_up(old, archive)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert (saved.files, saved.rows) == (5, 7)
    assert restore(new, archive, replace=False).rows == 7
    check(new, key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar.gz", "new", "old"]


def test_backup_is_taken_while_the_store_is_written(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "home")
    key = furnish(settings)
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        insert_traces(c, [a_trace(id="tr-in-flight")])
        back_up(settings, tmp_path / "backup.tar.gz")
    engine.dispose()
    other = settings_of(tmp_path / "other")
    restore(other, tmp_path / "backup.tar.gz", replace=False)
    check(other, key)


def test_store_moves_between_databases(tmp_path: Path, store_url: str) -> None:
    there, back = settings_of(tmp_path / "there", store_url), settings_of(tmp_path / "back")
    first = settings_of(tmp_path / "first")
    key = furnish(first)
    back_up(first, tmp_path / "1.tar.gz")
    if "sqlite" in store_url:
        Path(sa.make_url(store_url).database or "").unlink(missing_ok=True)
    restore(there, tmp_path / "1.tar.gz", replace=False)
    back_up(there, tmp_path / "2.tar.gz")
    restore(back, tmp_path / "2.tar.gz", replace=False)
    check(back, key)
    check(there, key)


def test_postgres_store_that_is_not_empty_is_left_alone(tmp_path: Path, postgres_server: str) -> None:
    from tests.postgres_server import create_database

    settings = settings_of(tmp_path / "home", create_database(postgres_server, "full"))
    furnish(settings)
    back_up(settings, tmp_path / "backup.tar.gz")
    with pytest.raises(StoreError, match="not empty"):
        restore(settings, tmp_path / "backup.tar.gz", replace=True)
    assert (settings.home / "logs").exists()
    engine = open_store(settings.store_url)
    with engine.connect() as c:
        assert len(list(iter_traces(c))) == 2
    engine.dispose()


def test_what_was_there_is_kept_aside(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "home")
    key = furnish(settings)
    back_up(settings, tmp_path / "backup.tar.gz")
    (settings.home / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(BackupError, match="--replace"):
        restore(settings, tmp_path / "backup.tar.gz", replace=False)
    restore(settings, tmp_path / "backup.tar.gz", replace=True)
    check(settings, key)
    (aside,) = tmp_path.glob("home.before-restore-*")
    assert (aside / "mine.txt").read_text(encoding="utf-8") == "precious"


def test_backup_never_overwrites(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "home")
    furnish(settings)
    (tmp_path / "backup.tar.gz").write_text("mine", encoding="utf-8")
    with pytest.raises(BackupError, match="there already"):
        back_up(settings, tmp_path / "backup.tar.gz")
    with pytest.raises(BackupError, match="cannot write"):
        back_up(settings, tmp_path / "nowhere" / "backup.tar.gz")
    assert (tmp_path / "backup.tar.gz").read_text(encoding="utf-8") == "mine"


def rewritten(archive: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the archive with other members."""
    with tarfile.open(archive) as tar:
        members = {m.name: file.read() for m in tar.getmembers() if (file := tar.extractfile(m)) is not None}
    change(members)
    target = archive.with_name("changed.tar.gz")
    with tarfile.open(target, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return target


def _other_format(members: dict[str, bytes]) -> None:
    members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | {"format": 99}).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.update({"home/internal.key": b"other"}),
        lambda members: members.pop("home/internal.key"),
        lambda members: members.pop("store.db"),
        lambda members: members.pop("manifest.json"),
        lambda members: members.update({"home/extra": b"smuggled"}),
        lambda members: members.update({"../escape": b"out"}),
        lambda members: members.update({"manifest.json": b"[]"}),
        _other_format,
    ],
)
@pytest.mark.law(9)
def test_law_9_a_damaged_or_forged_archive_changes_nothing(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None]
) -> None:
    settings = settings_of(tmp_path / "home")
    furnish(settings)
    back_up(settings, tmp_path / "backup.tar.gz")
    bad = rewritten(tmp_path / "backup.tar.gz", change)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(BackupError):
        restore(settings, bad, replace=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_half_an_archive_is_refused(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "home")
    furnish(settings)
    back_up(settings, tmp_path / "backup.tar.gz")
    whole = (tmp_path / "backup.tar.gz").read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / "half.tar.gz").write_bytes(whole[:size])
        with pytest.raises(BackupError):
            restore(settings, tmp_path / "half.tar.gz", replace=True)
    with pytest.raises(BackupError, match="cannot restore"):
        restore(settings, tmp_path / "nosuch.tar.gz", replace=True)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("METACLAW_HOME", str(home))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    key = furnish(settings_of(home))
    run = CliRunner().invoke
    saved = run(app, ["backup", str(tmp_path / "b.tar.gz"), "--json"])
    assert saved.exit_code == 0, saved.output
    assert json.loads(saved.output)["rows"] == 7
    with Home(home).lock():
        running = run(app, ["restore", str(tmp_path / "b.tar.gz"), "--replace"])
    assert isinstance(running.exception, ProcessError)
    restored = run(app, ["restore", str(tmp_path / "b.tar.gz"), "--replace"])
    assert restored.exit_code == 0, restored.output
    check(settings_of(home), key)
