"""What ``metaclaw top`` shows besides the status: traffic and rewards of the last while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.status.store_reader import Query, query_store

NEWEST = 160  # scored replies of an agent that the curve is made of
STEPS = 20  # characters of the curve
BARS = "▁▂▃▄▅▆▇█"

_AGENTS = "SELECT name FROM agents ORDER BY name"
_REWARDS = (
    "SELECT reward FROM (SELECT seq, reward FROM traces WHERE agent = :agent ORDER BY seq DESC LIMIT :limit) newest "
    "WHERE reward IS NOT NULL ORDER BY seq"
)
_LAST_MINUTE = (
    "SELECT COUNT(*) FROM (SELECT finished_at FROM traces WHERE agent = :agent ORDER BY seq DESC LIMIT 2000) newest "
    "WHERE finished_at > :since"
)


@dataclass(frozen=True)
class Activity:
    """One agent of late; ``rewards`` oldest first."""

    last_minute: int
    rewards: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean of the newest twenty rewards."""
        newest = self.rewards[-20:]
        return sum(newest) / len(newest) if newest else None


def read_activity(url: str, now: float) -> dict[str, Activity]:
    """By agent; empty if there is no store, or it cannot be read (the status says why)."""
    try:
        return query_store(url, lambda query: _activity(query, now)) or {}
    except StoreError:
        return {}


def _activity(query: Query, now: float) -> dict[str, Activity]:
    found = {}
    for (name,) in query(_AGENTS):
        rewards = tuple(float(reward) for (reward,) in query(_REWARDS, agent=name, limit=NEWEST))
        ((count,),) = query(_LAST_MINUTE, agent=name, since=now - 60.0)
        found[name] = Activity(int(count), rewards)
    return found


def sparkline(rewards: Sequence[float], steps: int = STEPS) -> str:
    """Means of equal slices of ``rewards``, each in [-1, 1], as bars."""
    steps = min(steps, len(rewards))
    bars = []
    for step in range(steps):
        part = rewards[step * len(rewards) // steps : (step + 1) * len(rewards) // steps]
        mean = sum(part) / len(part)
        bars.append(BARS[min(len(BARS) - 1, int((mean + 1) / 2 * len(BARS)))])
    return "".join(bars)
