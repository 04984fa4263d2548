"""Which rewards are on for whom, what they wait for, and what explicit feedback does to them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Kind, Message, Reward

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.store import rewards as store
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import set_settings
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.traces import rewards_of
from metaclaw_plugin.worker.credit import share_of
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.policy import Wait, plan_rewards
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_session, make_trace
from tests.worker_stage import accepted, answer, fill, rows, worker_context, worker_settings, write_hook

ASK: Message = {"role": "user", "content": "When is the meeting?"}
REPLY: Message = {"role": "assistant", "content": "On 4/3."}


def conversation(*said: str) -> list[object]:
    """A session of the user's messages ASK and ``said``, each answered by REPLY."""
    messages: tuple[Message, ...] = (ASK,)
    traces = [make_trace(id="t0", messages=messages, response=REPLY, finished_at=time.time())]
    for number, text in enumerate(said, 1):
        messages = (*messages, REPLY, {"role": "user", "content": text})
        traces.append(
            make_trace(
                id=f"t{number}",
                turn=number,
                exchange=number,
                messages=messages,
                response=REPLY,
                finished_at=time.time(),
            )
        )
    return traces


async def test_a_correction_makes_the_turn_before_negative_and_leaves_a_hint(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, *conversation("no, that's wrong, use ISO dates"))
        assert await Scorer(ctx).round() == 1
        [(_, score, reward, hint), (_, later, _, _)] = rows(ctx.engine, "id", "score", "reward", "hint")
        assert (score, later) == ("scored", "waiting")
        assert reward < -0.5
        assert hint == "no, that's wrong, use ISO dates"


async def test_injected_skills_are_not_taken_for_the_users_words(tmp_path: Path) -> None:
    injected = "Thanks, that's it.\n<metaclaw-skills>\nno, that's wrong\n</metaclaw-skills>"
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, *conversation(injected))
        await Scorer(ctx).round()
        assert rows(ctx.engine, "reward")[0][0] > 0


def test_inferring_rewards_are_off_where_the_owner_has_one_of_his_own(tmp_path: Path) -> None:
    write_hook(tmp_path, "alpha/mine", "def score_trace(trace): return 1\n")
    settings = worker_settings(tmp_path)
    with worker_context(settings) as ctx:
        alpha = plan_rewards(ctx.plugins, settings.rewards, "alpha")
        beta = plan_rewards(ctx.plugins, settings.rewards, "beta")
    assert (set(alpha.weights), alpha.wait) == ({"alpha/mine"}, Wait.NOTHING)
    assert (set(beta.weights), beta.wait) == ({"next_turn", "tool_outcome"}, Wait.FOLLOWED)


def test_a_weight_that_is_set_counts_more_than_that_rule(tmp_path: Path) -> None:
    write_hook(tmp_path, "mine", "def score_trace(trace): return 1\n")
    settings = worker_settings(
        tmp_path, rewards={"weights": {"next_turn": 0.5}, "per_agent": {"alpha": {"mine": 0, "tool_outcome": 2}}}
    )
    with worker_context(settings) as ctx:
        assert plan_rewards(ctx.plugins, settings.rewards, "alpha").weights == {"next_turn": 0.5, "tool_outcome": 2.0}
        assert plan_rewards(ctx.plugins, settings.rewards, "beta").weights == {"next_turn": 0.5, "mine": 1.0}


def test_built_in_rewards_come_with_their_settings(tmp_path: Path) -> None:
    settings = worker_settings(
        tmp_path,
        rewards={"length": {"max_tokens": 50}, "verifier": {"command": ["true"]}, "judge": {"model": "a-model"}},
    )
    with worker_context(settings) as ctx:
        lone = {info.name: info.lone_reply for info in ctx.plugins.describe()}
        assert lone == {"next_turn": False, "tool_outcome": False, "length": True, "verifier": True, "judge": True}
        assert plan_rewards(ctx.plugins, settings.rewards, "alpha").wait is Wait.FOLLOWED


def test_a_judge_alone_waits_for_what_followed_and_a_length_alone_does_not(tmp_path: Path) -> None:
    off = {"next_turn": 0, "tool_outcome": 0}
    for section, wait in (({"judge": {"model": "m"}}, Wait.FOLLOWED), ({"length": {"max_tokens": 5}}, Wait.NOTHING)):
        settings = worker_settings(tmp_path, rewards={"weights": off, **section})
        with worker_context(settings) as ctx:
            assert plan_rewards(ctx.plugins, settings.rewards, "alpha").wait is wait


@pytest.mark.parametrize(
    "verifier", [{"command": ["true"], "function": "a:b"}, {"function": "no-colon"}], ids=["both", "no callable"]
)
def test_a_verifier_that_is_set_up_wrongly_stops_the_worker_with_a_reason(
    tmp_path: Path, verifier: dict[str, object]
) -> None:
    settings = worker_settings(tmp_path, rewards={"verifier": verifier})
    with pytest.raises(ConfigError, match=r"metaclaw\.rewards\.verifier"), worker_context(settings):
        pass


async def test_what_the_store_holds_for_one_agent_counts_for_it(tmp_path: Path) -> None:
    write_hook(tmp_path, "a", "def score_trace(trace): return 1.0\n")
    write_hook(tmp_path, "b", "def score_trace(trace): return -1.0\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", agent="beta", session="s2"))
        with ctx.engine.begin() as c:
            set_settings(c, "beta", {"rewards": {"weights": {"a": 0}}})
            set_settings(c, "alpha", {"rewards": {"weights": "nonsense"}})
        await Scorer(ctx).round()
        assert rows(ctx.engine, "agent", "reward") == [("alpha", 0.0), ("beta", -1.0)]


async def test_late_feedback_replaces_what_was_inferred(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        await Scorer(ctx).round()
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "chatcmpl-1", -1.0, "use ISO dates", time.time())
        assert await feedback_round(ctx) == 1
        assert await feedback_round(ctx) == 0
        assert rows(ctx.engine, "score", "reward") == [("scored", -1.0)]
        with ctx.engine.connect() as c:
            assert {r.source: r.value for r in rewards_of(c, "t1")} == {"feedback": -1.0, "r": 0.5}


async def test_feedback_scores_what_nobody_had_an_opinion_on_and_it_is_forwarded(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return None\n")
    with worker_context(worker_settings(tmp_path), answer(accepted)) as ctx:
        fill(ctx.engine, make_trace())
        await Scorer(ctx).round()
        assert await Forwarder(ctx).round() == 0
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "t1", 1.0, "", time.time())
        await feedback_round(ctx)
        assert await Forwarder(ctx).round() == 1


async def test_feedback_before_the_trace_is_stored_waits_for_it_and_hastens_its_score(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "chatcmpl-1", 0.75, "", time.time())
        assert await feedback_round(ctx) == 0
        fill(ctx.engine, make_trace(finished_at=time.time()))
        assert await Scorer(ctx).round() == 0
        assert await feedback_round(ctx) == 1
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "score", "reward") == [("scored", 0.75)]


async def test_of_two_pieces_of_feedback_the_later_counts(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), closed=True)
        await Scorer(ctx).round()
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "t1", 1.0, "", 2.0 + time.time())
            store.add_feedback(c, "alpha", "t1", -1.0, "", time.time())
        await feedback_round(ctx)
        assert rows(ctx.engine, "reward") == [(1.0,)]


@pytest.mark.law(4)
async def test_feedback_never_reaches_another_agents_trace(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", agent="beta", session="s2", response_id="other"))
        with ctx.engine.begin() as c:
            store.add_feedback(c, "beta", "t1", -1.0, "", time.time())
        assert await feedback_round(ctx) == 0
        assert rows(ctx.engine, "reward") == [(None,), (None,)]


async def test_feedback_that_names_nothing_is_dropped_after_a_week_and_counted(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "nothing", 1.0, "", time.time() - 8 * 86_400)
        await feedback_round(ctx)
        with ctx.engine.connect() as c:
            assert store.open_feedback(c, 10, time.time()) == []
            assert read_counters(c, "feedback_unmatched") == {"feedback_unmatched": {"alpha": 1}}


@pytest.mark.law(3)
async def test_feedback_on_a_trained_trace_changes_its_reward_and_trains_nothing_again(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path), answer(accepted)) as ctx:
        fill(ctx.engine, make_trace())
        await Scorer(ctx).round()
        await Forwarder(ctx).round()
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).values(forward="trained"))
            store.add_feedback(c, "alpha", "t1", -1.0, "", time.time())
        await feedback_round(ctx)
        assert await Forwarder(ctx).round() == 0
        assert rows(ctx.engine, "reward", "forward") == [(-1.0, "trained")]


async def test_combine_rewards_has_the_last_word_on_feedback_too(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    write_hook(tmp_path, "c", "def combine_rewards(trace, rewards): return sum(r.value for r in rewards) / 4\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace())
        await Scorer(ctx).round()
        with ctx.engine.begin() as c:
            store.add_feedback(c, "alpha", "t1", -1.0, "", time.time())
        await feedback_round(ctx)
        assert rows(ctx.engine, "reward") == [(-0.125,)]


async def test_rescoring_takes_the_rewards_of_today(tmp_path: Path) -> None:
    path = write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    write_hook(tmp_path, "gone", "def score_trace(trace): return 0.5\n")
    with worker_context(worker_settings(tmp_path)) as ctx:
        fill(ctx.engine, make_trace(), make_trace(id="t2", session="s2", finished_at=2000.0))
        await Scorer(ctx).round()
        path.write_text("def score_trace(trace): return -0.5\n")
        (tmp_path / "hooks" / "gone.py").unlink()
        ctx.plugins.refresh()
        with ctx.engine.begin() as c:
            assert store.score_again(c, "alpha", since=1500.0) == 1
        assert await Scorer(ctx).round() == 1
        assert rows(ctx.engine, "id", "reward") == [("t1", 0.5), ("t2", -0.5)]
        with ctx.engine.connect() as c:
            assert [r.source for r in rewards_of(c, "t2")] == ["r"]


SESSION_REWARD = "SCORES_SESSION = True\ncalls = []\ndef score_trace(trace, session):\n"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("discounted", [0.64, 0.8, 1.0]), ("undiscounted", [1.0, 1.0, 1.0]), ("per_turn", [0.0, 0.1, 0.2])],
)
async def test_a_sessions_reward_is_spread_to_its_turns_by_the_rule(
    tmp_path: Path, rule: str, expected: list[float]
) -> None:
    body = "    return trace.turn / 10\n" if rule == "per_turn" else "    return 1.0 if trace.turn == 2 else -1.0\n"
    write_hook(tmp_path, "whole", SESSION_REWARD + body)
    settings = worker_settings(tmp_path, rewards={"session_credit": rule, "session_discount": 0.8})
    with worker_context(settings) as ctx:
        fill(ctx.engine, *conversation("Go on.", "And on."), closed=True)
        await Scorer(ctx).round()
        assert [row[0] for row in rows(ctx.engine, "reward")] == pytest.approx(expected)
        calls = next(info for info in ctx.plugins.describe() if info.name == "whole").hooks["score_trace"].calls
        assert calls == (3 if rule == "per_turn" else 1)


async def test_a_sessions_reward_waits_for_the_end_of_the_session(tmp_path: Path) -> None:
    write_hook(tmp_path, "whole", SESSION_REWARD + "    return 1.0\n")
    settings = worker_settings(tmp_path, worker={"evidence_timeout": 0})
    with worker_context(settings) as ctx:
        fill(ctx.engine, *conversation("Go on."))
        assert await Scorer(ctx).round() == 0
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.sessions).values(closed_at=time.time()))
        assert await Scorer(ctx).round() == 2


def test_side_requests_take_no_part_in_the_credit(tmp_path: Path) -> None:
    first, side, last = make_trace(), make_trace(id="s", turn=1, kind=Kind.SIDE), make_trace(id="l", turn=2)
    settings = worker_settings(tmp_path).rewards
    share = share_of(Reward("w", 1.0), first, make_session(first, side, last), settings)
    assert share.value == pytest.approx(0.9)
