"""The plugin manager: discovery, isolation, time-outs, counters."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks import Reward, hookimpl
from metaclaw_hooks.errors import PluginLoadError, UnknownHookError
from metaclaw_hooks.plugins import HOOKS, Plugins, create_plugin_manager
from metaclaw_hooks.types import Session

from tests.hook_nouns import make_session, make_trace


def load(folder: Path | None = None, timeout: float = 5.0, **builtins: object) -> Plugins:
    return create_plugin_manager(folder, timeout, builtins, packages=False)


async def score(plugins: Plugins, agent: str = "alpha", text: str = "fine") -> dict[str, float]:
    trace = make_trace(agent=agent, text=text)
    found = await plugins.call("score_trace", trace=trace, next_trace=None, session=make_session(trace))
    return {name: reward.value for name, reward in found}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


async def test_a_plain_file_without_decorator_is_a_reward(tmp_path: Path) -> None:
    write(tmp_path / "brevity.py", "def score_trace(trace): return 1 if len(trace.response_text) < 10 else -1\n")
    plugins = load(tmp_path)
    assert await score(plugins) == {"brevity": 1.0}
    assert await score(plugins, text="a very long answer indeed") == {"brevity": -1.0}


async def test_a_decorated_and_an_async_function_work_as_well(tmp_path: Path) -> None:
    write(
        tmp_path / "slow.py",
        "import asyncio\nfrom metaclaw_hooks import Reward, hookimpl\n"
        "@hookimpl\nasync def score_trace(trace, session):\n    await asyncio.sleep(0)\n"
        "    return Reward('whatever', 0.25, rationale=session.id)\n",
    )
    plugins = load(tmp_path)
    trace = make_trace()
    [(name, reward)] = await plugins.call("score_trace", trace=trace, next_trace=None, session=make_session(trace))
    assert (name, reward.source, reward.value, reward.rationale) == ("slow", "slow", 0.25, trace.session)


@pytest.mark.law(4)
async def test_a_file_in_an_agents_folder_is_never_called_for_another_agent(tmp_path: Path) -> None:
    write(tmp_path / "alpha" / "reward.py", "def score_trace(trace): return 0.5\n")
    write(tmp_path / "beta" / "reward.py", "def score_trace(trace): return -0.5\n")
    plugins = load(tmp_path)
    assert await score(plugins, "alpha") == {"alpha/reward": 0.5}
    assert await score(plugins, "beta") == {"beta/reward": -0.5}
    assert await score(plugins, "gamma") == {}
    assert plugins.implementers("score_trace", "alpha") == ["alpha/reward"]


@pytest.mark.parametrize(
    "body",
    ["raise ValueError('secret text')", "return float('nan')", "return 7.0", "return 'good'", "return True",
     "return trace", "import sys; sys.exit(3)", "import time; time.sleep(60)"],
)  # fmt: skip
async def test_a_bad_plugin_is_isolated_named_and_counted(
    tmp_path: Path, body: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "bad.py", f"def score_trace(trace):\n    {body}\n")
    write(tmp_path / "good.py", "def score_trace(trace): return 0.5\n")
    plugins = load(tmp_path, timeout=0.2)
    with caplog.at_level(logging.WARNING):
        assert await score(plugins) == {"good": 0.5}
    stats = {info.name: info.hooks["score_trace"] for info in plugins.describe()}
    assert (stats["bad"].calls, stats["bad"].failures) == (1, 1)
    assert (stats["good"].calls, stats["good"].failures) == (1, 0)
    assert "plugin bad: score_trace failed" in caplog.text
    assert "counted as no opinion" in caplog.text
    assert "secret text" not in caplog.text


async def test_a_hook_that_hangs_costs_its_time_and_then_nothing(tmp_path: Path) -> None:
    release = threading.Event()

    class Hangs:
        @hookimpl
        def score_trace(self, trace: Any) -> float:
            release.wait(30)
            return 1.0

    plugins = load(timeout=0.05, hangs=Hangs())
    for _ in range(6):
        assert await score(plugins) == {}
    stats = plugins.describe()[0].hooks["score_trace"]
    assert (stats.calls, stats.failures, stats.timeouts) == (6, 6, 4)  # after four it is no longer called
    assert stats.last_error is not None
    assert "still hang" in stats.last_error
    release.set()
    for _ in range(100):
        if await score(plugins) == {"hangs": 1.0}:
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the plugin was not called again after its calls had come back")


async def test_a_coroutine_that_blocks_its_loop_holds_up_no_other_plugin(tmp_path: Path) -> None:
    write(tmp_path / "blocks.py", "import time\nasync def score_trace(trace):\n    time.sleep(60)\n")
    write(tmp_path / "other.py", "import asyncio\nasync def score_trace(trace):\n    return 0.5\n")
    plugins = load(tmp_path, timeout=0.2)
    assert await score(plugins) == {"other": 0.5}
    assert await score(plugins) == {"other": 0.5}


async def test_a_call_under_way_outlives_a_change_of_its_file(tmp_path: Path) -> None:
    slow = "import asyncio\nasync def score_trace(trace):\n    await asyncio.sleep(0.5)\n    return {}\n"
    write(tmp_path / "slow.py", slow.format(0.25))
    plugins = load(tmp_path, timeout=20)
    before = asyncio.create_task(score(plugins))
    await asyncio.sleep(0.1)
    write(tmp_path / "slow.py", slow.format("0.75  # changed"))
    assert plugins.refresh()
    assert await score(plugins) == {"slow": 0.75}
    assert await asyncio.wait_for(before, 10) == {"slow": 0.25}


async def test_a_dropped_plugin_leaves_no_task_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A task that the collector finds pending would be reported, with a traceback, inside whatever runs just then."""
    path = write(
        tmp_path / "spawns.py",
        "import asyncio\nkept = []\nasync def score_trace(trace):\n"
        "    kept.append(asyncio.ensure_future(asyncio.sleep(600)))\n    await asyncio.sleep(600)\n",
    )
    plugins = load(tmp_path, timeout=0.2)
    calls = [asyncio.create_task(score(plugins)) for _ in range(3)]
    await asyncio.sleep(0.1)
    path.unlink()
    assert plugins.refresh()
    assert await asyncio.gather(*calls) == [{}, {}, {}]
    deadline = time.monotonic() + 10
    while any(thread.name == "metaclaw-loop-spawns" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the loop of a plugin that is gone does not end"
        await asyncio.sleep(0.02)
    gc.collect()
    assert "pending" not in caplog.text


def test_a_hanging_hook_does_not_keep_the_process_alive() -> None:
    plugins = load(timeout=0.05, hangs=type("H", (), {"score_trace": hookimpl(lambda self, trace: time.sleep(60))})())
    trace = make_trace()
    assert plugins.call_blocking("score_trace", trace=trace, next_trace=None, session=make_session(trace)) == []
    hanging = [t for t in threading.enumerate() if t.name == "metaclaw-hook-hangs"]
    assert hanging
    assert all(thread.daemon for thread in hanging)


async def test_an_idle_plugin_keeps_no_session_alive() -> None:
    plugins = load(reads=type("R", (), {"score_trace": hookimpl(lambda self, session: 0.5)})())

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Session) and one.id == "watched" for one in gc.get_objects())

    trace = make_trace(session="watched")
    session = make_session(trace)
    assert alive() == 1
    await plugins.call("score_trace", trace=trace, next_trace=None, session=session)
    del session
    deadline = time.monotonic() + 10
    while alive():
        assert time.monotonic() < deadline, "the plugin's thread still holds what it was called with"
        await asyncio.sleep(0.02)


async def test_a_file_is_picked_up_changed_and_dropped_while_running(tmp_path: Path) -> None:
    plugins = load(tmp_path / "hooks")
    assert await score(plugins) == {}
    path = write(tmp_path / "hooks" / "mine.py", "def score_trace(trace): return 0.1\n")
    assert plugins.refresh()
    assert await score(plugins) == {"mine": 0.1}
    assert not plugins.refresh()
    write(path, "def score_trace(trace): return 0.9\n")
    assert plugins.refresh()
    assert await score(plugins) == {"mine": 0.9}
    path.unlink()
    assert plugins.refresh()
    assert await score(plugins) == {}


async def test_a_broken_edit_leaves_the_version_before_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "mine.py", "def score_trace(trace): return 0.1\n")
    plugins = load(tmp_path)
    write(path, "def score_trace(trace) return 0.9\n")
    plugins.refresh()
    assert await score(plugins) == {"mine": 0.1}
    assert "syntax error" in plugins.problems[str(path)]
    assert "stays in force" in caplog.text
    write(path, "def score_trace(trace, colour): return 0.9\n")
    plugins.refresh()
    assert await score(plugins) == {"mine": 0.1}
    assert "colour" in plugins.problems[str(path)]
    write(path, "def score_trace(trace): return 0.9\n")
    plugins.refresh()
    assert await score(plugins) == {"mine": 0.9}
    assert plugins.problems == {}


async def test_files_that_cannot_be_plugins_are_told_and_the_others_load(tmp_path: Path) -> None:
    bad = write(tmp_path / "a_bad.py", "def score_trace(:\n")
    raises = write(tmp_path / "b_raises.py", "def score_trace(trace): return 1\nraise RuntimeError('no')\n")
    empty = write(tmp_path / "c_nothing.py", "def scoretrace(trace): return 1\n")
    write(tmp_path / "d_good.py", "def score_trace(trace): return 1\n")
    odd = write(tmp_path / "Not A Slug" / "x.py", "def score_trace(trace): return 1\n").parent
    plugins = load(tmp_path)
    assert await score(plugins) == {"d_good": 1.0}
    assert set(plugins.problems) == {str(bad), str(raises), str(empty), str(odd)}
    assert "line 1" in plugins.problems[str(bad)]
    assert "score_trace" in plugins.problems[str(empty)]


def test_a_file_without_the_wanted_hooks_is_not_even_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write(
        tmp_path / "hooks" / "t.py",
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef after_step(agent, metrics): pass\n",
    )
    gateway = create_plugin_manager(tmp_path / "hooks", 5.0, wanted=("select_skills",), packages=False)
    assert not marker.exists()
    assert gateway.describe() == []
    assert gateway.problems == {}
    trainer = create_plugin_manager(tmp_path / "hooks", 5.0, wanted=("after_step",), packages=False)
    assert marker.exists()
    assert [info.name for info in trainer.describe()] == ["t"]


async def test_of_two_plugins_of_one_name_the_second_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "length.py", "def score_trace(trace): return -1.0\n")

    class Length:
        SCORES_LONE_REPLY = True

        @hookimpl
        def score_trace(self, trace: Any) -> float:
            return 0.5

    plugins = load(tmp_path, length=Length())
    assert await score(plugins) == {"length": 0.5}
    assert "taken by built-in" in plugins.problems[str(tmp_path / "length.py")]
    with pytest.raises(PluginLoadError, match="rename"):
        plugins.add("length", Length(), origin="test")


def test_a_reward_says_whether_it_can_score_a_lone_reply(tmp_path: Path) -> None:
    write(tmp_path / "lone.py", "def score_trace(trace): return 1\n")
    write(tmp_path / "waits.py", "def score_trace(trace, next_trace): return 1\n")
    write(tmp_path / "says.py", "SCORES_LONE_REPLY = False\ndef score_trace(trace): return 1\n")
    write(tmp_path / "other.py", "def adapter_published(version): pass\n")
    plugins = load(tmp_path)
    said = {info.name: info.lone_reply for info in plugins.describe()}
    assert said == {"lone": True, "waits": False, "says": False, "other": None}


async def test_the_first_opinion_wins_and_a_failure_is_none(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "def combine_rewards(trace, rewards): return 0.75\n")
    write(tmp_path / "b.py", "def combine_rewards(trace, rewards): return None\n")
    write(tmp_path / "c.py", "def combine_rewards(trace, rewards): return float('inf')\n")
    plugins = load(tmp_path)
    assert await plugins.call_first("combine_rewards", trace=make_trace(), rewards=[Reward("x", 0.1)]) == 0.75


async def test_what_was_counted_is_handed_out_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.py", "def score_trace(trace): return 1\n")
    plugins = load(tmp_path)
    await score(plugins)
    await score(plugins)
    assert plugins.take_stats()["x", "score_trace"].calls == 2
    assert plugins.take_stats() == {}
    write(path, "def score_trace(trace): return 0.5\n")
    plugins.refresh()
    await score(plugins)
    assert plugins.take_stats()["x", "score_trace"].calls == 1


async def test_an_unknown_hook_is_the_callers_mistake() -> None:
    with pytest.raises(UnknownHookError, match="score_trace"):
        await load().call("score_traces", trace=make_trace())


def test_a_wrapper_is_refused_with_a_reason() -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def score_trace(self, trace: Any) -> Any:
            yield

    with pytest.raises(PluginLoadError, match="wrapper"):
        load(w=Wraps())


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_of_the_seam_can_be_implemented(hook: str) -> None:
    implementation: Callable[..., None] = lambda *args: None  # noqa: E731
    plugins = load(p=type("P", (), {hook: hookimpl(staticmethod(implementation))})())
    assert plugins.implementers(hook) == ["p"]
