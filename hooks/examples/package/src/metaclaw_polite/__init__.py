"""Polite replies, but not too polite: one courtesy is right, none is curt, three are too many."""

from __future__ import annotations

import re

from metaclaw_hooks import Reward, Trace, hookimpl

COURTESY = re.compile(r"\b(?:please|thank you|thanks|you're welcome|happy to|glad to|sorry)\b", re.IGNORECASE)


class Polite:
    """Loaded by its entry point, without arguments."""

    SCORES_LONE_REPLY = True  # needs nothing of what followed, so the gate may use it on replays

    @hookimpl
    def score_trace(self, trace: Trace) -> Reward | None:
        if not trace.response_text:
            return None
        count = len(COURTESY.findall(trace.response_text))
        value = {0: -0.5, 1: 1.0, 2: 0.5}.get(count, -1.0)
        return Reward("polite", value, f"{count} courtesies", confidence=0.5)
