"""No key is made that the gateway of this configuration would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from metaclaw_plugin.cli.main import app
from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.store.agents import list_agents, list_keys
from metaclaw_plugin.store.engine import open_store

OURS = "metaclaw_plugin.gateway.auth.authenticate"


def write(folder: Path, general: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"general_settings": general, "metaclaw": {"home": str(folder / "home")}}))
    return str(path)


@pytest.mark.parametrize(
    ("general", "environment"),
    [
        ({"database_url": "os.environ/DATABASE_URL"}, {}),
        ({"master_key": "sk-admin"}, {}),
        ({}, {"DATABASE_URL": "postgresql://127.0.0.1/litellm"}),
    ],
)
@pytest.mark.parametrize("command", [["agents", "add", "alpha"], ["agents", "keys", "alpha", "--new"], ["connect"]])
def test_where_litellm_has_the_keys_none_of_ours_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    general: dict[str, Any],
    environment: dict[str, str],
    command: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    claw = tmp_path / "openclaw.json"
    claw.write_text("{}")
    if command == ["connect"]:
        command = ["connect", "openclaw", "--file", str(claw), "--context-window", "32768"]
    done = CliRunner().invoke(app, [*command, "--config", write(tmp_path, general)])
    assert isinstance(done.exception, ConfigError)
    assert "metaclaw.gateway.admin_key" in str(done.exception)
    assert json.loads(claw.read_text()) == {}
    engine = open_store(f"sqlite:///{tmp_path / 'home' / 'metaclaw.db'}")
    with engine.connect() as c:
        assert (list_agents(c), list_keys(c)) == ([], [])
    engine.dispose()


def test_where_we_check_keys_ours_is_made_though_litellm_has_a_database(tmp_path: Path) -> None:
    config = write(tmp_path, {"custom_auth": OURS, "master_key": "sk-admin", "database_url": "postgresql://x/y"})
    done = CliRunner().invoke(app, ["agents", "add", "alpha", "--json", "--config", config])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["key"].startswith("mc-")
