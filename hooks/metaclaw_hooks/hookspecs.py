"""The seam, on one page. Project name ``metaclaw``; entry-point group ``metaclaw``.

A hook may be ``def`` or ``async def``. It may name only the arguments that it needs. One that raises or times out is
isolated, logged under its plugin's name, counted, and treated as ``None``: no opinion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from metaclaw_hooks.types import AdapterVersion, Agent, Reward, Sample, Session, SkillRef, Trace

PROJECT = "metaclaw"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# In the gateway, on the request path: be quick.
@hookspec(firstresult=True)
def select_skills(agent: Agent, messages: Sequence[Mapping[str, Any]], library: Any) -> Sequence[SkillRef] | None:
    """Choose the skills to inject; the first list wins, ``None`` leaves it to the built-in retrieval."""


@hookspec(firstresult=True)
def redact_trace(trace: Trace) -> Trace | None:
    """Return a trace to store in the place of this one (it becomes not trainable), or ``None`` to keep it."""


# In the worker.
@hookspec
def score_trace(trace: Trace, next_trace: Trace | None, session: Session) -> float | Reward | None:
    """Reward one trace, in [-1, 1]; ``next_trace`` holds what the user did next, if anything yet."""


@hookspec(firstresult=True)
def combine_rewards(trace: Trace, rewards: Sequence[Reward]) -> float | None:
    """Turn all opinions about a trace into one reward; ``None`` leaves it to the weighted mean."""


@hookspec
def accept_adapter(candidate: AdapterVersion, evaluation: Mapping[str, Any]) -> bool | None:
    """``False`` vetoes a candidate version before it serves."""


@hookspec
def adapter_published(version: AdapterVersion) -> None:
    """A version has begun to serve."""


@hookspec
def training_window(agent: Agent, now: float) -> bool | None:
    """Open (``True``) or keep shut (``False``) the training window of an agent in mode auto; ``now``: Unix seconds."""


# In the trainer.
@hookspec
def accept_sample(sample: Sample) -> bool | None:
    """``False`` sets a sample aside before it is queued."""


@hookspec(firstresult=True)
def compute_advantages(batch: Sequence[Sample]) -> Sequence[Sequence[float]] | None:
    """One advantage for each turn of each sample, in order; ``None`` leaves it to the configured estimator."""


@hookspec
def register_losses() -> Mapping[str, Any] | None:
    """Contribute loss functions by name, each with the signature of ``metaclaw_trainer.losses``."""


@hookspec
def after_step(agent: str, metrics: Mapping[str, float]) -> None:
    """An optimiser step of ``agent`` has ended, with these metrics."""
