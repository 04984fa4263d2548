"""A canary: an accepted version that first answers a share of new sessions, and is judged by what they earn.

Live rewards of both sides since the trial began are compared with Welch's interval (Welch 1947; degrees of freedom by
Satterthwaite). The trial ends when both sides have enough of them, or when its time is over, by the agent's own policy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import sqlalchemy as sa
from metaclaw_hooks.types import Kind

from metaclaw_plugin.settings import PublishSettings
from metaclaw_plugin.store.adapters import RouteRow
from metaclaw_plugin.store.schema import traces
from metaclaw_plugin.worker.verdicts import CONFIDENCE, Decision, Difference, short_of, student_quantile

ENOUGH = 5000  # newest rewards of a side that are looked at


def judge_canary(c: sa.Connection, route: RouteRow, settings: PublishSettings, now: float) -> Decision | None:
    """The verdict on the canary of ``route``, which must have one; None: the trial goes on."""
    canary, since = route.canary, route.canary_since
    if canary is None or since is None:
        return None
    mine, other = (_rewards(c, route.agent, version, since) for version in (canary, route.version))
    over = now >= since + settings.canary_hours * 3600
    if min(len(mine), len(other)) < settings.canary_rewards and not over:
        return None
    figures = {
        "policy": settings.policy,
        "canary": {"share": route.canary_share, "rewards": [len(mine), len(other)], "hours": (now - since) / 3600},
    }
    serving = f"v{route.version}" if route.version else "the base model"
    difference = welch_difference(mine, other)
    if difference is None:
        accepted = settings.policy != "better"
        end = "serving, as nothing speaks against it" if accepted else "rejected: not shown to be better"
        return Decision(accepted, f"v{canary} against {serving}: too few live rewards in the trial, {end}", figures)
    figures |= {"difference": {"mean": difference.mean, "half_width": difference.half_width, "pairs": difference.pairs}}
    head = f"v{canary} against {serving}: {difference.mean:+.2f} ± {difference.half_width:.2f} live"
    reason = short_of(settings.policy, difference)
    if reason is not None:
        return Decision(False, f"{head}, rejected: {reason}", figures)
    return Decision(True, f"{head}, serving", figures)


def welch_difference(mine: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Mean of ``mine`` minus mean of ``other`` with its 95 % interval; None if a side has fewer than two values."""
    if min(len(mine), len(other)) < 2:
        return None
    errors = [statistics.variance(side) / len(side) for side in (mine, other)]
    mean, total = statistics.fmean(mine) - statistics.fmean(other), sum(errors)
    if total == 0:
        return Difference(mean, 0.0, len(mine))
    parts = (error**2 / (len(side) - 1) for error, side in zip(errors, (mine, other), strict=True))
    freedom = max(1, int(total**2 / math.fsum(parts)))
    return Difference(mean, student_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(total), len(mine))


def _rewards(c: sa.Connection, agent: str, version: int, since: float) -> list[float]:
    t = traces.c
    query = (
        sa.select(t.reward)
        .where(t.agent == agent, t.adapter_version == version, t.started_at >= since)
        .where(t.kind == Kind.MAIN.value, t.reward.is_not(None))
        .order_by(t.seq.desc())
        .limit(ENOUGH)
    )
    return [float(reward) for reward in c.scalars(query)]
