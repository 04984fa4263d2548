"""OpenClaw's configuration in and out again, and snippets that are what their clients understand."""

from __future__ import annotations

import ast
import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from metaclaw_plugin.cli.connect import app
from metaclaw_plugin.clients.openclaw import (
    EXTENSION,
    EXTENSION_ID,
    Connection,
    agents_in,
    connect,
    default_file,
    disconnect,
    provider_name,
    read_file,
)
from metaclaw_plugin.clients.snippets import SNIPPETS, Target
from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.store.agents import agents_of_key, list_agents
from metaclaw_plugin.store.engine import open_store

BARE: dict[str, Any] = {"gateway": {"mode": "local"}}
TWO: dict[str, Any] = {
    "models": {"providers": {"openai": {"baseUrl": "https://example.invalid", "apiKey": "sk-theirs", "models": []}}},
    "agents": {
        "ownership": "explicit",
        "defaults": {"model": {"primary": "openai/gpt", "fallbacks": ["openai/small"]}, "models": {"openai/gpt": {}}},
        "list": [
            {"id": "alpha", "model": "openai/gpt", "workspace": "a"},
            {"id": "beta", "model": {"primary": "openai/gpt", "fallbacks": ["openai/small"]}},
        ],
    },
}


def connection(agent: str = "main", key: str = "mc-1") -> Connection:
    return Connection(agent, "http://127.0.0.1:4000", key, 32768, 8192)


def test_an_agent_gets_its_own_provider_key_and_affinity_headers() -> None:
    new, changes = connect(BARE, [connection()])
    provider = new["models"]["providers"]["metaclaw-main"]
    assert provider["baseUrl"] == "http://127.0.0.1:4000/v1"
    assert (provider["apiKey"], provider["api"]) == ("mc-1", "openai-completions")
    assert provider["models"][0]["compat"] == {"sendSessionAffinityHeaders": True}
    assert new["agents"]["defaults"]["model"] == {"primary": "metaclaw-main/main"}
    assert new["gateway"] == BARE["gateway"]
    assert not any("mc-1" in change.told() for change in changes)


KEYED: dict[str, Any] = {"agents": {"entries": {"alpha": {"model": "openai/gpt"}, "beta": {}}}}


@pytest.mark.parametrize("config", [BARE, TWO, KEYED, {}, {"agents": {"list": [{"id": "main"}]}}])
def test_undo_puts_back_exactly_what_was_there(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    new, changes = connect(config, [connection(name) for name in agents_in(config)])
    assert new != before
    assert config == before
    back, notes = disconnect(new, changes)
    assert (back, notes) == (before, [])


def test_doing_it_twice_changes_nothing() -> None:
    new, _ = connect(TWO, [connection("alpha"), connection("beta", "mc-2")])
    again, changes = connect(new, [connection("alpha"), connection("beta", "mc-2")])
    assert (again, changes) == (new, [])


def test_only_the_named_agent_and_only_our_entries_are_touched() -> None:
    new, _ = connect(TWO, [connection("beta")])
    assert new["models"]["providers"]["openai"] == TWO["models"]["providers"]["openai"]
    assert new["agents"]["list"][0] == TWO["agents"]["list"][0]
    assert new["agents"]["list"][1]["model"] == {"primary": "metaclaw-beta/beta", "fallbacks": ["openai/small"]}
    assert new["agents"]["defaults"]["model"] == TWO["agents"]["defaults"]["model"]
    assert "metaclaw-beta/beta" in new["agents"]["defaults"]["models"]


def test_what_somebody_changed_since_is_left_alone_and_told() -> None:
    new, changes = connect(TWO, [connection("alpha")])
    new["agents"]["list"][0]["model"] = "openai/other"
    back, notes = disconnect(new, changes)
    assert back["agents"]["list"][0]["model"] == "openai/other"
    assert "metaclaw-alpha" not in back["models"]["providers"]
    assert notes == ["agents.list.#alpha.model was changed by somebody else since and is left as it is"]


@pytest.mark.parametrize(
    "plugins", [None, {"load": {"paths": ["/other"]}, "allow": ["other"], "entries": {"other": {"enabled": True}}}]
)
def test_the_extension_is_loaded_beside_others_and_taken_out_again(plugins: dict[str, Any] | None) -> None:
    config = {**BARE, **({"plugins": plugins} if plugins else {})}
    new, changes = connect(config, [connection()], extension=True)
    assert new["plugins"]["load"]["paths"][-1] == str(EXTENSION)
    assert new["plugins"]["entries"]["metaclaw"] == {"enabled": True}
    if plugins:
        assert new["plugins"]["load"]["paths"][0] == "/other"
        assert new["plugins"]["allow"] == ["other", "metaclaw"]
    assert connect(new, [connection()], extension=True)[1] == []
    assert disconnect(new, changes) == (config, [])


def test_the_extension_is_whole_and_posts_to_a_route_that_the_gateway_has() -> None:
    manifest = json.loads((EXTENSION / "openclaw.plugin.json").read_text())
    package = json.loads((EXTENSION / "package.json").read_text())
    assert manifest["id"] == EXTENSION_ID
    (entry,) = package["openclaw"]["extensions"]
    code = (EXTENSION / entry).read_text()
    assert f'const PREFIX = "{provider_name("")}"' in code
    routes = (Path(__file__).resolve().parents[2] / "metaclaw_plugin" / "gateway" / "routes.py").read_text()
    assert 'prefix="/metaclaw/v1"' in routes
    assert '"/sessions/{session}/end"' in routes
    assert "/metaclaw/v1/sessions/${encodeURIComponent(event.sessionId)}/end" in code


def test_undo_finds_its_entries_after_openclaw_moved_its_list() -> None:
    new, changes = connect({"agents": {"list": [{"id": "alpha", "model": "openai/gpt"}]}}, [connection("alpha")])
    new["agents"]["entries"] = {entry.pop("id"): entry for entry in new["agents"].pop("list")}
    back, notes = disconnect(new, changes)
    assert (back, notes) == ({"agents": {"entries": {"alpha": {"model": "openai/gpt"}}}}, [])


def test_an_agent_that_openclaw_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="OpenClaw has no agent 'gamma'; it has: alpha, beta"):
        connect(TWO, [connection("gamma")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "is not there"), ("{ // a comment\n}", "is not plain JSON"), ("[]", "holds no JSON object")],
)
def test_a_file_that_cannot_be_edited_safely_is_refused(text: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "openclaw.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_file(file)


def test_the_file_is_looked_for_where_openclaw_keeps_it(tmp_path: Path) -> None:
    assert default_file({"OPENCLAW_CONFIG_PATH": "/x/y.json"}) == Path("/x/y.json")
    assert default_file({"OPENCLAW_HOME": str(tmp_path)}) == tmp_path / ".openclaw" / "openclaw.json"


@pytest.fixture
def stage(tmp_path: Path) -> tuple[Path, list[str]]:
    """OpenClaw's file, and the options that every call has."""
    file = tmp_path / "openclaw.json"
    file.write_text(json.dumps(TWO))
    file.chmod(0o600)
    config = tmp_path / "config.yaml"
    config.write_text(f"metaclaw: {{home: {tmp_path / 'home'}}}\n")
    return file, ["openclaw", "--file", str(file), "--config", str(config)]


def test_the_command_makes_agents_and_keys_keeps_a_backup_and_takes_it_all_back(stage: tuple[Path, list[str]]) -> None:
    file, options = stage
    runner = CliRunner()
    first = runner.invoke(app, options)
    assert first.exit_code == 0, first.output
    written = json.loads(file.read_text())
    assert file.stat().st_mode & 0o777 == 0o600
    engine = open_store(f"sqlite:///{file.parent / 'home' / 'metaclaw.db'}")
    with engine.connect() as c:
        assert [record.name for record in list_agents(c)] == ["alpha", "beta"]
        for name in ("alpha", "beta"):
            key = written["models"]["providers"][f"metaclaw-{name}"]["apiKey"]
            identity = agents_of_key(c, key)
            assert identity is not None
            assert identity.agents == (name,)
            assert key not in first.output
    engine.dispose()
    (backup,) = file.parent.glob("openclaw.json.metaclaw-*.bak")
    assert json.loads(backup.read_text()) == TWO
    second = runner.invoke(app, options)
    assert "nothing to change" in second.output
    assert json.loads(file.read_text()) == written
    undone = runner.invoke(app, [*options, "--undo"])
    assert undone.exit_code == 0, undone.output
    assert json.loads(file.read_text()) == TWO


def test_a_dry_run_changes_nothing_anywhere(stage: tuple[Path, list[str]]) -> None:
    file, options = stage
    done = CliRunner().invoke(app, [*options, "--dry-run"])
    assert "would set models.providers.metaclaw-alpha" in done.output
    assert json.loads(file.read_text()) == TWO
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.yaml", "openclaw.json"]


TO = Target("http://127.0.0.1:4000", "plain", "mc-secret")


def test_snippets_are_what_their_clients_understand() -> None:
    for name in ("openai", "anthropic"):
        ast.parse(SNIPPETS[name](TO))
    codex = tomllib.loads(SNIPPETS["codex"](TO))
    assert codex["model_providers"]["metaclaw"]["base_url"] == "http://127.0.0.1:4000/v1"
    body = SNIPPETS["curl"](TO).split("-d '")[1].rsplit("'", 1)[0]
    assert json.loads(body)["model"] == "metaclaw/plain"


@pytest.mark.parametrize("name", sorted(SNIPPETS))
def test_every_snippet_names_address_and_key(name: str) -> None:
    text = SNIPPETS[name](TO)
    assert "http://127.0.0.1:4000" in text
    assert "mc-secret" in text


def test_a_client_that_we_do_not_know_is_answered_with_those_that_we_do() -> None:
    done = CliRunner().invoke(app, ["show", "nope"])
    assert isinstance(done.exception, ConfigError)
    assert "claude-code" in str(done.exception)
