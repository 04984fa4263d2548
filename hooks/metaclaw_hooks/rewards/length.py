"""A budget for the length of answers."""

from __future__ import annotations

from metaclaw_hooks.hookspecs import hookimpl
from metaclaw_hooks.types import Reward, Trace

SOURCE = "length"


class LengthReward:
    """1 up to ``max_tokens`` sampled tokens, then falling in a straight line to -1 at twice as many.

    No opinion where the upstream gave no token ids: words are no tokens.
    """

    SCORES_LONE_REPLY = True
    INLINE = True

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"a length budget of {max_tokens} tokens leaves no room for an answer")
        self._budget = max_tokens

    @hookimpl
    def score_trace(self, trace: Trace) -> Reward | None:
        if trace.response_token_ids is None:
            return None
        length = len(trace.response_token_ids)
        over = max(0, length - self._budget) / self._budget
        return Reward(SOURCE, max(-1.0, 1.0 - 2.0 * over), f"{length} of {self._budget} tokens")
