"""The ledger: an effect that is there is found, one that is not is not, and what hurts is taken out."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.ledger import LedgerEntry, Side, read_ledger, refresh_ledger
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.skill_file import render_skill, write_atomic
from metaclaw_plugin.skills.upkeep import SkillKeeper
from metaclaw_plugin.store import schema
from metaclaw_plugin.worker.context import WorkerContext
from tests.skill_cases import Evolver, generation, put, says, stage, talk
from tests.worker_stage import fill


def expose(engine: Engine, skill: str, with_: list[float], without: list[float], agent: str = "alpha") -> None:
    """Sessions of two turns each, with and without ``skill``; the second turn's rewards are as given."""
    number = 0
    for withheld, rewards in ((False, with_), (True, without)):
        for reward in rewards:
            session = f"{skill}-{number}"
            traces = [talk(0, agent, session, id=f"{session}-0"), talk(1, agent, session, id=f"{session}-1")]
            fill(engine, *traces)
            with engine.begin() as c:
                for trace, value in zip(traces, (-1.0, reward), strict=True):
                    t = schema.traces
                    c.execute(
                        sa.update(t).where(t.c.id == trace.id).values(score="scored", reward=value, scored_at=1.0)
                    )
                row = {"session": session, "skill": skill, "agent": agent, "version": "v", "shared": False}
                c.execute(sa.insert(schema.skill_exposures).values(**row, withheld=withheld, exchange=1, at=1.0))
            number += 1


def test_the_uplift_and_its_interval_are_those_of_the_sessions(store: Engine) -> None:
    expose(store, "a", [0.5, 0.7, 0.9, 0.5, 0.7, 0.9], [0.1, 0.3, 0.5, 0.1, 0.3, 0.5])
    with store.begin() as c:
        entry = refresh_ledger(c, "alpha")[0]
        assert read_ledger(c, "alpha") == {"a": entry}
    assert (entry.uses, entry.with_.n, entry.without.n) == (6, 6, 6)
    assert entry.with_.mean == pytest.approx(0.7), "rewards from before the skill was relevant do not count"
    assert entry.uplift == pytest.approx(0.4)
    half = 2.228 * (2 * (0.032 / 6)) ** 0.5  # Student, 10 degrees of freedom; each side's variance is 0.032
    assert entry.interval == (pytest.approx(0.4 - half, abs=1e-3), pytest.approx(0.4 + half, abs=1e-3))
    assert not entry.hurts
    assert entry.summary == f"6 sessions, uplift +0.40 [{0.4 - half:+.2f}, {0.4 + half:+.2f}]"


def test_too_few_sessions_give_no_interval_and_late_feedback_counts(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([]))) as ctx:
        expose(ctx.engine, "a", [0.5], [])
        expose(ctx.engine, "b", [1.0, 1.0], [0.0, 0.0])
        with ctx.engine.begin() as c:
            entries = {entry.skill: entry for entry in refresh_ledger(c, "alpha")}
            assert (entries["a"].uplift, entries["a"].interval, entries["a"].hurts) == (None, None, False)
            assert entries["b"].summary == "2 sessions, uplift +1.00, too few to tell"
            c.execute(sa.update(schema.traces).where(schema.traces.c.id == "a-0-1").values(reward=-1.0))
            assert refresh_ledger(c, "alpha")[0].with_.mean == pytest.approx(-1.0)


def side(rewards: list[float]) -> Side:
    made = Side()
    for reward in rewards:
        made = made.plus(reward)
    return made


def entries(effect: float, sessions: int, number: int = 1000) -> list[LedgerEntry]:
    """Skills with a true ``effect`` on rewards drawn from [-1, 1]."""
    chance = random.Random(7)

    def draw(shift: float) -> Side:
        return side([chance.uniform(-1, 1) + shift for _ in range(sessions)])

    return [LedgerEntry("alpha", "s", sessions, draw(effect), draw(0.0)) for _ in range(number)]


@pytest.mark.parametrize("sessions", [5, 10, 50])
def test_the_interval_covers_the_truth_as_often_as_it_says(sessions: int) -> None:
    intervals = [entry.interval for entry in entries(0.3, sessions)]
    covered = sum(interval is not None and interval[0] <= 0.3 <= interval[1] for interval in intervals)
    assert 930 <= covered <= 975


def test_a_skill_without_effect_is_hardly_ever_called_hurtful_and_a_bad_one_is() -> None:
    assert sum(entry.hurts for entry in entries(0.0, 10)) <= 3
    assert sum(entry.hurts for entry in entries(-0.8, 30)) >= 900


def hurting(ctx: WorkerContext) -> None:
    """Three skills that hurt: an evolved one, one that a person wrote, and a shared one."""
    root = ctx.settings.skills_path
    evolved = render_skill("evolved", "Use when x.", "Do x.", metadata={"origin": "evolved"})
    write_atomic(root / "alpha" / "evolved" / "SKILL.md", evolved)
    put(root, "alpha", "by-hand")
    put(root, "_shared", "shared")
    for name in ("evolved", "by-hand", "shared"):
        expose(ctx.engine, name, [-0.9, -1.0] * 4, [0.9, 1.0] * 4)


def test_an_evolved_skill_that_hurts_is_retired_and_a_persons_is_only_proposed_for_it(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([])), retire_uses=8, model=None) as ctx:
        hurting(ctx)
        asyncio.run(SkillKeeper(ctx).round())
        library = Library(ctx.settings.skills_path)
        assert set(library.view("alpha").skills) == {"by-hand", "shared"}
        assert generation(ctx) == 1
        folder = SkillFolder(ctx.settings.skills_path, "alpha")
        waiting = folder.proposals()
        assert [(p.change.action, p.change.name) for p in waiting] == [("retire", "by-hand")]
        assert "uplift -1.90" in waiting[0].change.reason
        folder.reject(waiting[0])
        asyncio.run(SkillKeeper(ctx).round())
        assert folder.proposals() == [], "what the owner turned down is not proposed again"


def test_in_review_nothing_is_retired_without_the_owner(tmp_path: Path) -> None:
    with stage(tmp_path, Evolver(says([])), retire_uses=8, approval="review") as ctx:
        hurting(ctx)
        asyncio.run(SkillKeeper(ctx).round())
        assert len(Library(ctx.settings.skills_path).view("alpha").skills) == 3
        proposals = SkillFolder(ctx.settings.skills_path, "alpha").proposals()
        assert {p.change.name for p in proposals} == {"evolved", "by-hand"}
