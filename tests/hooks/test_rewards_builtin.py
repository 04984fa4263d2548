"""The built-in rewards without a model."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.errors import HookFailedError, InvalidRewardError
from metaclaw_hooks.rewards.feedback import feedback_reward
from metaclaw_hooks.rewards.length import LengthReward
from metaclaw_hooks.rewards.next_turn import NextTurnReward
from metaclaw_hooks.rewards.tool_outcome import ToolOutcomeReward
from metaclaw_hooks.rewards.verifier import VerifierReward
from metaclaw_hooks.types import Message, Reward, Trace

from tests.hook_nouns import make_trace

ASK: Message = {"role": "user", "content": "List the meetings of next week with their dates, please."}
REPLY: Message = {"role": "assistant", "content": "Monday 3/4, Tuesday 3/5."}


def after(*added: Message, reply: Message = REPLY) -> tuple[Trace, Trace]:
    """A reply to ASK, and the request that followed with ``added``."""
    first = make_trace(messages=(ASK,), response=reply)
    return first, make_trace(id="t2", turn=1, exchange=1, messages=(ASK, reply, *added))


def next_turn(said: str | list[Any], **options: Any) -> Reward | None:
    first, second = after({"role": "user", "content": said})
    return NextTurnReward(**options).score_trace(first, second)


@pytest.mark.parametrize(
    "said",
    [
        "no, that's wrong, use ISO dates",
        "Thanks, but that's wrong.",
        "I said next week, not this week",
        "It still fails with the same message",
        "That does not work.",
        "you forgot Wednesday",
        [{"type": "text", "text": "Nope, not what I asked"}],
    ],
)
def test_a_correction_makes_the_turn_before_negative(said: str | list[Any]) -> None:
    reward = next_turn(said)
    assert reward is not None
    assert reward.value < -0.5
    assert reward.confidence < 1.0


@pytest.mark.parametrize("said", ["Thanks!", "perfect, now book them", "Great work", "that works", "thank you so much"])
def test_thanks_make_it_positive(said: str) -> None:
    reward = next_turn(said)
    assert reward is not None
    assert reward.value > 0.5


@pytest.mark.parametrize(
    "said",
    [
        "List the birthdays of next month with their names, please.",
        "Now add Friday.",
        "What is the weather?",
        "Can you note the number 42?",
        "I know nothing about greatness",
    ],
)
def test_going_on_is_no_opinion(said: str) -> None:
    assert next_turn(said) is None


def test_saying_the_same_again_is_worse_than_rephrasing_it() -> None:
    same = next_turn("List the meetings of next week, with their dates please")
    other = next_turn("Please list next week's meetings with their dates, all of them")
    assert same is not None
    assert other is not None
    assert same.value < other.value < 0


def test_a_correction_that_says_how_leaves_a_hint_and_a_bare_one_does_not() -> None:
    telling, bare = next_turn("no, that's wrong, use ISO dates"), next_turn("No, that's wrong.")
    assert telling is not None
    assert telling.hint == "no, that's wrong, use ISO dates"
    assert bare is not None
    assert bare.hint is None


def test_words_of_the_owners_own_count_as_well() -> None:
    assert next_turn("Danke, das passt") is None
    reward = next_turn("Danke, das passt", positive=["danke"])
    assert reward is not None
    assert reward.value > 0


def test_the_next_turn_is_read_past_the_clients_internal_context() -> None:
    internal = {"role": "user", "content": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> no, wrong"}
    first, second = after({"role": "user", "content": "Thanks!"}, internal)
    reward = NextTurnReward().score_trace(first, second)
    assert reward is not None
    assert reward.value > 0


def test_tool_results_and_other_choices_are_nothing_that_the_user_said() -> None:
    plugin = NextTurnReward()
    first, second = after({"role": "tool", "content": "wrong"})
    assert plugin.score_trace(first, second) is None
    first, second = after({"role": "user", "content": "No, wrong."})
    another = make_trace(messages=(ASK,), response={"role": "assistant", "content": "Something else entirely"})
    assert plugin.score_trace(another, second) is None


def test_to_leave_says_something_only_after_a_correction() -> None:
    plugin = NextTurnReward()
    assert plugin.score_trace(make_trace(messages=(ASK,)), None) is None
    annoyed = make_trace(exchange=1, messages=(ASK, REPLY, {"role": "user", "content": "That's wrong"}))
    left = plugin.score_trace(annoyed, None)
    assert left is not None
    assert left.value < 0
    assert left.confidence <= 0.3


def call(name: str = "run", arguments: str = '{"cmd": "ls"}', id_: str = "call_1") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_outcome(*results: str, again: bool = False, calls: int = 1) -> Reward | None:
    reply = {"role": "assistant", "content": None, "tool_calls": [call(id_=f"call_{i}") for i in range(calls)]}
    added = [{"role": "tool", "tool_call_id": f"call{i}", "content": text} for i, text in enumerate(results)]
    first, second = after(*added, reply=reply)
    if again:
        response = {"role": "assistant", "content": None, "tool_calls": [call(arguments='{ "cmd":"ls"}', id_="x")]}
        second = make_trace(id="t2", turn=1, messages=second.messages, response=response)
    return ToolOutcomeReward().score_trace(first, second)


@pytest.mark.parametrize(
    ("result", "bad", "sure"),
    [
        ("a.txt\nb.txt", False, 0.3),
        ("Process exited with code 0", False, 0.8),
        ("Process exited with code 127", True, 0.8),
        ('{"exit_code": 1, "output": ""}', True, 0.9),
        ('{"is_error": false, "text": "Error: was handled"}', False, 0.9),
        ('{"error": "no such city"}', True, 0.8),
        ("Traceback (most recent call last):\n  ...", True, 0.5),
        ("bash: foo: command not found", True, 0.5),
        ("The book is called Trial and Error", False, 0.3),
    ],
)
def test_a_tools_result_is_read_for_failure(result: str, bad: bool, sure: float) -> None:
    reward = tool_outcome(result)
    assert reward is not None
    assert (reward.value < 0) is bad
    assert reward.confidence == sure


@pytest.mark.parametrize("result", ["\n" * 16_000, "exit" + " " * 16_000, "exit code" + "\t" * 16_000, "[" * 16_000])
def test_no_result_of_a_tool_takes_long_to_read(result: str) -> None:
    started = time.process_time()
    tool_outcome(result)
    assert time.process_time() - started < 1


def test_the_share_of_failures_and_a_repeated_call_count() -> None:
    half = tool_outcome("ok", "exit code 1", calls=2)
    whole = tool_outcome("exit code 1")
    repeated = tool_outcome("exit code 1", again=True)
    again = tool_outcome("ok", again=True)
    assert None not in (half, whole, repeated, again)
    values = [reward.value for reward in (repeated, whole, half) if reward]
    assert values == sorted(values)
    assert values[-1] < 0
    assert again == Reward("tool_outcome", -0.4, "the same tool call was made again at once", 0.4)


def test_without_tools_or_results_there_is_no_opinion() -> None:
    plugin = ToolOutcomeReward()
    first, second = after({"role": "user", "content": "exit code 1"})
    assert plugin.score_trace(first, second) is None
    assert tool_outcome() is None


def test_length_falls_from_the_budget_to_twice_of_it() -> None:
    plugin = LengthReward(10)
    values = [plugin.score_trace(make_trace(response_token_ids=(1,) * n)) for n in (1, 10, 15, 20, 90)]
    assert [reward.value for reward in values if reward] == [1.0, 1.0, 0.0, -1.0, -1.0]
    assert plugin.score_trace(make_trace(response_token_ids=None)) is None


def test_feedback_outside_the_scale_is_refused() -> None:
    assert feedback_reward(-1, "use ISO dates").rationale == "use ISO dates"
    with pytest.raises(InvalidRewardError):
        feedback_reward(7, "")


def script(path: Path, body: str) -> list[str]:
    path.write_text("import json, sys\ntrace = json.load(sys.stdin)\n" + body, encoding="utf-8")
    return [sys.executable, str(path)]


async def test_a_verifiers_exit_code_or_number_is_the_reward(tmp_path: Path) -> None:
    command = script(tmp_path / "v.py", "sys.exit(0 if 'fine' in trace['response_text'] else 1)\n")
    verifier = VerifierReward(command)
    assert await verifier.score_trace(make_trace()) == Reward("verifier", 1.0, "passed")
    assert await verifier.score_trace(make_trace(text="bad")) == Reward("verifier", -1.0, "failed")
    measure = VerifierReward(script(tmp_path / "m.py", "print('half'); print(0.5)\n"))
    reward = await measure.score_trace(make_trace())
    assert reward is not None
    assert reward.value == 0.5


@pytest.mark.parametrize("body", ["sys.exit(3)\n", "print(7)\n", "raise SystemExit('x' * 3 and 9)\n"])
async def test_a_verifier_that_fails_has_no_opinion(tmp_path: Path, body: str) -> None:
    with pytest.raises(HookFailedError):
        await VerifierReward(script(tmp_path / "v.py", body)).score_trace(make_trace())


async def test_a_verifier_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = (
        "import subprocess, os, time\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\ntime.sleep(60)\n"
    )
    with pytest.raises(HookFailedError, match="took over"):
        await VerifierReward(script(tmp_path / "v.py", body), timeout=1.5).score_trace(make_trace())
    for pid in map(int, pids.read_text().split()):
        assert _ends(pid)


def _ends(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


async def test_a_verifier_sees_an_empty_folder_and_none_of_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METACLAW_TEST_SECRET", "x")
    seen = tmp_path / "seen"
    body = (
        "import os\n"
        f"json.dump([os.listdir('.'), sorted(os.environ)], open({str(seen)!r}, 'w'))\nopen('junk', 'w').write('x')\n"
    )
    for _ in range(2):  # what the first run leaves behind, the second does not find
        await VerifierReward(script(tmp_path / "v.py", body)).score_trace(make_trace())
    files, names = json.loads(seen.read_text())
    assert files == []
    assert "METACLAW_TEST_SECRET" not in names


async def test_a_python_callable_verifies_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checks.py").write_text(
        "import os\ndef right(trace): return trace['response_text'] == 'fine'\n"
        "def pid(trace): return os.getpid() / 1e9\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = await VerifierReward.of_callable("checks:right").score_trace(make_trace())
    assert reward == Reward("verifier", 1.0, "passed")
    other = await VerifierReward.of_callable("checks:pid").score_trace(make_trace())
    assert other is not None
    assert other.value != os.getpid() / 1e9
    with pytest.raises(ValueError, match="module:function"):
        VerifierReward.of_callable("checks")
