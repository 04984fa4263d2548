"""The way of one request: identify, session, skills, route, sampling defaults, call, capture, commit.

Nothing here may fail a request that the upstream would answer (law 5): when the store does not answer in time, the
request goes out on the last known route, and what could not be kept is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import BASE_VERSION, Agent, Kind, Mode, Trace
from sqlalchemy.engine import Engine

from metaclaw_plugin.capture.assemble import Origin, traces_of
from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.capture.transport import RECORDING, Recording
from metaclaw_plugin.capture.writer import TraceWriter
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.current import CurrentRequest, Plan
from metaclaw_plugin.gateway.dialects import Message, chat_messages, put_messages
from metaclaw_plugin.gateway.identity import KeyFacts, choose_agent, identify
from metaclaw_plugin.gateway.metrics import Metrics
from metaclaw_plugin.gateway.routing import (
    InFlight,
    Route,
    RoutedTurn,
    Ticket,
    end_exchange,
    pick_route,
    upstream_model,
)
from metaclaw_plugin.gateway.sessions import RequestEvidence, Turn
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.injection import Injection, plan_injection
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.store.agents import AgentRecord, get_record

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECORD_HEADER = "x-metaclaw-record"
_NO = frozenset({"0", "no", "false", "off"})
_TRAINED = (Mode.RL, Mode.AUTO)


class Gateway:
    """What the gateway does with a request; one per process, holding no state of any request."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        library: Library,
        retriever: Retriever,
        plugins: Plugins,
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.in_flight = InFlight(engine)
        self._library = library
        self._retriever = retriever
        self._plugins = plugins
        self._store = GroupCommit(engine)
        self._writer = TraceWriter(self._store, settings.store.max_bytes, metrics.count)
        self._started = False
        self._last_route: dict[str, int] = {}  # for when the store does not answer

    def start(self) -> None:
        """Begin what goes on beside requests; called from the event loop, any number of times."""
        if not self._started:
            self._started = True
            _background(self.in_flight.run())

    async def prepare(self, current: CurrentRequest, key: KeyFacts, data: dict[str, Any], listed: bool) -> None:
        """Decide all about a request, and rewrite it accordingly: its model, its skills.

        ``listed``: the model that it asks for is a deployment of the owner's, not an agent's.

        Raises:
            ForbiddenAgentError: if the key does not act for the agent that the request names.
            UnknownAgentError: if that agent is gone.
        """
        agent = await self._agent_of(current, key, data, listed)
        if agent is None:
            return
        messages = chat_messages(current.dialect, data)
        chosen = await self._skills_of_plugins(agent, messages)
        evidence = RequestEvidence(current.headers, _client_body(data), messages)
        passed_through = data["model"] if listed else None

        def decide(c: sa.Connection) -> tuple[Plan, Injection | None]:
            return self._decide(c, current, get_record(c, agent), evidence, messages, chosen, passed_through)

        try:
            plan, injection = await self._in_store(decide, self._give_back)
        except (StoreError, TimeoutError) as error:
            logger.warning("a request of agent %s goes unrecorded: %s", agent, error)
            self.metrics.count("requests_unrecorded", agent, 1)
            plan, injection = self._without_store(agent, passed_through), None
        current.plan = plan
        if injection is not None:
            put_messages(current.dialect, data, messages, injection.messages)
        if not listed:
            self._last_route[agent] = plan.route.adapter_version
            data["model"] = plan.route.model

    def attempt(self, current: CurrentRequest, call: dict[str, Any]) -> dict[str, Any]:
        """Make one attempt to call vLLM recordable; returns LiteLLM's keyword arguments, completed."""
        plan = current.plan
        if plan is None or plan.turn is None:
            RECORDING.set(None)
            return call
        defaults = {"temperature": 1.0, "top_p": 1.0} if plan.agent.mode in _TRAINED else {}
        missing = {name: value for name, value in defaults.items() if call.get(name) is None}
        asks_for_logprobs = bool(call.get("logprobs"))
        # Without logprobs, top_logprobs is the client's mistake: vLLM shall say so.
        wanted = {} if call.get("top_logprobs") is not None and not asks_for_logprobs else {"logprobs": True}
        current.recording = Recording(
            keep_logprobs=asks_for_logprobs, keep_token_ids=bool(call.get("return_token_ids"))
        )
        RECORDING.set(current.recording)
        return {**call, **missing, **wanted, "return_token_ids": True}

    async def commit(self, current: CurrentRequest) -> None:
        """Store what was answered; returns once it is committed, or when the wait for that is over."""
        if (batch := await self._traces(current)) is None:
            return
        agent, traces, after = batch
        started = time.perf_counter()
        stored = await self._writer.write(agent, traces, after, self.settings.gateway.commit_timeout)
        self.metrics.committed(stored, time.perf_counter() - started)

    def close_request(self, current: CurrentRequest) -> None:
        """The request has ended, one way or another: what is not stored yet is queued, without a wait."""
        plan = current.plan
        if plan is None:
            return
        if plan.ticket is not None:
            self.in_flight.end(plan.ticket)
        if current.recording is not None and not current.committed:
            current.recording.end()
            # The client is gone, so nobody waits; the request's own task may be on its way out as well.
            _background(self._store_rest(current))

    def close(self, timeout: float) -> bool:
        """Store all that is queued; False if that took longer than ``timeout`` seconds."""
        return self._store.close(timeout)

    async def _store_rest(self, current: CurrentRequest) -> None:
        if (batch := await self._traces(current)) is not None:
            self._writer.submit(*batch)

    async def _traces(
        self, current: CurrentRequest
    ) -> tuple[str, Sequence[Trace], Callable[[sa.Connection], None]] | None:
        plan, recording = current.plan, current.recording
        if current.committed or plan is None or plan.turn is None or recording is None:
            return None
        current.committed = True
        origin = _origin(current.dialect, plan, plan.turn)
        traces = traces_of(origin, recording, current.response_id, self.settings.capture)
        if not traces:
            return None
        answers = [trace.response for trace in traces]
        asks_for_tool = any(answer.get("tool_calls") for answer in answers)
        turn, finished = plan.turn, recording.complete
        traces = tuple([await self._redacted(trace) for trace in traces])

        def after(c: sa.Connection) -> None:
            if finished:
                sessions.extend(c, turn, answers, traces[0].finished_at)
            if turn.kind is Kind.MAIN and not asks_for_tool:
                end_exchange(c, turn.session)

        return plan.agent.name, traces, after

    async def _redacted(self, trace: Trace) -> Trace:
        changed: Trace | None = await self._plugins.call_first("redact_trace", trace=trace)
        if changed is None:
            return trace
        return replace(changed, id=trace.id, agent=trace.agent, trainable=False, reason="redacted")

    def _decide(
        self,
        c: sa.Connection,
        current: CurrentRequest,
        record: AgentRecord,
        evidence: RequestEvidence,
        messages: Sequence[Message],
        chosen: Sequence[Skill] | None,
        passed_through: str | None,
    ) -> tuple[Plan, Injection | None]:
        agent = record.agent(self.settings.mode)
        first_id = f"tr-{uuid.uuid4().hex}"
        if agent.mode is Mode.OFF or not record.record or current.headers.get(RECORD_HEADER, "").lower() in _NO:
            route, ticket = self._route(c, agent.name, _Unkept(), passed_through)
            return Plan(first_id, agent, route, None, ticket), None
        turn = sessions.resolve(c, agent.name, evidence, current.started_at, self.settings)
        if chosen is None and turn.new_exchange and turn.kind is Kind.MAIN:
            chosen = self._retriever.select(agent.name, messages)
        injection = plan_injection(
            c, agent, turn, messages, chosen or (), withheld_share=self.settings.skills.withheld_share
        )
        route, ticket = self._route(c, agent.name, turn, passed_through)
        return Plan(first_id, agent, route, turn, ticket, injection.skills, injection.generation), injection

    def _route(
        self, c: sa.Connection, agent: str, turn: RoutedTurn, passed_through: str | None
    ) -> tuple[Route, Ticket | None]:
        if passed_through is not None:
            return Route(passed_through, BASE_VERSION), None
        route = pick_route(c, agent, turn)
        return route, self.in_flight.begin(c, agent, route.adapter_version)

    async def _agent_of(
        self, current: CurrentRequest, key: KeyFacts, data: Mapping[str, Any], listed: bool
    ) -> str | None:
        if key.ours:
            identity = identify(cast(sa.Connection, None), key)  # such a key says it all itself
        else:
            identity = await self._in_store(lambda c: identify(c, key))
        agent = choose_agent(identity, current.headers, None if listed else data.get("model"))
        if agent is None and not identity.internal:
            self.metrics.count("requests_without_agent", "", 1)
        return agent

    async def _in_store(
        self, decide: Callable[[sa.Connection], T], undo: Callable[[asyncio.Future[T]], None] | None = None
    ) -> T:
        """Run ``decide`` in the store's thread.

        Raises:
            StoreError: if the store failed.
            TimeoutError: if it did not answer in time; ``undo`` gets what comes after all.
        """
        future = self._store.submit(decide)
        waiter = asyncio.wrap_future(future)
        done, _ = await asyncio.wait({waiter}, timeout=self.settings.gateway.commit_timeout)
        if done:
            return waiter.result()
        if not future.cancel() and undo is not None:
            waiter.add_done_callback(undo)
        raise TimeoutError(f"the store did not answer within {self.settings.gateway.commit_timeout:g} s")

    def _give_back(self, waiter: asyncio.Future[tuple[Plan, Injection | None]]) -> None:
        if not waiter.cancelled() and waiter.exception() is None and (ticket := waiter.result()[0].ticket) is not None:
            self.in_flight.end(ticket)

    def _without_store(self, agent: str, passed_through: str | None) -> Plan:
        version = self._last_route.get(agent, BASE_VERSION) if passed_through is None else BASE_VERSION
        route = Route(passed_through or upstream_model(agent, version), version)
        return Plan(f"tr-{uuid.uuid4().hex}", Agent(agent, self.settings.mode), route, None, None)

    async def _skills_of_plugins(self, agent: str, messages: Sequence[Message]) -> tuple[Skill, ...] | None:
        """What a plugin chose; ``None`` if none had an opinion."""
        view = self._library.view(agent)
        described = Agent(agent, self.settings.mode)
        refs = await self._plugins.call_first("select_skills", agent=described, messages=messages, library=view)
        return None if refs is None else view.resolve(refs)


class _Unkept:
    """A turn of which nothing is kept: it is routed like any other and pins nothing."""

    session = ""
    kind = Kind.SIDE
    new_exchange = True
    adapter_version = None


_tasks: set[asyncio.Task[None]] = set()


def _background(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)  # the loop itself holds tasks only weakly
    task.add_done_callback(_tasks.discard)


def _client_body(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body as the client sent it; LiteLLM adds to ``data`` as it goes."""
    body = (data.get("proxy_server_request") or {}).get("body")
    return body if isinstance(body, dict) else data


def _origin(dialect: str, plan: Plan, turn: Turn) -> Origin:
    return Origin(
        trace_id=plan.trace_id,
        agent=plan.agent.name,
        session=turn.session,
        turn=turn.turn,
        exchange=turn.exchange,
        kind=turn.kind,
        dialect=dialect,
        model=plan.route.model.partition("/")[2],
        adapter_version=plan.route.adapter_version,
        skills=plan.skills,
        skill_generation=plan.skill_generation,
    )
