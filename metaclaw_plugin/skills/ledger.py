"""Does a skill help? Sessions that had it against sessions that went without it on purpose.

The unit is a session, since its turns are not independent: its mean reward from the exchange on in which the skill
became relevant. A coin decides who goes without (``injection.is_withheld``), so the difference of the two means is the
skill's effect and not that of the questions that call for it. Intervals are Welch's (1947), with Student's quantile
by the Cornish-Fisher expansion.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import skill_exposures, skill_ledger, traces

Z = 1.96  # normal quantile of a 95 % interval: what is shown
Z_HURTS = 3.29  # of a 99.9 % one: the figures are looked at again and again, and one bad look must not retire a skill
FEWEST = 5  # sessions on each side, below which no interval is given


@dataclass(frozen=True, slots=True)
class Side:
    """Sessions with, or without, a skill."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None

    @property
    def variance(self) -> float:
        """Of the mean; n must be 2 or more."""
        return max(self.squares - self.total**2 / self.n, 0.0) / (self.n - 1) / self.n

    def plus(self, value: float) -> Side:
        return Side(self.n + 1, self.total + value, self.squares + value * value)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known of one skill of one agent."""

    agent: str
    skill: str
    uses: int  # sessions that it was injected in
    with_: Side
    without: Side

    @property
    def uplift(self) -> float | None:
        """Mean reward with it, less that without it."""
        if self.with_.mean is None or self.without.mean is None:
            return None
        return self.with_.mean - self.without.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """The uplift's 95 % confidence interval; ``None`` with too few sessions on either side."""
        return self._interval(Z)

    @property
    def hurts(self) -> bool:
        """Whether even the 99.9 % interval lies below zero."""
        interval = self._interval(Z_HURTS)
        return interval is not None and interval[1] < 0

    def _interval(self, z: float) -> tuple[float, float] | None:
        if self.uplift is None or min(self.with_.n, self.without.n) < FEWEST:
            return None
        a, b = self.with_.variance, self.without.variance
        if a + b == 0:
            return self.uplift, self.uplift
        freedom = (a + b) ** 2 / (a**2 / (self.with_.n - 1) + b**2 / (self.without.n - 1))
        half = _student(z, freedom) * math.sqrt(a + b)
        return self.uplift - half, self.uplift + half

    @property
    def summary(self) -> str:
        """In words, for people and for the evolver."""
        if self.uplift is None:
            return f"{self.uses} sessions, effect unknown"
        if self.interval is None:
            return f"{self.uses} sessions, uplift {self.uplift:+.2f}, too few to tell"
        return f"{self.uses} sessions, uplift {self.uplift:+.2f} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"


def _student(z: float, freedom: float) -> float:
    """Student's quantile where the normal one is ``z`` (Cornish-Fisher, two terms)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def refresh_ledger(c: Connection, agent: str) -> list[LedgerEntry]:
    """Count anew for ``agent``, from what its sessions were rewarded with; late feedback is in it, too."""
    e, t = skill_exposures.c, traces.c
    query = (
        sa.select(e.skill, e.session, e.withheld, sa.func.avg(t.reward).label("reward"))
        .outerjoin(
            traces,
            sa.and_(t.session == e.session, t.kind == "main", t.exchange >= e.exchange, t.reward.is_not(None)),
        )
        .where(e.agent == agent)
        .group_by(e.skill, e.session, e.withheld)
    )
    uses: dict[str, int] = defaultdict(int)
    sides: dict[tuple[str, bool], Side] = defaultdict(Side)
    for row in c.execute(query):
        uses[row.skill] += not row.withheld
        if row.reward is not None:
            key = (row.skill, bool(row.withheld))
            sides[key] = sides[key].plus(float(row.reward))
    entries = [
        LedgerEntry(agent, skill, n, sides[skill, False], sides[skill, True]) for skill, n in sorted(uses.items())
    ]
    for entry in entries:
        _write(c, entry)
    return entries


def read_ledger(c: Connection, agent: str) -> dict[str, LedgerEntry]:
    """The figures of the last count, by skill."""
    t = skill_ledger.c
    return {
        row.skill: LedgerEntry(
            agent,
            row.skill,
            row.uses,
            Side(row.n_with, row.sum_with, row.sumsq_with),
            Side(row.n_without, row.sum_without, row.sumsq_without),
        )
        for row in c.execute(sa.select(skill_ledger).where(t.agent == agent))
    }


def _write(c: Connection, entry: LedgerEntry) -> None:
    values = {
        "uses": entry.uses,
        "n_with": entry.with_.n,
        "sum_with": entry.with_.total,
        "sumsq_with": entry.with_.squares,
        "n_without": entry.without.n,
        "sum_without": entry.without.total,
        "sumsq_without": entry.without.squares,
    }
    statement = dialect_insert(c, skill_ledger).values(agent=entry.agent, skill=entry.skill, **values)
    c.execute(statement.on_conflict_do_update(index_elements=["agent", "skill"], set_=values))
