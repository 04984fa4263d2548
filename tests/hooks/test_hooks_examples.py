"""The shipped examples work as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.plugins import Plugins, create_plugin_manager
from metaclaw_hooks.types import AdapterVersion, Reward

from tests.hook_nouns import make_session, make_trace

EXAMPLES = Path(__file__).resolve().parents[2] / "hooks" / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def load(name: str, tmp_path: Path) -> Plugins:
    folder = tmp_path / "hooks"
    folder.mkdir()
    (folder / name).write_text((EXAMPLES / name).read_text(encoding="utf-8"), encoding="utf-8")
    plugins = create_plugin_manager(folder, 30.0, packages=False)
    assert plugins.problems == {}
    return plugins


async def score(plugins: Plugins, text: str) -> Reward | None:
    trace = make_trace(text=text)
    found = await plugins.call("score_trace", trace=trace, next_trace=None, session=make_session(trace))
    assert all(stats.failures == 0 for info in plugins.describe() for stats in info.hooks.values())
    return found[0][1] if found else None


def test_each_example_is_in_the_readme_and_in_a_test() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    for name in FILES:
        assert f"`{name}`" in readme
        assert f'"{name}"' in here


def test_the_ten_lines_are_ten_lines() -> None:
    lines = (EXAMPLES / "short_replies.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


async def test_short_replies(tmp_path: Path) -> None:
    plugins = load("short_replies.py", tmp_path)
    short, long, silent = [await score(plugins, text) for text in ("Yes.", "word " * 200, "")]
    assert short is not None
    assert long is not None
    assert short.value > 0.9
    assert long.value == -1.0
    assert silent is None


async def test_regex_format(tmp_path: Path) -> None:
    plugins = load("regex_format.py", tmp_path)
    iso, other, none = [await score(plugins, text) for text in ("On 2026-04-03.", "On 4/3/2026.", "Soon.")]
    assert iso is not None
    assert other is not None
    assert (iso.value, other.value, none) == (1.0, -1.0, None)
    assert other.hint is not None


async def test_length_penalty(tmp_path: Path) -> None:
    plugins = load("length_penalty.py", tmp_path)
    opinions = [Reward("a", 1.0, confidence=0.5), Reward("b", 0.0, confidence=0.5)]
    short = make_trace(response_token_ids=(1,) * 200, response_logprobs=(-1.0,) * 200)
    long = make_trace(response_token_ids=(1,) * 400, response_logprobs=(-1.0,) * 400)
    assert await plugins.call_first("combine_rewards", trace=short, rewards=opinions) == 0.5
    assert await plugins.call_first("combine_rewards", trace=long, rewards=opinions) == pytest.approx(0.3)
    said = [*opinions, Reward("feedback", 1.0)]
    assert await plugins.call_first("combine_rewards", trace=long, rewards=said) == 1.0
    assert await plugins.call_first("combine_rewards", trace=long, rewards=[]) is None


async def test_unit_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "tests.py"
    tests.write_text("from answer import double\ndef test_double(): assert double(2) == 4\n")
    monkeypatch.setenv("METACLAW_UNIT_TESTS", str(tests))
    plugins = load("unit_tests.py", tmp_path)
    right = await score(plugins, "Here:\n```python\ndef double(x):\n    return 2 * x\n```")
    wrong = await score(plugins, "Here:\n```python\ndef double(x):\n    return x\n```")
    assert right is not None
    assert wrong is not None
    assert (right.value, wrong.value) == (1.0, -1.0)
    assert await score(plugins, "I cannot.") is None


def version(**metrics: float) -> AdapterVersion:
    return AdapterVersion("alpha", 3, "m", 2, ("t1",), 3, metrics, "0" * 64, {}, "/nowhere", 0.0)


async def test_careful_adapters(tmp_path: Path) -> None:
    plugins = load("careful_adapters.py", tmp_path)
    far = await plugins.call("accept_adapter", candidate=version(kl=0.9), evaluation={})
    assert far == [("careful_adapters", False)]
    assert await plugins.call("accept_adapter", candidate=version(kl=0.1), evaluation={}) == []
    assert await plugins.call("adapter_published", version=version()) == []


def test_metrics_to_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    tracker: Any = types.ModuleType("trackio")
    tracker.init = lambda **options: logged.append(options)
    tracker.log = logged.append
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    plugins = load("metrics_to_trackio.py", tmp_path)
    plugins.call_blocking("after_step", agent="alpha", metrics={"loss": 0.5})
    plugins.call_blocking("after_step", agent="beta", metrics={"loss": 0.25})
    assert logged == [{"project": "metaclaw"}, {"alpha/loss": 0.5}, {"beta/loss": 0.25}]


LIST = """
import json
from metaclaw_hooks.plugins import create_plugin_manager
plugins = create_plugin_manager(None, 5.0)
print(json.dumps([[p.name, p.origin, p.lone_reply, list(p.hooks)] for p in plugins.describe()]))
"""


def test_the_package_is_installed_with_pip_found_and_passes_its_own_tests(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run(["cp", "-r", str(EXAMPLES / "package"), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run([sys.executable, "-c", LIST], env=environment, check=True, capture_output=True, text=True)
    assert ["polite", "package metaclaw-polite", True, ["score_trace"]] in json.loads(shown.stdout)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(source / "tests")]
    tested = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, cwd=source)
    assert "5 passed" in tested.stdout, tested.stdout + tested.stderr
