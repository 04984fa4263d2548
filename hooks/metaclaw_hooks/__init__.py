"""The contract between gateway, worker, trainer and plugins: nouns, wire bodies, hooks. No torch, no LiteLLM."""

from metaclaw_hooks.errors import HooksError
from metaclaw_hooks.hookspecs import hookimpl, hookspec
from metaclaw_hooks.types import (
    AdapterVersion,
    Agent,
    Kind,
    Mode,
    Purpose,
    Reward,
    Sample,
    SampleTurn,
    Sampling,
    Session,
    SkillRef,
    Trace,
    VersionState,
    message_text,
)

__all__ = [
    "AdapterVersion",
    "Agent",
    "HooksError",
    "Kind",
    "Mode",
    "Purpose",
    "Reward",
    "Sample",
    "SampleTurn",
    "Sampling",
    "Session",
    "SkillRef",
    "Trace",
    "VersionState",
    "hookimpl",
    "hookspec",
    "message_text",
]
