"""Do sampler and trainer give the same tokens the same log-probs? Asked of every sample whose version is at hand.

At the same version they must, up to the rounding of the sampler's type. If they do not, one side has another base
model, type, adapter or chat template, and a gradient from such a sample would point anywhere.
"""

from __future__ import annotations

from metaclaw_hooks.types import Sample
from torch import Tensor

from metaclaw_trainer.batching import Datum


class DisagreementError(Exception):
    """Samples that were scored differently by sampler and trainer; caught where the batch was put together."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(f"{len(reasons)} samples")
        self.reasons = reasons  # sample id -> reason


class Agreement:
    """The distances of one batch, in nats a token."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._sums: dict[str, tuple[float, int]] = {}

    def check(self, sample: Sample, datum: Datum, now_N: Tensor) -> str | None:
        """Why the sample must be set aside; ``None``: it agrees. ``now_N``: the trainer's log-probs at its version."""
        apart_N = (now_N - datum.sampled_N).abs()
        mean = float(apart_N.mean())
        if mean <= self._threshold:
            self._sums[sample.id] = (float(apart_N.sum()), len(apart_N))
            return None
        return (
            f"sampler and trainer disagree by {mean:.2f} nats a token at version {sample.adapter_version} "
            f"(gap_threshold is {self._threshold:g}): another base model, dtype, adapter or chat template on one side?"
        )

    def metrics(self) -> dict[str, float]:
        """``gap`` over all tokens, ``gap_worst`` of a sample; nothing if no sample could be asked about."""
        if not self._sums:
            return {}
        total, tokens = (sum(part) for part in zip(*self._sums.values(), strict=True))
        return {"gap": total / tokens, "gap_worst": max(apart / count for apart, count in self._sums.values())}
