"""`metaclaw agents set`: an agent's own gate and windows, on a real store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

from metaclaw_plugin.cli.agents import app
from metaclaw_plugin.cli.mode import app as mode_app
from metaclaw_plugin.errors import ConfigError, UnknownAgentError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.status.store_reader import read_store
from metaclaw_plugin.store.agents import add_agent, get_record
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.evaluation import evaluation_settings


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        add_agent(c, "ada")
    return engine


def set_(*words: str) -> Result:
    return CliRunner().invoke(app, ["set", *words])


def own(engine: Engine) -> dict[str, object]:
    with engine.connect() as c:
        return dict(get_record(c, "ada").settings)


def test_an_agent_gets_a_gate_and_windows_of_its_own_and_loses_them_again(engine: Engine) -> None:
    given = ("publish.policy=better", "publish.canary_share=0.25", 'windows.hours=["22:00-06:00"]')
    said = set_("ada", *given)
    assert said.output.splitlines() == [
        "publish.canary_share=0.25",
        'publish.policy="better"',
        'windows.hours=["22:00-06:00"]',
    ]
    gate = evaluation_settings(Settings(), own(engine))
    assert (gate.policy, gate.canary_share, gate.replays) == ("better", 0.25, Settings().publish.replays)
    assert json.loads(set_("ada", "--json").output)["windows"] == {"hours": ["22:00-06:00"]}
    set_("ada", "publish.policy=", "publish.canary_share=", "windows.hours=")
    assert own(engine) == {}
    assert set_("ada").output == "nothing is set for ada alone\n"


@pytest.mark.law(9)
@pytest.mark.parametrize(
    "change",
    [
        "publish.policy=perhaps",
        "publish.polcy=better",
        "vllm.url=http://elsewhere",
        "publish.policy",
        "windows.hours=[25:00-26:00]",
        "windows.hours=[",
        "windows.time_zone=Mars/Olympus",
        "windows.calendar=http://x:abc/c.ics",
        "windows.calendar=work.ics",
        "publish.canary_share=2",
    ],
)
def test_law_9_what_makes_no_sense_is_refused_and_nothing_of_the_call_is_kept(engine: Engine, change: str) -> None:
    result = set_("ada", "publish.policy=always", change)
    assert isinstance(result.exception, ConfigError)
    assert own(engine) == {}


def test_the_mode_of_all_agents_is_set_and_shown_where_they_are(engine: Engine, tmp_path: Path) -> None:
    def mode(*words: str) -> str:
        result = CliRunner().invoke(mode_app, list(words))
        assert result.exit_code == 0, result.exception
        return result.output.splitlines()[0]

    configured = Settings().mode.value
    assert mode() == f"{configured} (configured)"
    assert mode("off") == "off"
    assert CliRunner().invoke(app, ["mode", "ada"]).output == "off (global)\n"
    view = read_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    assert [agent.mode for agent in view.agents] == ["off"]
    assert mode("default") == f"{configured} (configured)"
    assert isinstance(CliRunner().invoke(mode_app, ["sometimes"]).exception, ConfigError)


def test_an_agent_that_does_not_exist_is_refused(engine: Engine) -> None:
    assert isinstance(set_("bob", "publish.policy=always").exception, UnknownAgentError)
