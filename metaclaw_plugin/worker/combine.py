"""From opinions to one reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metaclaw_hooks.rewards.feedback import SOURCE as FEEDBACK
from metaclaw_hooks.types import Reward

from metaclaw_plugin.settings import RewardSettings


def combine(opinions: Sequence[Reward], weight: Callable[[str], float]) -> float | None:
    """The mean of ``opinions``, weighed by ``weight(source)`` times confidence; in [-1, 1].

    Explicit feedback wins over everything that was inferred. ``None`` when nobody has an opinion that weighs anything:
    no opinion is not a reward of 0.
    """
    for reward in opinions:
        if reward.source == FEEDBACK:
            return reward.value
    shares = [(weight(reward.source) * reward.confidence, reward.value) for reward in opinions]
    total = sum(share for share, _ in shares)
    if total <= 0.0:
        return None
    mean = sum(share * value for share, value in shares) / total
    return min(1.0, max(-1.0, mean))


def weights_for(settings: RewardSettings, agent: str, standard: float = 1.0) -> Callable[[str], float]:
    """How much each reward plugin weighs for ``agent``: its own setting, else the general one, else ``standard``."""
    own = settings.per_agent.get(agent, {})
    return lambda source: own.get(source, settings.weights.get(source, standard))


def best_hint(opinions: Sequence[Reward]) -> str | None:
    """The hint of whoever is surest of itself; ``None`` if nobody gave one."""
    with_hint = [reward for reward in opinions if reward.hint]
    return max(with_hint, key=lambda reward: reward.confidence).hint if with_hint else None
