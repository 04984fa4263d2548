"""The request that the present task works on: what was decided about it, and what passed.

LiteLLM calls its hooks at many depths; they, the tap and the edge find the request in this one context variable, which
every task that LiteLLM starts for the request inherits.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from metaclaw_hooks.types import Agent, SkillRef

from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.gateway.dialects import Dialect
from metaclaw_plugin.gateway.routing import UPSTREAM, Route, Ticket
from metaclaw_plugin.gateway.sessions import Turn

_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,1000})"')
_SNIFFED = 4096  # bytes at the front of an answer in which its id stands


@dataclass(frozen=True, slots=True)
class Plan:
    """All that was decided before the call."""

    trace_id: str
    agent: Agent
    route: Route
    turn: Turn | None  # None: nothing of this request is kept
    ticket: Ticket | None
    skills: tuple[SkillRef, ...] = ()
    skill_generation: int = 0
    over_quota: bool = False  # the store is full: its trace, if it is to have one, will not be stored

    @property
    def on_own_model(self) -> bool:
        """Whether vLLM answers with the agent's own model, and not a deployment that the owner listed."""
        return self.route.model.startswith(f"{UPSTREAM}/")

    @property
    def upstream_name(self) -> str:
        """The model name that the upstream is asked for."""
        return self.route.model.removeprefix(f"{UPSTREAM}/")


@dataclass(slots=True)
class CurrentRequest:
    """One request from its first byte to its last."""

    dialect: Dialect
    headers: dict[str, str]  # lower case
    started_at: float = field(default_factory=time.time)
    plan: Plan | None = None
    recording: Recording | None = None  # of the last attempt
    response_id: str | None = None  # as the client sees it
    committed: bool = False
    counted_as: str | None = None  # whose traffic it is, while it is on its way; None: nobody waits for it
    named: str | None = None  # the owner's deployment that the client asked for
    upstream_key: str | None = field(default=None, repr=False)  # the caller's own, for that deployment and no other
    data: dict[str, Any] = field(default_factory=dict, repr=False)  # LiteLLM's request, as it was prepared

    def sniff(self, body: bytes) -> None:
        """Take the response's id from the first bytes that the client gets."""
        if self.response_id is None and (match := _RESPONSE_ID.search(body, 0, _SNIFFED)):
            self.response_id = match[1].decode("utf-8", "replace")


CURRENT: ContextVar[CurrentRequest | None] = ContextVar("metaclaw_request", default=None)


def present_recording() -> Recording | None:
    """Where what passes for the request of the present task is recorded."""
    current = CURRENT.get()
    return None if current is None else current.recording
