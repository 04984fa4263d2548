"""From scored traces to samples: turns whose prompt extends the one before become one sample.

A session of n turns whose every prompt repeats the ones before holds O(n^2) prompt tokens as single samples and O(n) as
one. Only what agrees token id by token id, under one adapter version, is merged; nothing is re-tokenised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from metaclaw_hooks.errors import InvalidSampleError
from metaclaw_hooks.types import Sample, SampleTurn

from metaclaw_plugin.store.forwarding import ScoredTurn


def merge(turns: Sequence[ScoredTurn], max_tokens: int) -> list[list[ScoredTurn]]:
    """Split ``turns`` into runs that are one sample each, in order of their last turn.

    A turn joins the longest run that it extends, unless the sample would pass ``max_tokens``.
    """
    runs: list[list[ScoredTurn]] = []
    for turn in sorted(turns, key=lambda t: (t.session, t.turn, t.seq)):
        open_runs = [run for run in runs if turn.length <= max_tokens and turn.extends(run[-1])]
        if open_runs:
            max(open_runs, key=lambda run: run[-1].length).append(turn)
        else:
            runs.append([turn])
    return sorted(runs, key=lambda run: run[-1].seq)


def sample_id(trace_ids: Sequence[str]) -> str:
    """The idempotency key of the sample of these traces: it depends on nothing else."""
    return "s-" + hashlib.sha256("\n".join(trace_ids).encode()).hexdigest()[:40]


def make_sample(run: Sequence[ScoredTurn]) -> Sample:
    """One sample of a run that ``merge`` made.

    Raises:
        InvalidSampleError: if a turn holds no prompt, no response, or not one log-probability for each token.
    """
    for turn in run:
        if not turn.prompt or len(turn.response) != len(turn.logprobs):
            raise InvalidSampleError(
                f"trace {turn.trace_id}: {len(turn.prompt)} prompt tokens, {len(turn.response)} response tokens and "
                f"{len(turn.logprobs)} log-probabilities make no sample"
            )
    last = run[-1]
    hints = [turn.hint for turn in run if turn.hint]
    return Sample(
        id=sample_id([turn.trace_id for turn in run]),
        agent=last.agent,
        session=last.session,
        token_ids=last.prompt + last.response,
        turns=tuple(SampleTurn(turn.trace_id, len(turn.prompt), turn.logprobs, turn.reward) for turn in run),
        adapter_version=last.adapter_version,
        skill_generation=last.skill_generation,
        hint="\n".join(hints) or None,
    )
