"""Evolution in the worker: what is kept for it, what it may change, and what happens when it goes wrong."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Agent, Kind, Mode

from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.evolution import accept_proposal
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.skill_file import SHARED
from metaclaw_plugin.skills.support import is_due, pending, reserve_support, rounds
from metaclaw_plugin.skills.upkeep import SkillKeeper
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import remove_agent
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.deletion import delete_all
from metaclaw_plugin.store.forwarding import mark_merged, mergeable
from metaclaw_plugin.store.traces import TraceFilter
from metaclaw_plugin.worker.context import WorkerContext
from tests.skill_cases import Evolver, Reply, evolving, generation, put, says, stage, talk
from tests.worker_stage import fill, worker_context

ALPHA = Agent("alpha", Mode.SKILLS_ONLY)
LESSON = {
    "action": "add",
    "name": "metric-units",
    "description": "Use when lengths, weights or temperatures are given.",
    "triggers": "how long, how heavy, kilometres, weight",
    "body": "1. Give metric units first.\n2. Put imperial units in brackets.",
    "reason": "the user had to ask twice",
}


def scored(ctx: WorkerContext, **reward_of: float | None) -> None:
    t = schema.traces
    with ctx.engine.begin() as c:
        for trace, reward in reward_of.items():
            values = {"score": "scored", "reward": reward, "scored_at": time.time()}
            c.execute(sa.update(t).where(t.c.id == trace.replace("_", "-")).values(**values))


def purposes(ctx: WorkerContext) -> dict[str, str]:
    with ctx.engine.connect() as c:
        return {row.id: row.purpose for row in c.execute(sa.select(schema.traces.c.id, schema.traces.c.purpose))}


def own_skills(ctx: WorkerContext, agent: str = "alpha") -> dict[str, str]:
    found = Library(ctx.settings.skills_path).skills_of(agent)
    return {name: skill.body for name, skill in found.items()}


def once(ctx: WorkerContext) -> int:
    return asyncio.run(SkillKeeper(ctx).round())


@pytest.mark.law(8)
def test_law_8_a_failure_and_all_it_builds_on_is_support_and_never_forwarded(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([]))) as ctx:
        fill(ctx.engine, talk(0), talk(1), talk(2), talk(3, session="ses-1"))
        scored(ctx, tr_0=0.9, tr_1=-0.5, tr_2=0.8, tr_3=0.7)
        with ctx.engine.begin() as c:
            assert reserve_support(c, ALPHA, ctx.settings.skills.evolution, time.time()) == ["tr-1"]
        assert purposes(ctx) == {"tr-0": "support", "tr-1": "support", "tr-2": "unsettled", "tr-3": "unsettled"}
        with ctx.engine.begin() as c:
            forwardable = mergeable(c, "alpha", time.time(), 0, 100)
            assert {turn.trace_id for turn in forwardable} == {"tr-2", "tr-3"}
            assert mark_merged(c, {"sample": forwardable[:1]})


@pytest.mark.law(8)
def test_law_8_a_session_of_which_anything_is_forwarded_is_never_shown(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON]))
    with stage(tmp_path, evolver) as ctx:
        fill(ctx.engine, talk(0), talk(1))
        scored(ctx, tr_0=0.9, tr_1=-0.5)
        with ctx.engine.begin() as c:
            first = [turn for turn in mergeable(c, "alpha", time.time(), 0, 100) if turn.trace_id == "tr-0"]
            assert mark_merged(c, {"sample": first})
        assert once(ctx) == 0
        assert purposes(ctx) == {"tr-0": "query", "tr-1": "unsettled"}
        assert evolver.asked == []


@pytest.mark.law(8)
def test_law_8_the_replay_set_and_side_turns_are_never_shown(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON]))
    with stage(tmp_path, evolver) as ctx:
        fill(ctx.engine, talk(0), talk(1, session="ses-1", kind=Kind.SIDE))
        scored(ctx, tr_0=-1.0, tr_1=-1.0)
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).where(schema.traces.c.id == "tr-0").values(purpose="held_out"))
        assert once(ctx) == 0
        assert evolver.asked == []


def test_of_agents_that_train_only_a_share_of_the_failed_sessions_is_kept(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([])), max_traces=50) as ctx:
        fill(ctx.engine, *(talk(n, session=f"ses-{n}", turn=0) for n in range(40)))
        scored(ctx, **{f"tr_{n}": -1.0 for n in range(40)})
        with ctx.engine.begin() as c:
            kept = reserve_support(c, Agent("alpha", Mode.RL), ctx.settings.skills.evolution, time.time())
        assert 8 <= len(kept) <= 32
        assert set(purposes(ctx).values()) == {"support", "unsettled"}


def test_a_lesson_becomes_a_skill_of_that_agent_with_its_provenance(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON]))
    with stage(tmp_path, evolver) as ctx:
        put(ctx.settings.skills_path, SHARED, "river-facts", "Use when rivers are asked about.", "Name the source.")
        fill(ctx.engine, talk(0), talk(1, messages=({"role": "user", "content": "no, in kilometres please"},)))
        scored(ctx, tr_0=-0.5)
        assert once(ctx) == 1
        skill = Library(ctx.settings.skills_path).view("alpha").skills["metric-units"]
        assert skill.body == LESSON["body"]
        assert skill.triggers == LESSON["triggers"]
        assert skill.metadata["origin"] == "evolved"
        assert skill.metadata["model"] == "writer"
        assert skill.metadata["traces"] == "tr-0"
        assert generation(ctx) == 1
        with ctx.engine.connect() as c:
            kept = rounds(c, "alpha")
            assert read_counters(c)["skill_edits_accepted"] == {"alpha": 1}
        assert [(record.state, list(record.trace_ids), record.generation) for record in kept] == [
            ("applied", ["tr-0"], 1)
        ]
        for part in ("how long is the river number 0", "about 0 miles", "no, in kilometres please", "river-facts"):
            assert part in evolver.text
        assert once(ctx) == 0, "what was shown is not shown again"


@pytest.mark.law(4)
def test_law_4_the_evolver_of_one_agent_sees_and_changes_nothing_of_another(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON, {"action": "retire", "name": "beta-way"}]))
    with stage(tmp_path, evolver) as ctx:
        put(ctx.settings.skills_path, "beta", "beta-way", "Use when a river is asked about.", "Secret of beta.")
        fill(ctx.engine, talk(0), talk(1, agent="beta", session="ses-b"))
        scored(ctx, tr_0=-0.5, tr_1=0.5)
        assert once(ctx) == 1
        assert "of beta" not in evolver.text
        assert "beta-way" not in evolver.text
        assert set(own_skills(ctx, "beta")) == {"beta-way"}
        assert set(Library(ctx.settings.skills_path).view("beta").skills) == {"beta-way"}
        assert (generation(ctx, "alpha"), generation(ctx, "beta")) == (1, 0)


def test_in_review_nothing_changes_until_the_owner_says_so(tmp_path: Path) -> None:
    with stage(
        tmp_path, Evolver(says([LESSON, LESSON | {"name": "second", "body": "Else."}])), approval="review"
    ) as ctx:
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        assert once(ctx) == 1
        folder = SkillFolder(ctx.settings.skills_path, "alpha")
        waiting = {proposal.change.name: proposal for proposal in folder.proposals()}
        assert set(waiting) == {"metric-units", "second"}
        assert (own_skills(ctx), generation(ctx)) == ({}, 0)
        assert accept_proposal(ctx.engine, folder, waiting["metric-units"]) == 1
        folder.reject(waiting["second"])
        assert (set(own_skills(ctx)), generation(ctx)) == ({"metric-units"}, 1)
        assert folder.proposals() == []


BAD_REPLIES: dict[str, Reply] = {
    "nonsense": says("I would rather talk about the weather."),
    "no list": says('{"edits": "all of them"}'),
    "broken": says('{"edits": [{"action": "add", '),
    "empty": says(""),
    "error": lambda _: httpx.Response(500, text="out of tokens"),
    "no completion": lambda _: httpx.Response(200, json={"ok": True}),
    "no json": lambda _: httpx.Response(200, text="<html>"),
    "huge": says("[" * 300_000),
}


@pytest.mark.parametrize("bad", sorted(BAD_REPLIES))
def test_an_evolver_that_fails_leaves_the_library_as_it_was(tmp_path: Path, bad: str) -> None:
    with stage(tmp_path, Evolver(BAD_REPLIES[bad])) as ctx:
        put(ctx.settings.skills_path, "alpha", "greet", body="As it was.")
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        assert once(ctx) == 1
        assert (own_skills(ctx), generation(ctx)) == ({"greet": "As it was."}, 0)
        with ctx.engine.connect() as c:
            assert [record.state for record in rounds(c)] == ["failed"]
            assert rounds(c)[0].detail["error"]
            assert read_counters(c)["skill_rounds_failed"] == {"alpha": 1}
            assert not is_due(c, "alpha", ctx.settings.skills.evolution, time.time()), "it waits before it asks again"
            assert is_due(c, "alpha", ctx.settings.skills.evolution, time.time() + 61)


async def test_an_evolver_that_never_answers_is_given_up_on(tmp_path: Path) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        return httpx.Response(200)

    with worker_context(evolving(tmp_path, timeout=0.05), httpx.MockTransport(silent)) as ctx:
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        assert await SkillKeeper(ctx).round() == 1
        with ctx.engine.connect() as c:
            assert "did not answer in 0.05 s" in rounds(c)[0].detail["error"]


def test_traces_that_fail_the_evolver_again_and_again_are_given_up(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(BAD_REPLIES["nonsense"])) as ctx:
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        for _ in range(3):
            assert once(ctx) == 1
            with ctx.engine.begin() as c:
                c.execute(sa.update(schema.skill_rounds).values(at=schema.skill_rounds.c.at - 10_000))
        with ctx.engine.connect() as c:
            assert pending(c, "alpha") == []
        assert once(ctx) == 0
        assert purposes(ctx) == {"tr-0": "support"}, "what was shown, even in vain, is never trained on"


def test_five_hundred_proposals_are_cut_to_what_a_round_may_do(tmp_path: Path) -> None:
    words = [f"subject{n} topic{n} matter{n} theme{n}" for n in range(500)]
    many = [
        {"action": "add", "name": f"s-{n}", "description": f"Use when {word}.", "body": f"Do {word}."}
        for n, word in enumerate(words)
    ]
    with stage(tmp_path, Evolver(says(many)), max_edits=3) as ctx:
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        assert once(ctx) == 1
        assert set(own_skills(ctx)) == {"s-0", "s-1", "s-2"}
        assert generation(ctx) == 1


def test_when_the_agent_is_gone_the_files_are_as_they_were(tmp_path: Path) -> None:
    edits = [LESSON, {"action": "improve", "name": "greet", "body": "New."}, {"action": "retire", "name": "old"}]
    evolver = Evolver(says(edits))
    with stage(tmp_path, evolver) as ctx:
        put(ctx.settings.skills_path, "alpha", "greet", body="As it was.")
        put(ctx.settings.skills_path, "alpha", "old", body="Old.")
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)

        def remove_first(request: httpx.Request) -> httpx.Response:
            with ctx.engine.begin() as c:
                remove_agent(c, "alpha")
            return says(edits)(request)

        evolver.reply = remove_first
        with pytest.raises(LookupError):
            once(ctx)
        assert own_skills(ctx) == {"greet": "As it was.", "old": "Old."}


def test_two_workers_ask_once(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON]))
    with (
        stage(tmp_path, evolver) as ctx,
        worker_context(ctx.settings, httpx.MockTransport(evolver), "other:1:1") as two,
    ):
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)

        async def both() -> list[int]:
            return list(await asyncio.gather(SkillKeeper(ctx).round(), SkillKeeper(two).round()))

        assert sum(asyncio.run(both())) == 1
        assert len(evolver.asked) == 1


def test_when_the_evolver_is_asked(tmp_path: Path) -> None:
    wanted = {"min_failures": 3, "every_turns": 5}
    with stage(tmp_path, Evolver(says([])), **wanted) as ctx:
        evolution = ctx.settings.skills.evolution
        fill(ctx.engine, *(talk(n, session=f"ses-{n}", turn=0) for n in range(8)))

        def due() -> bool:
            with ctx.engine.begin() as c:
                reserve_support(c, ALPHA, evolution, time.time())
                return is_due(c, "alpha", evolution, time.time())

        assert not due()
        scored(ctx, tr_0=-0.5, tr_1=0.5)
        assert not due(), "one failure, and the session goes on"
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.sessions).where(schema.sessions.c.id == "ses-0").values(closed_at=5.0))
        assert due(), "its session has ended"
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.sessions).values(closed_at=None))
        assert not due()
        scored(ctx, tr_2=0.5, tr_3=0.5, tr_4=0.5)
        assert due(), "five turns were scored"
        quiet = evolution.model_copy(update={"every_turns": None, "at_session_end": False})
        with ctx.engine.begin() as c:
            assert not is_due(c, "alpha", quiet, time.time())
        scored(ctx, tr_5=0.0, tr_6=-1.0)
        assert due()
        with ctx.engine.begin() as c:
            assert is_due(c, "alpha", quiet, time.time()), "three failures"


def test_without_a_model_nothing_is_kept_and_nobody_is_asked(tmp_path: Path) -> None:
    evolver = Evolver(says([LESSON]))
    with stage(tmp_path, evolver, model=None) as ctx:
        fill(ctx.engine, talk(0))
        scored(ctx, tr_0=-0.5)
        assert once(ctx) == 0
        assert purposes(ctx) == {"tr-0": "unsettled"}


def test_broken_skill_files_are_counted_where_all_can_see_it(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([]))) as ctx:
        broken = put(ctx.settings.skills_path, "alpha", "greet")
        broken.write_text("nothing")
        fill(ctx.engine, talk(0))
        once(ctx)
        with ctx.engine.connect() as c:
            assert read_counters(c)["skill_files_broken"] == {"alpha/greet": 1}


def test_deleting_a_sessions_traces_takes_what_was_kept_of_it_for_skills(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([])), min_failures=5, every_turns=None) as ctx:
        fill(ctx.engine, talk(0), talk(1, session="ses-1"))
        scored(ctx, tr_0=-0.5, tr_1=-0.5)
        with ctx.engine.begin() as c:
            assert len(reserve_support(c, ALPHA, ctx.settings.skills.evolution, time.time())) == 2
            row = {"skill": "s", "agent": "alpha", "version": "v", "shared": False, "withheld": False}
            c.execute(sa.insert(schema.skill_exposures).values(**row, session="ses-0", exchange=0, at=1.0))
        delete_all(ctx.engine, TraceFilter(agent="alpha", session="ses-0"))
        with ctx.engine.connect() as c:
            assert c.execute(sa.select(schema.skill_support.c.session)).scalars().all() == ["ses-1"]
            assert c.execute(sa.select(schema.skill_exposures.c.session)).scalars().all() == []
