"""What someone said explicitly about an answer: a number, perhaps with a comment."""

from __future__ import annotations

from metaclaw_hooks.types import Reward

SOURCE = "feedback"


def feedback_reward(value: float, comment: str) -> Reward:
    """The reward of one piece of feedback; it wins over all that was inferred.

    Raises:
        InvalidRewardError: if the value is not in [-1, 1].
    """
    return Reward(SOURCE, value, comment, confidence=1.0)
