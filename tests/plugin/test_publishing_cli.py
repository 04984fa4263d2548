"""`metaclaw adapters`: the commands on a real store and real files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from metaclaw_hooks.types import VersionState
from metaclaw_hooks.wire import VersionBody
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

from metaclaw_plugin.cli.adapters import app
from metaclaw_plugin.errors import AdapterFilesError, ExportError, VersionStateError
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.deletion import BY_OWNER
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.schema import recalls
from tests.publishing_cases import version_body

WEIGHTS = b"weights of ada@v2"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def engine(home: Path) -> Engine:
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    folder = home / "versions" / "ada" / "2"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    with engine.begin() as c:
        for number in (1, 2):
            body = VersionBody(
                agent="ada",
                number=number,
                base_model="tiny",
                parent=number - 1,
                trace_ids=["t1", "t2"],
                step=number,
                metrics={"loss": 0.5},
                sha256=hashlib.sha256(WEIGHTS).hexdigest(),
                libraries={"peft": "0.21.2"},
                path=str(home / "versions" / "ada" / str(number)),
                created_at=1.0,
            )
            store.record_candidate(c, body)
            store.set_state(c, "ada", number, VersionState.SERVING, {"accepted": True, "sentence": f"v{number}: good"})
            store.set_route(c, "ada", number)
    return engine


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_shows_state_and_decision_of_each_version(engine: Engine) -> None:
    found = json.loads(run("list", "ada", "--json"))
    assert [(row["name"], row["state"], row["decision"]["sentence"]) for row in found] == [
        ("ada@v1", "draining", "v1: good"),
        ("ada@v2", "serving", "v2: good"),
    ]
    assert "ada@v2" in run("list")
    assert "base model answers" in run("list", "bob")


def test_list_names_what_has_learned_from_a_trace_that_was_deleted_before_it_was_made(engine: Engine) -> None:
    with engine.begin() as c:
        c.execute(recalls.insert().values(trace_id="t3", agent="ada", cause=BY_OWNER, at=1.0))
        store.record_candidate(c, version_body(3, parent=2))
    assert [row["learned_from_deleted"] for row in json.loads(run("list", "--json"))] == [False, False, True]
    assert "learned from" in run("list")


def test_show_tells_lineage_and_files(engine: Engine, home: Path) -> None:
    found = json.loads(run("show", "ada@v2", "--json"))
    assert (found["parent"], found["trace_ids"], found["metrics"]) == (1, ["t1", "t2"], {"loss": 0.5})
    assert str(home / "versions" / "ada" / "2") in run("show", "ada@v2")


def test_rollback_and_promote_turn_the_route(engine: Engine) -> None:
    assert run("rollback", "ada").strip() == "ada@v1 serves now"
    with engine.connect() as c:
        assert store.get_route(c, "ada").version == 1
    assert run("promote", "ada@v2").strip() == "ada@v2 serves now"
    assert "base model serves" in run("rollback", "ada", "--to", "0")
    with pytest.raises(VersionStateError):
        CliRunner().invoke(app, ["rollback", "ada"], catch_exceptions=False)


def test_export_writes_a_plain_folder_whole(engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "out" / "ada"
    run("export", "ada@v2", str(target))
    assert (target / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((target / "manifest.json").read_text())["number"] == 2
    with pytest.raises(ExportError, match="exists already"):
        CliRunner().invoke(app, ["export", "ada@v2", str(target)], catch_exceptions=False)


def test_a_damaged_or_absent_version_is_not_exported(
    engine: Engine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = home / "nobody.yaml"
    config.write_text("metaclaw: {rl: {remote_url: 'http://127.0.0.1:9'}}\n", encoding="utf-8")
    monkeypatch.setenv("METACLAW_CONFIG", str(config))
    with pytest.raises(AdapterFilesError, match="could not be fetched from the trainer"):
        CliRunner().invoke(app, ["export", "ada@v1", str(tmp_path / "a")], catch_exceptions=False)
    (home / "versions" / "ada" / "2" / "adapter_model.safetensors").write_bytes(WEIGHTS[:5])
    with pytest.raises(ExportError, match="damaged"):
        CliRunner().invoke(app, ["export", "ada@v2", str(tmp_path / "b")], catch_exceptions=False)
    assert not (tmp_path / "b").exists()
