"""What is decided about a request before the call: it is read first, then placed in one transaction.

Whatever takes as long as the request is, such as hashing its messages and choosing skills for it, is done in
``Planner.read``, so that no text of a client ever keeps the store from others.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, Agent, Kind, Mode

from metaclaw_plugin.capture.quota import Quota
from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.current import Plan
from metaclaw_plugin.gateway.dialects import Message
from metaclaw_plugin.gateway.routing import InFlight, Route, RoutedTurn, Ticket, pick_route, upstream_model
from metaclaw_plugin.gateway.sessions import Heard, RequestEvidence, Turn
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.injection import Anchored, Injection, anchor_messages, plan_injection
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.store.agents import get_record

RECORD_HEADER = "x-metaclaw-record"
_NO = frozenset({"0", "no", "false", "off"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as far as planning goes, read."""

    agent: str
    heard: Heard
    anchored: Anchored
    chosen: Sequence[Skill]  # skills for its newest human message, should it begin an exchange
    kept: bool  # the client lets it be kept
    passed_through: str | None  # the owner's deployment that it goes to; None: the agent's own model
    at: float  # Unix seconds


class Planner:
    """Reads in any thread, decides in the store's; remembers nothing but each agent's last route."""

    def __init__(self, settings: Settings, retriever: Retriever, in_flight: InFlight, quota: Quota) -> None:
        self._settings = settings
        self._quota = quota
        self._retriever = retriever
        self._in_flight = in_flight
        self._last_route: dict[str, int] = {}  # for when the store does not answer

    def read(
        self,
        agent: str,
        evidence: RequestEvidence,
        messages: Sequence[Message],
        chosen: Sequence[Skill] | None,
        passed_through: str | None,
        at: float,
    ) -> Asked:
        """Read a request, without the store; never on the event loop. ``chosen``: what was chosen already."""
        heard = sessions.hear(evidence, self._settings)
        if chosen is None:
            chosen = self._retriever.select(agent, messages) if heard.kind is Kind.MAIN else ()
        kept = not _is_no(evidence.headers.get(RECORD_HEADER))
        return Asked(agent, heard, anchor_messages(messages), chosen, kept, passed_through, at)

    def decide(self, c: sa.Connection, asked: Asked) -> tuple[Plan, Injection | None]:
        """The plan, and the messages with skills in them; ``None``: they go as they came.

        Raises:
            UnknownAgentError: if the agent is gone.
        """
        record = get_record(c, asked.agent)
        agent = record.agent(self._settings.mode)
        if agent.mode is Mode.OFF or not record.record or not asked.kept:
            route, ticket = self._route(c, asked, _Unkept())
            return Plan(_new_id(), agent, route, None, ticket), None
        full = self._quota.is_full(c)
        turn = self._place(c, agent, asked, full)
        if turn is None:
            route, ticket = self._route(c, asked, _Unkept())
            return Plan(_new_id(), agent, route, None, ticket, over_quota=True), None
        withheld = self._settings.skills.withheld_share
        # Past the quota a session has what it had, and no skill enters that would have to be remembered.
        shown = replace(turn, new_exchange=False) if full else turn
        injection = plan_injection(c, agent, shown, asked.anchored, asked.chosen, withheld_share=withheld)
        route, ticket = self._route(c, asked, turn)
        plan = Plan(_new_id(), agent, route, turn, ticket, injection.skills, injection.generation, over_quota=full)
        return plan, injection

    def _place(self, c: sa.Connection, agent: Agent, asked: Asked, full: bool) -> Turn | None:
        """Where the request stands; ``None``: a conversation of which nothing is kept, since the store is full.

        One that has a session goes on in it, so that it is in its place when there is room again.
        """
        if not full:
            return sessions.resolve(c, agent.name, asked.heard, asked.at, self._settings)
        before = c.begin_nested()
        turn = sessions.resolve(c, agent.name, asked.heard, asked.at, self._settings)
        if turn.turn > 0:
            before.commit()
            return turn
        before.rollback()  # it had to be opened for this request
        return None

    def without_store(self, agent: str, passed_through: str | None) -> Plan:
        """Where a request goes when the store does not answer; nothing of it is kept."""
        if passed_through is not None:
            route = Route(passed_through, BASE_VERSION)
        else:
            version = self._last_route.get(agent, BASE_VERSION)
            route = Route(upstream_model(agent, version), version)
        return Plan(_new_id(), Agent(agent, self._settings.mode), route, None, None)

    def _route(self, c: sa.Connection, asked: Asked, turn: RoutedTurn) -> tuple[Route, Ticket | None]:
        if asked.passed_through is not None:
            return Route(asked.passed_through, BASE_VERSION), None
        route = pick_route(c, asked.agent, turn)
        self._last_route[asked.agent] = route.adapter_version
        return route, self._in_flight.begin(c, asked.agent, route.adapter_version)


class _Unkept:
    """A turn of which nothing is kept: it is routed like any other and pins nothing."""

    session = ""
    kind = Kind.SIDE
    new_exchange = True
    adapter_version = None


def _new_id() -> str:
    return f"tr-{uuid.uuid4().hex}"


def _is_no(value: str | None) -> bool:
    return value is not None and value.strip().lower() in _NO
