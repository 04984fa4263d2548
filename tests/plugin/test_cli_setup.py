"""The wizard: what it writes is a config that LiteLLM and we can run, and an interrupted one writes nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from metaclaw_hooks.types import Mode

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.first_config import Answers, checked, config_text, write_config
from metaclaw_plugin.settings import load_settings, parse_settings
from metaclaw_plugin.store.agents import agents_of_key
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.supervisor.plan import trains

ROOT = Path(__file__).resolve().parents[2]
METACLAW = (sys.executable, "-m", "metaclaw_plugin.cli.main")


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "METACLAW_CONFIG"}
    return subprocess.run(
        [*METACLAW, "setup", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**env, "METACLAW_HOME": str(home)},
    )


def answers(**more: Any) -> Answers:
    return Answers(home=Path("/data"), **more)


def test_skills_only_puts_one_model_behind_every_agent() -> None:
    text = config_text(answers(kind="skills", upstream="anthropic/claude", upstream_key_variable="ANTHROPIC_API_KEY"))
    config = yaml.safe_load(text)
    assert config["model_list"] == [
        {
            "model_name": "metaclaw/*",
            "litellm_params": {"model": "anthropic/claude", "api_key": "os.environ/ANTHROPIC_API_KEY"},
        }
    ]
    settings = checked(text, "test")
    assert (settings.mode, trains(settings)) == (Mode.SKILLS_ONLY, False)


def test_a_gpu_here_serves_and_trains_here() -> None:
    settings = checked(config_text(answers(kind="local", base_model="org/model", cpu=True)), "test")
    assert trains(settings)
    assert (settings.rl.backend, settings.vllm.managed, settings.vllm.dtype) == ("local", True, "float32")


def test_a_server_elsewhere_is_joined_by_url_and_key() -> None:
    text = config_text(
        answers(
            kind="server",
            base_model="org/model",
            trainer_url="http://gpu:4010",
            trainer_key="os.environ/NOT_SET_HERE",
            vllm_url="http://gpu:8000",
            vllm_key="os.environ/VLLM_API_KEY",
        )
    )
    config = yaml.safe_load(text)
    assert config["metaclaw"]["rl"] == {
        "backend": "remote",
        "remote_url": "http://gpu:4010",
        "remote_api_key": "os.environ/NOT_SET_HERE",
    }
    assert config["model_list"][0]["litellm_params"]["api_base"] == "http://gpu:8000/v1"
    assert config["model_list"][0]["litellm_params"]["api_key"] == "os.environ/VLLM_API_KEY"
    assert config["metaclaw"]["vllm"]["api_key"] == "os.environ/VLLM_API_KEY"
    assert checked(text, "test").vllm.managed is False


@pytest.mark.parametrize("name", ["a: b", "with #comment", "no", "12", "back\\slash", 'quote"d', "trailing ", "{x}"])
def test_any_answer_is_read_back_as_it_was(name: str) -> None:
    assert checked(config_text(answers(kind="local", base_model=name)), "test").base_model == name


def test_the_wizards_litellm_sections_are_those_of_the_shipped_config() -> None:
    ours = yaml.safe_load(config_text(answers(kind="local", base_model="org/model")))
    shipped = yaml.safe_load((ROOT / "litellm_config.yaml").read_text(encoding="utf-8"))
    for section in ("litellm_settings", "router_settings", "general_settings"):
        assert ours[section] == shipped[section]
    assert ours["model_list"][0] == shipped["model_list"][0]


def test_the_shipped_config_is_valid() -> None:
    shipped = yaml.safe_load((ROOT / "litellm_config.yaml").read_text(encoding="utf-8"))
    parse_settings(shipped["metaclaw"], "litellm_config.yaml")


def test_without_questions_it_writes_the_config_and_a_key_that_works(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run(home, "--kind", "skills", "--upstream", "openai/gpt", "--agent", "one", "--agent", "two", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    file = Path(told["config"])
    assert file == home / "litellm_config.yaml"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "os.environ/OPENAI_API_KEY" in file.read_text()
    settings = load_settings(file)
    engine = open_store(settings.store_url)
    with engine.connect() as c:
        for name in ("one", "two"):
            identity = agents_of_key(c, told["agents"][name])
            assert identity is not None
            assert identity.agents == (name,)
    engine.dispose()


def test_it_ends_with_the_command_to_run_and_a_request_to_try(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "--yes", "--kind", "local", "--base-model", "org/model", "--port", "4321")
    assert done.returncode == 0, done.stderr
    assert "metaclaw start --detach" in done.stdout
    assert "curl http://127.0.0.1:4321/v1/chat/completions" in done.stdout


def test_a_config_that_is_there_is_not_replaced_unless_asked_and_then_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = ("--yes", "--kind", "local", "--base-model", "org/one")
    assert run(home, *first).returncode == 0
    before = (home / "litellm_config.yaml").read_text()
    refused = run(home, "--yes", "--kind", "local", "--base-model", "org/two")
    assert refused.returncode == 1
    assert "is there already; --force replaces it" in refused.stderr
    assert (home / "litellm_config.yaml").read_text() == before
    assert run(home, "--yes", "--kind", "local", "--base-model", "org/two", "--force").returncode == 0
    assert (home / "litellm_config.yaml.bak").read_text() == before
    assert "org/two" in (home / "litellm_config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--kind", "skills"), "which model shall answer? give --upstream"),
        (("--kind", "moon"), "--kind moon: it is one of skills, local, server"),
        (("--kind", "server", "--base-model", "o/m"), "a server elsewhere needs --trainer-url"),
        (("--kind", "skills", "--upstream", "openai/x", "--agent", "No Slug"), "is no valid agent name"),
    ],
)
def test_a_missing_or_wrong_answer_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    done = run(tmp_path / "home", "--yes", *arguments)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_without_a_terminal_and_without_yes_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "home")
    assert done.returncode == 1
    assert "answer by options and add --yes" in done.stderr


def converse(home: Path, *typed: str) -> tuple[int, str]:
    """Run the wizard at a real terminal and type ``typed``, one answer after each prompt."""
    child, outer = pty.fork()
    if child == 0:
        os.execve(METACLAW[0], [*METACLAW, "setup"], {**os.environ, "METACLAW_HOME": str(home)})
    shown = ""
    for answer in typed:
        while not shown.rstrip(" ").endswith(":"):
            shown += os.read(outer, 4096).decode()
        shown += "|"
        os.write(outer, answer.encode())
    while True:
        try:
            more = os.read(outer, 4096)
        except OSError:
            break
        if not more:
            break
        shown += more.decode()
    os.close(outer)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown


def test_at_a_terminal_it_asks_and_corrects(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, shown = converse(home, "moon\n", "skills\n", "openai/gpt\n", "\n", "first second\n")
    assert code == 0, shown
    assert "one of: skills, local, server" in shown
    assert "key of second: mc-" in shown
    assert "openai/gpt" in (home / "litellm_config.yaml").read_text()


def test_openclaw_is_connected_when_it_is_here_and_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "openclaw.json"
    file.write_text("{}")
    monkeypatch.setenv("OPENCLAW_CONFIG_PATH", str(file))
    done = run(tmp_path / "home", "--yes", "--kind", "skills", "--upstream", "openai/gpt")
    assert "metaclaw connect openclaw" in done.stdout
    assert file.read_text() == "{}"
    options = ("--yes", "--force", "--kind", "skills", "--upstream", "openai/gpt", "--connect")
    done = run(tmp_path / "home", *options)
    assert done.returncode == 0, done.stderr
    assert "metaclaw-main" in json.loads(file.read_text())["models"]["providers"]


def test_an_interrupted_wizard_has_written_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, shown = converse(home, "skills\n", "openai/gpt\n", "\x03")
    assert code == 130, shown
    assert "nothing was written" in shown
    assert "Traceback" not in shown
    assert not home.exists()


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set METACLAW_HOME to a folder that is yours"):
        write_config(tmp_path / "file" / "home" / "config.yaml", "x", False)
