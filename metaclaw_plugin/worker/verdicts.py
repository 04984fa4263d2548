"""From figures to a verdict on a candidate. Pure: no I/O, no clock.

The order: sanity first (a reward earned by babbling must not pass), then the policy on the replayed rewards.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from metaclaw_plugin.settings import PublishSettings

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a candidate may serve, in a sentence and in figures."""

    accepted: bool
    sentence: str
    figures: Mapping[str, Any]

    def stored(self) -> dict[str, Any]:
        """As the store keeps it."""
        return {"accepted": self.accepted, "sentence": self.sentence, **self.figures}


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences, candidate minus serving, with its 95 % confidence interval ``mean ± half_width``."""

    mean: float
    half_width: float  # infinite for a single pair
    pairs: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured. ``None``: it could not be."""

    against: int  # the serving version; 0: the base model
    difference: Difference | None  # of replayed rewards
    judged_by: tuple[str, ...]  # reward plugins that can score a lone reply
    replies: int  # per side
    kl: float | None  # nats per token, candidate to base, on the candidate's own replies
    distinct: tuple[float, float] | None  # distinct-2 of candidate and serving version
    sanity: tuple[float, float] | None  # mean log-probability per token of the fixed set: candidate and base
    held_out: int = 0  # prompts that were to be replayed
    damaged: int = 0  # held-out traces that the store cannot give back
    refused: int = 0  # of ``held_out``, that vLLM refuses the serving version too
    unanswered: int = 0  # prompts that vLLM answers as the serving version and refuses as the candidate

    @property
    def mute(self) -> bool:
        """Whether vLLM refuses the candidate most of what it answers as the serving version."""
        return self.unanswered > self.replies

    def figures(self) -> dict[str, Any]:
        """JSON."""
        found = asdict(self)
        if self.difference is not None and not math.isfinite(self.difference.half_width):
            found["difference"]["half_width"] = None
        return found


def paired_difference(candidate: Sequence[float], serving: Sequence[float]) -> Difference | None:
    """Student's interval for the mean of ``candidate[i] - serving[i]``; None without a pair.

    Raises:
        ValueError: if the lengths differ.
    """
    differences = [c - s for c, s in zip(candidate, serving, strict=True)]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Difference(mean, math.inf, 1)
    error = statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, student_quantile((1 + CONFIDENCE) / 2, n - 1) * error, n)


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t (Abramowitz and Stegun 26.7.5; exact for one and two degrees of freedom)."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(freedom) ** (k + 1) for k, term in enumerate(terms))


def distinct_2(texts: Sequence[str]) -> float | None:
    """Different word pairs over all word pairs of ``texts`` (Li et al., arXiv:1510.03055); None without any."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else None


def decide(number: int, evaluation: Evaluation, settings: PublishSettings) -> Decision:
    """The verdict on version ``number``."""
    figures = {"policy": settings.policy, **evaluation.figures()}
    against = f"v{evaluation.against}" if evaluation.against else "the base model"
    head, reason = _describe(number, against, evaluation), _insane(evaluation, settings)
    if reason is None and evaluation.difference is not None:
        reason = short_of(settings.policy, evaluation.difference)
    if reason is not None:
        return Decision(False, f"{head}, rejected: {reason}", figures)
    return Decision(True, f"{head}, serving", figures)


def _describe(number: int, against: str, evaluation: Evaluation) -> str:
    difference = evaluation.difference
    if difference is not None:
        width = (
            f"± {difference.half_width:.2f}" if math.isfinite(difference.half_width) else "(one prompt, no interval)"
        )
        return f"v{number} against {against}: {difference.mean:+.2f} {width} on {difference.pairs} prompts"
    return f"v{number} against {against}: {_not_compared(evaluation)}, so sanity alone decided"


def _not_compared(evaluation: Evaluation) -> str:
    """Why there is no difference of replayed rewards."""
    held_out, refused = evaluation.held_out, evaluation.refused
    if not evaluation.judged_by:
        return "no reward can score a lone reply"
    if not held_out:
        return "every held-out trace is damaged" if evaluation.damaged else "no held-out prompt to replay yet"
    if refused * 2 > held_out:
        return f"vLLM refused {refused} of {held_out} held-out prompts (longer than its context?)"
    return "no held-out prompt got a reward on both sides"


def _insane(evaluation: Evaluation, settings: PublishSettings) -> str | None:
    if evaluation.mute:
        return f"vLLM refused it {evaluation.unanswered} prompts that it answered as the serving version"
    if evaluation.kl is not None and evaluation.kl > settings.max_kl:
        return f"it is {evaluation.kl:.2f} nats per token away from the base model (at most {settings.max_kl:g})"
    if evaluation.distinct is not None:
        mine, other = evaluation.distinct
        if mine < settings.min_distinct * other:
            return f"it repeats itself (distinct-2 {mine:.2f}, the serving version {other:.2f})"
    if evaluation.sanity is not None:
        mine, base = evaluation.sanity
        if mine < base - settings.max_sanity_drop:
            return f"plain answers have become unlikely ({mine:.2f} nats per token, the base model {base:.2f})"
    return None


def short_of(policy: Literal["always", "not_worse", "better"], difference: Difference) -> str | None:
    """What the difference lacks for ``policy``; None: nothing."""
    if policy == "not_worse" and difference.mean + difference.half_width < 0:
        return "worse"
    if policy == "better" and not difference.mean - difference.half_width > 0:
        return "not shown to be better"
    return None
