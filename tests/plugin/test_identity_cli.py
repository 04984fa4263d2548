"""`metaclaw agents`: the commands on a real store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from metaclaw_hooks.errors import InvalidNameError
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

from metaclaw_plugin.cli.agents import app
from metaclaw_plugin.errors import AgentExistsError, ConfigError, UnknownAgentError, UnknownKeyError
from metaclaw_plugin.store.agents import KeyIdentity, agents_of_key, get_record
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces, iter_traces
from tests.store_cases import TRACE


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    return open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")


def run(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=answer)


def done(*words: str, answer: str | None = None) -> str:
    result = run(*words, answer=answer)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def added(name: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(done("add", name, "--json"))
    return found


def identity(engine: Engine, secret: str) -> KeyIdentity | None:
    with engine.connect() as c:
        return agents_of_key(c, secret)


def test_add_prints_a_key_that_works_and_where_to_use_it(engine: Engine) -> None:
    found = added("alpha")
    assert identity(engine, found["key"]) == KeyIdentity(found["key_id"], ("alpha",))
    assert (found["base_url"], found["model"]) == ("http://127.0.0.1:4000/v1", "metaclaw/alpha")
    text = done("add", "beta", "--mode", "auto")
    key = next(word for word in text.split() if word.startswith("mc-"))
    assert identity(engine, key) is not None
    with engine.connect() as c:
        assert get_record(c, "beta").mode == "auto"
    assert key not in done("list") + done("keys", "beta") + done("list", "--json")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("add", "Not A Slug"), InvalidNameError),
        (("add", "alpha"), AgentExistsError),
        (("add", "beta", "--mode", "turbo"), ConfigError),
        (("keys", "nobody"), UnknownAgentError),
        (("keys", "alpha", "--revoke", "nosuch"), UnknownKeyError),
        (("keys", "alpha", "--new", "--also", "nobody"), UnknownAgentError),
        (("rotate", "nobody"), UnknownAgentError),
        (("rotate", "alpha", "--key", "nosuch"), UnknownKeyError),
        (("mode", "alpha", "turbo"), ConfigError),
        (("mode", "nobody"), UnknownAgentError),
        (("record", "alpha", "maybe"), ConfigError),
        (("owner", "alpha", "ann"), ConfigError),
        (("remove", "nobody", "--yes"), UnknownAgentError),
    ],
)
@pytest.mark.law(9)
def test_law_9_bad_input_is_a_clear_error_and_changes_nothing(
    engine: Engine, words: tuple[str, ...], error: type[Exception]
) -> None:
    added("alpha")
    before = done("list", "--json") + done("keys", "alpha", "--json")
    result = run(*words)
    assert isinstance(result.exception, error)
    assert done("list", "--json") + done("keys", "alpha", "--json") == before


def test_one_key_for_several_agents(engine: Engine) -> None:
    added("alpha")
    added("beta")
    made = json.loads(done("keys", "alpha", "--new", "--also", "beta", "--json"))
    assert identity(engine, made["key"]) == KeyIdentity(made["key_id"], ("alpha", "beta"))
    assert [len(json.loads(done("keys", name, "--json"))) for name in ("alpha", "beta")] == [2, 2]
    done("keys", "beta", "--revoke", made["key_id"])
    assert identity(engine, made["key"]) is None


def test_rotation_needs_to_know_which_key(engine: Engine) -> None:
    first = added("alpha")
    second = json.loads(done("rotate", "alpha", "--json"))
    assert identity(engine, first["key"]) is None
    assert identity(engine, second["key"]) is not None
    done("keys", "alpha", "--new")
    result = run("rotate", "alpha")
    assert isinstance(result.exception, UnknownKeyError)
    assert second["key_id"] in str(result.exception)
    third = json.loads(done("rotate", "alpha", "--key", second["key_id"], "--json"))
    assert identity(engine, second["key"]) is None
    assert identity(engine, third["key"]) is not None


def test_mode_record_and_owner_are_shown_and_set(engine: Engine) -> None:
    added("alpha")
    assert done("mode", "alpha").strip() == "rl (global)"
    assert done("mode", "alpha", "skills_only").strip() == "skills_only"
    assert done("mode", "alpha", "default").strip() == "rl (global)"
    assert done("record", "alpha").strip() == "on"
    assert done("record", "alpha", "off").strip() == "off"
    assert done("owner", "alpha").strip() == "none"
    assert done("owner", "alpha", "team:red").strip() == "team:red"
    assert done("owner", "alpha", "none").strip() == "none"


@pytest.mark.law(4)
def test_removing_an_agent_says_what_stays_of_its_skills_or_deletes_them(engine: Engine, tmp_path: Path) -> None:
    added("alpha")
    assert "skills" not in done("remove", "alpha", "--yes"), "it had none"
    for skill in ("skills/alpha/one", "skills/alpha/.retired/two.abc", "skills/beta/three"):
        (tmp_path / skill).mkdir(parents=True)
        (tmp_path / skill / "SKILL.md").write_text("x")
    added("alpha")
    assert f"its own skills stay in {tmp_path / 'skills' / 'alpha'}" in done("remove", "alpha", "--yes")
    assert (tmp_path / "skills/alpha/one/SKILL.md").exists()
    added("alpha")
    assert "its own skills are deleted" in done("remove", "alpha", "--yes", "--skills")
    assert [path.name for path in (tmp_path / "skills").iterdir()] == ["beta"]
    added("alpha")
    (tmp_path / "skills/alpha").symlink_to(tmp_path / "skills/beta")
    done("remove", "alpha", "--yes", "--skills")
    assert (tmp_path / "skills/beta/three/SKILL.md").exists(), "what a link points to is another's"


def test_remove_asks_first_and_keeps_traces_unless_told(engine: Engine) -> None:
    key = added("alpha")["key"]
    with engine.begin() as c:
        insert_traces(c, [TRACE])
    assert run("remove", "alpha", answer="n\n").exit_code != 0
    assert identity(engine, key) is not None
    assert "1 key(s) and 0 trace(s)" in done("remove", "alpha", answer="y\n")
    assert identity(engine, key) is None
    added("alpha")
    assert "1 key(s) and 1 trace(s)" in done("remove", "alpha", "--traces", "--yes")
    with engine.connect() as c:
        assert list(iter_traces(c)) == []
    assert "no agents yet" in done("list")
