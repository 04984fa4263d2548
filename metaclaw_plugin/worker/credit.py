"""From one outcome of a session to rewards of its turns.

``discounted`` (the default): the turn that is k turns before the last gets ``discount ** k`` of the outcome, as the
return of a Markov decision process whose only reward comes at the end. ``undiscounted``: every turn gets all of it.
``per_turn``: nothing is spread; the plugin is asked about each turn instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from metaclaw_hooks.types import Kind, Reward, Session, Trace

from metaclaw_plugin.settings import RewardSettings


def main_turns(session: Session) -> Sequence[Trace]:
    """The session's traces that belong to the conversation, in order."""
    return [trace for trace in session.traces if trace.kind is Kind.MAIN]


def share_of(outcome: Reward, trace: Trace, session: Session, settings: RewardSettings) -> Reward:
    """The part of the session's ``outcome`` that ``trace`` is credited with."""
    back = len({other.turn for other in main_turns(session) if other.turn > trace.turn})
    factor = settings.session_discount**back if settings.session_credit == "discounted" else 1.0
    said = f"session outcome {outcome.value:g}, {back} turns later" if back else "session outcome"
    rationale = f"{said}: {outcome.rationale}" if outcome.rationale else said
    return dataclasses.replace(outcome, value=outcome.value * factor, rationale=rationale)
