"""The command line itself: lazy, one line for an error, the right exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaclaw_plugin.cli.main import COMMANDS, missing_package

METACLAW = (sys.executable, "-m", "metaclaw_plugin.cli.main")


def run(*arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "METACLAW_CONFIG"}
    return subprocess.run(
        [*METACLAW, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**environment, "METACLAW_HOME": str(home), **env},
    )


def test_help_lists_every_command_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom metaclaw_plugin.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'rich.console', 'pydantic', 'sqlalchemy', 'httpx', 'yaml', 'psutil', 'litellm', 'torch'}\n"
        "sys.stderr.write(','.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_teaches_itself(name: str, tmp_path: Path) -> None:
    done = run(name, "--help", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Usage: metaclaw {name}" in done.stdout
    assert len(done.stdout.split("Options:")[0].split()) > 8


def test_version_tells_all_that_matter(tmp_path: Path) -> None:
    done = run("--version", home=tmp_path)
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"metaclaw-plugin", "python", "litellm", "sqlalchemy", "pluggy"} <= set(told)


def test_a_mistyped_command_is_corrected(tmp_path: Path) -> None:
    done = run("statsu", home=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'status'" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("metaclaw: {gatway: {port: 1}}", "unknown setting metaclaw.gatway; did you mean gateway?"),
        ("metaclaw:\n  gateway:\n    prt: 1\n", "line 3, column 5: unknown setting metaclaw.gateway.prt"),
        (
            "metaclaw:\n  gateway:\n    port: many\n",
            "line 3, column 11: setting metaclaw.gateway.port: Input should be",
        ),
        (
            "metaclaw:\n  rl: {bakend: local}\n",
            "line 2, column 8: unknown setting metaclaw.rl.bakend; did you mean backend?",
        ),
        ("metaclaw:\n  publish: {zzz: 1}\n", "known here: policy"),
        ("metaclaw:\n  base_model: [a]\n", "line 2, column 15: setting metaclaw.base_model"),
        ("metaclaw: {gateway: {prt: 1}}", "unknown setting metaclaw.gateway.prt; did you mean port?"),
        ("metaclaw: {gateway: {port: many}}", "setting metaclaw.gateway.port: Input should be a valid integer"),
        ("metaclaw: {mode: fast}", "setting metaclaw.mode: Input should be 'off', 'skills_only', 'rl' or 'auto'"),
        ("metaclaw: {gateway: {port: 1", "line 1, column 29: not valid YAML"),
        ("- a\n- b\n", "holds no YAML mapping"),
        ("metaclaw: [1]", "metaclaw"),
    ],
)
@pytest.mark.parametrize("command", ["status", "start", "gateway"])
def test_a_config_that_is_nonsense_is_one_line_and_exit_code_1(
    command: str, text: str, expected: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    done = run(command, "--config", str(config), home=tmp_path / "home")
    assert done.returncode == 1
    assert done.stderr.startswith("metaclaw: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_a_config_that_is_missing_is_named(tmp_path: Path) -> None:
    done = run("status", "--config", str(tmp_path / "none.yaml"), home=tmp_path)
    assert done.returncode == 1
    assert "cannot read the config file" in done.stderr
    assert "name it with --config" in done.stderr


def test_status_works_when_nothing_runs_and_nothing_is_stored(tmp_path: Path) -> None:
    done = run("status", "--json", home=tmp_path / "home")
    assert done.returncode == 0
    status = json.loads(done.stdout)
    assert status["running"] is False
    assert status["agents"] == []
    assert not (tmp_path / "home").exists()


def test_stop_without_a_start_says_so(tmp_path: Path) -> None:
    done = run("stop", home=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "MetaClaw does not run.\n"


def test_ctrl_c_is_quiet_and_130(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "gateway.log").write_text("one\ntwo\n")
    process = subprocess.Popen(
        [*METACLAW, "logs", "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "METACLAW_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == ""


def test_a_missing_extra_is_named() -> None:
    assert "metaclaw-plugin[gateway]" in missing_package(ModuleNotFoundError(name="sqlalchemy.engine"))
    assert "metaclaw-plugin[trainer]" in missing_package(ModuleNotFoundError(name="torch"))


def test_logs_shows_the_newest_lines_of_one_or_all(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "gateway.log").write_text("".join(f"gateway {n}\n" for n in range(50)))
    (logs / "worker.log").write_text("worker 0\n")
    done = run("logs", "--lines", "2", home=tmp_path)
    assert done.stdout.splitlines() == ["gateway    gateway 48", "gateway    gateway 49", "worker     worker 0"]
    assert run("logs", "gateway", "-n", "1", home=tmp_path).stdout == "gateway 49\n"
    wrong = run("logs", "nobody", home=tmp_path)
    assert wrong.returncode == 1
    assert "no log named nobody" in wrong.stderr
    assert "gateway, worker" in wrong.stderr


def test_every_target_of_the_makefile_is_in_its_help() -> None:
    root = Path(__file__).resolve().parents[2]
    targets = set(
        next(line for line in (root / "Makefile").read_text().splitlines() if line.startswith(".PHONY")).split()[1:]
    )
    told = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert targets - {"help", "models"} == set(re.findall(r"^make (\w+)", told, re.MULTILINE))
