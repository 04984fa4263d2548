"""What the pages say about an agent, from a bounded number of the store's rows."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Connection

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.status.collect import Running
from metaclaw_plugin.status.store_reader import StoredAgent
from metaclaw_plugin.status.why import why_not_training
from metaclaw_plugin.store.adapters import RouteRow, get_route
from metaclaw_plugin.store.agents import AgentRecord
from metaclaw_plugin.store.facts import get_fact
from metaclaw_plugin.store.recent import (
    CAP,
    NEWEST,
    Decided,
    Newest,
    count_traces,
    count_unforwarded,
    newest_decision,
    newest_traces,
)
from metaclaw_plugin.worker.modes import WINDOWS_FACT

HOUR = 3600.0
FEW = 20  # rewards whose mean is "of late"
Z = 1.96  # normal quantile of a 95 % interval
SPARK_WIDTH, SPARK_HEIGHT, SPARK_STEPS = 120.0, 28.0, 24


@dataclass(frozen=True, slots=True)
class AgentFigures:
    """One row of the overview. Counts are up to ``CAP``; those of waiting rewards are among the newest ``NEWEST``."""

    name: str
    mode: str
    own_mode: bool  # rather than the global one
    version: int
    canary: int | None
    decision: str  # in one sentence
    traces: str
    per_hour: str
    last_at: float | None
    reward: float | None  # mean of the newest rewards
    half: float | None  # half of its 95 % interval
    spark: str  # points of a polyline
    unscored: str
    unforwarded: str
    queued: str
    why: str


def mean_and_half(rewards: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95 % interval (None below five values)."""
    if not rewards:
        return None, None
    mean = math.fsum(rewards) / len(rewards)
    if len(rewards) < 5:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in rewards) / (len(rewards) - 1)
    return mean, Z * math.sqrt(variance / len(rewards))


def capped(number: int, cap: int = CAP) -> str:
    return f"{number:,}" if number < cap else f"{cap:,}+"


def traffic(newest: Sequence[Newest], now: float) -> str:
    """Requests in the last hour; when all that were looked at are of that hour, what their pace comes to."""
    of_late = sum(now - trace.finished_at <= HOUR for trace in newest)
    if of_late < NEWEST:
        return str(of_late)
    span = max(now - newest[-1].finished_at, 1.0)
    return f"about {of_late / span * HOUR:,.0f}"


def spark_points(rewards: Sequence[float]) -> str:
    """Means of equal slices of ``rewards`` (oldest first, each in [-1, 1]) as points of an SVG polyline."""
    steps = min(SPARK_STEPS, len(rewards))
    if steps < 2:
        return ""
    points = []
    for step in range(steps):
        part = rewards[step * len(rewards) // steps : (step + 1) * len(rewards) // steps]
        mean = sum(part) / len(part)
        x = step / (steps - 1) * SPARK_WIDTH
        points.append(f"{x:.1f},{(1 - mean) / 2 * (SPARK_HEIGHT - 4) + 2:.1f}")
    return " ".join(points)


def last_decision(decided: Decided | None, route: RouteRow) -> str:
    """The newest decision about a version, in one sentence."""
    if decided is None:
        return "the base model serves; no version was decided about yet"
    sentence = str(decided.decision.get("sentence") or f"v{decided.number}: decided without a word")
    if decided.number != route.version:
        return sentence
    when = time.strftime("%H:%M", time.gmtime(decided.at))
    rest = sentence.removeprefix(f"v{decided.number}:").strip().removesuffix(", serving")
    return f"v{decided.number} serves since {when} UTC: {rest}"


def worker_of(c: Connection) -> tuple[str, float] | None:
    """Who was last at work, and when; the worker tells every few seconds."""
    told = get_fact(c, "worker_heartbeat")
    return (str(told.get("owner", "")), float(told.get("at", 0.0))) if isinstance(told, dict) else None


def agent_figures(c: Connection, record: AgentRecord, settings: Settings, running: Running, now: float) -> AgentFigures:
    """The agent's row of the overview."""
    newest = newest_traces(c, record.name)
    route = get_route(c, record.name)
    rewards = [trace.reward for trace in reversed(newest) if trace.reward is not None and trace.kind == "main"]
    mean, half = mean_and_half(rewards[-FEW:])
    total = len(newest) if len(newest) < NEWEST else count_traces(c, record.name)
    mode = record.effective_mode(settings.mode)
    learns = mode in (Mode.RL, Mode.AUTO)
    unscored = sum(trace.score == "waiting" and trace.kind == "main" for trace in newest)
    unforwarded = count_unforwarded(c, record.name) if learns else 0
    stored = _stored(c, record, route, newest, total, unscored, unforwarded)
    there = running.trainer.agents.get(record.name)
    queued = f"{there['queued']} of {there.get('batch_size', '?')}" if there and "queued" in there else "-"
    return AgentFigures(
        name=record.name,
        mode=mode.value,
        own_mode=record.mode is not None,
        version=route.version,
        canary=route.canary,
        decision=last_decision(newest_decision(c, record.name), route),
        traces=capped(total),
        per_hour=traffic(newest, now),
        last_at=newest[0].finished_at if newest else None,
        reward=mean,
        half=half,
        spark=spark_points(rewards),
        unscored=capped(unscored, NEWEST),
        unforwarded=capped(unforwarded) if learns else "-",
        queued=queued if learns else "-",
        why=why_not_training(stored, mode.value, settings.rl.enabled, running.trainer, running.worker_problem),
    )


def _stored(
    c: Connection,
    record: AgentRecord,
    route: RouteRow,
    newest: Sequence[Newest],
    total: int,
    unscored: int,
    unforwarded: int,
) -> StoredAgent:
    """The agent as ``status.why`` wants it, by its newest traces."""
    reasons = Counter(trace.reason or "no reason given" for trace in newest if not trace.trainable)
    skipped = sum(trace.forward == "skipped" for trace in newest)
    window = get_fact(c, WINDOWS_FACT, {}).get(record.name, {})
    return StoredAgent(
        name=record.name,
        mode=None if record.mode is None else record.mode.value,
        version=route.version,
        candidates=0,
        traces=min(total, len(newest)),
        unscored=unscored,
        without_reward=sum(trace.score == "unscored" for trace in newest),
        unforwarded=unforwarded,
        forwarded=sum(trace.forward == "forwarded" for trace in newest),
        trained=sum(trace.forward == "trained" for trace in newest),
        skipped=skipped,
        newest=len(newest),
        trainable=sum(trace.trainable for trace in newest),
        reasons=tuple(reasons.most_common(3)),
        shut=None if window.get("open", True) else str(window.get("reason")),
    )
