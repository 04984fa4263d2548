"""Modes and windows, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from metaclaw_hooks.types import Mode
from metaclaw_hooks.wire import AgentStatus, AgentTraining
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import Settings, WindowSettings
from metaclaw_plugin.store.agents import add_agent, remove_agent, set_mode, set_settings
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.modes import modes_round, training_permissions
from metaclaw_plugin.worker.windows import Activity, window_now

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> float:
    """Berlin time as Unix seconds."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


@pytest.mark.parametrize(
    ("time", "is_open"),
    [
        ("2026-11-22T22:59:59", False),
        ("2026-11-22T23:00:00", True),
        ("2026-11-23T00:00:00", True),
        ("2026-11-23T06:59:59", True),
        ("2026-11-23T07:00:00", False),
        ("2026-07-01T23:30:00", True),  # summer time: another distance to UTC
        ("2026-07-01T22:30:00", False),
    ],
)
def test_sleep_hours_reach_across_midnight_in_their_own_time_zone(time: str, is_open: bool) -> None:
    settings = WindowSettings(hours=["23:00-07:00"], time_zone="Europe/Berlin")
    assert window_now(settings, at(time), Activity(None, None)).open is is_open


def test_any_of_several_windows_opens() -> None:
    settings = WindowSettings(hours=["12:00-13:00", "23:00-07:00"], time_zone="Europe/Berlin", idle_after=600)
    noon, evening = at("2026-11-22T12:30:00"), at("2026-11-22T20:00:00")
    assert window_now(settings, noon, Activity(noon, noon)).reason == "sleep hours 12:00-13:00"
    assert not window_now(settings, evening, Activity(evening - 599, evening)).open
    assert window_now(settings, evening, Activity(evening - 600, evening)).reason == "idle for 600 s"


def test_idle_may_mean_all_traffic() -> None:
    settings = WindowSettings(idle_after=60, idle_scope="all")
    assert not window_now(settings, 1000.0, Activity(None, 950.0)).open
    assert window_now(settings, 1000.0, Activity(999.0, 900.0)).open


@pytest.mark.parametrize("hours", ["7-9", "24:00-07:00", "23:00", "23:00-23:00", "23:00 - 07:00"])
def test_hours_that_are_none_are_refused_with_an_example(hours: str) -> None:
    with pytest.raises(ConfigError, match=r"HH:MM-HH:MM|the same"):
        window_now(WindowSettings(hours=[hours], time_zone="UTC"), 0.0, Activity(None, None))


def test_a_zone_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="Europe/Atlantis"):
        window_now(WindowSettings(hours=["01:00-02:00"], time_zone="Europe/Atlantis"), 0.0, Activity(None, None))


@dataclass
class Told:
    """A trainer that remembers what it is told."""

    allowed: dict[str, bool] = field(default_factory=dict)
    calls: int = 0

    async def agents(self) -> list[AgentStatus]:
        return [
            AgentStatus(
                agent=name,
                allowed=allowed,
                queued=0,
                batch_size=8,
                set_aside=0,
                trained=0,
                step=0,
                head=0,
                newest=0,
                training=False,
                idle_reason=None,
                metrics={},
            )
            for name, allowed in self.allowed.items()
        ]

    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus:
        self.calls += 1
        self.allowed[agent] = bool(training.allowed)
        return next(status for status in await self.agents() if status.agent == agent)


@dataclass
class Context:
    settings: Settings
    engine: Engine
    trainer: Told


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    return Context(Settings(home=tmp_path, mode=Mode.RL), engine, Told())


async def test_the_trainer_is_told_what_differs_and_nothing_else(ctx: Context) -> None:
    with ctx.engine.begin() as c:
        add_agent(c, "ada")
        add_agent(c, "bob", Mode.SKILLS_ONLY)
    assert await modes_round(ctx) == 2
    assert ctx.trainer.allowed == {"ada": True, "bob": False}
    assert await modes_round(ctx) == 0
    with ctx.engine.begin() as c:
        set_mode(c, "ada", Mode.OFF)
        set_mode(c, "bob", None)
    await modes_round(ctx)
    assert ctx.trainer.allowed == {"ada": False, "bob": True}


async def test_a_trainer_that_forgot_is_told_again_and_a_removed_agent_is_stopped(ctx: Context) -> None:
    with ctx.engine.begin() as c:
        add_agent(c, "ada")
    await modes_round(ctx)
    ctx.trainer.allowed.clear()
    await modes_round(ctx)
    assert ctx.trainer.allowed == {"ada": True}
    with ctx.engine.begin() as c:
        remove_agent(c, "ada")
    await modes_round(ctx)
    assert ctx.trainer.allowed == {"ada": False}


def test_an_agents_own_windows_stand_before_the_global_ones_and_bad_ones_keep_it_held(ctx: Context) -> None:
    with ctx.engine.begin() as c:
        for name in ("ada", "bob", "eve"):
            add_agent(c, name, Mode.AUTO)
        set_settings(c, "bob", {"windows": {"hours": ["12:00-13:00"], "time_zone": "Europe/Berlin"}})
        set_settings(c, "eve", {"windows": {"hour": ["12:00-13:00"]}})
    found = training_permissions(ctx.settings, ctx.engine, at("2026-11-22T12:30:00"))
    assert not found["ada"].open
    assert "no window is configured" in found["ada"].reason
    assert found["bob"].open
    assert not found["eve"].open
    assert "hour" in found["eve"].reason
