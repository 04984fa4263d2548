"""The way of one request: identify, session, skills, route, sampling defaults, call, capture, commit.

Nothing here may fail a request that the upstream would answer (law 5): when the store does not answer in time, the
request goes out on the last known route, and what could not be kept is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import Agent, Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.capture.quota import Quota
from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.capture.writer import UNRECORDED, TraceWriter
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.gateway.asking import Asking
from metaclaw_plugin.gateway.collecting import AT_FAULT, Collector
from metaclaw_plugin.gateway.current import CurrentRequest, Plan
from metaclaw_plugin.gateway.dialects import Message, chat_messages, put_messages
from metaclaw_plugin.gateway.heartbeat import beat
from metaclaw_plugin.gateway.identity import Identity, KeyFacts, choose_agent, identify, own_identity
from metaclaw_plugin.gateway.keeping import Keeper, in_background
from metaclaw_plugin.gateway.keys import VirtualKeyCache
from metaclaw_plugin.gateway.metrics import Metrics
from metaclaw_plugin.gateway.planning import Asked, Planner
from metaclaw_plugin.gateway.routing import UPSTREAM, InFlight
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.gateway.traffic import Traffic
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.injection import Injection
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.retrieval import Retriever
from metaclaw_plugin.skills.skill_file import Skill
from metaclaw_plugin.store.traces import OVER_QUOTA

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TRAINED = (Mode.RL, Mode.AUTO)
# The model's own distribution. All of it is said, since a vLLM may have other defaults of the model's.
_PLAIN_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


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
        self.traffic = Traffic(engine)
        self._library = library
        self._plugins = plugins
        self._store = GroupCommit(engine)
        self._retriever = retriever
        self._reading = Asking("reading")
        quota = Quota(settings.store.max_bytes)
        self._planner = Planner(settings, retriever, self.in_flight, quota)
        self._writer = TraceWriter(self._store, quota, metrics.count)
        self._keeper = Keeper(settings, self._writer, plugins, metrics)
        self._virtual_keys = VirtualKeyCache()
        self._started = False
        self._open = 0  # requests on their way

    def open_request(self) -> None:
        """A request has come in; called from the event loop, and answered by one ``close_request``."""
        self._open += 1
        if not self._started:
            self._started = True
            in_background(beat({"requests in flight": self.in_flight.flush, "the last requests": self.traffic.flush}))
            if AT_FAULT:
                in_background(Collector().run())

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
        evidence = RequestEvidence(current.headers, _client_body(data), messages)
        chosen = await self._skills_of_plugins(agent, messages)
        passed_through = data["model"] if listed else None

        def read() -> Asked:
            return self._planner.read(agent, evidence, messages, chosen, passed_through, current.started_at)

        try:
            asked = await self._reading.ask(read, self.settings.gateway.commit_timeout)
            plan, injection = await self._in_store(lambda c: self._planner.decide(c, asked), self._give_back)
        except (StoreError, TimeoutError) as error:
            logger.warning("a request of agent %s goes unrecorded: %s", agent, error)
            self._writer.count(UNRECORDED, agent, 1)
            plan, injection = self._planner.without_store(agent, passed_through), None
        if plan.over_quota and plan.turn is None:
            self._writer.count(OVER_QUOTA, agent, 1)
        current.plan = plan
        if injection is not None:
            put_messages(current.dialect, data, messages, injection.messages)
        current.data = data
        if not listed:
            data["model"] = f"{UPSTREAM}/{agent}"  # what LiteLLM names in headers and errors; vLLM's name comes later

    def attempt(self, current: CurrentRequest, call: dict[str, Any]) -> dict[str, Any]:
        """Send one attempt where its route says, recordable; returns LiteLLM's keyword arguments, completed."""
        plan = current.plan
        if plan is None:
            return call
        model = plan.upstream_name if plan.on_own_model else None
        if plan.turn is None:
            current.recording = Recording(keep_logprobs=True, keep_token_ids=True, model=model, kept=False)
            return call
        defaults = _PLAIN_SAMPLING if plan.agent.mode in _TRAINED else {}
        given = {**(call.get("extra_body") or {}), **call}  # where a client may put what OpenAI does not know
        missing = {name: value for name, value in defaults.items() if given.get(name) is None}
        asks_for_logprobs = bool(call.get("logprobs"))
        # Without logprobs, top_logprobs is the client's mistake: vLLM shall say so.
        wanted = {} if call.get("top_logprobs") is not None and not asks_for_logprobs else {"logprobs": True}
        current.recording = Recording(
            keep_logprobs=asks_for_logprobs, keep_token_ids=bool(call.get("return_token_ids")), model=model
        )
        return {**call, **missing, **wanted, "return_token_ids": True}

    async def commit(self, current: CurrentRequest) -> None:
        """Store what was answered; returns once it is committed, or when the wait for that is over."""
        await self._keeper.commit(current, alone=self._open == 1)

    def close_request(self, current: CurrentRequest) -> None:
        """The request has ended, one way or another: what is not stored yet is queued, without a wait."""
        self._open -= 1
        if current.counted_as is not None:
            self.traffic.ended(current.counted_as)
        if current.plan is None:
            return
        if current.plan.ticket is not None:
            self.in_flight.end(current.plan.ticket)
        self._keeper.keep_rest(current)

    def close(self, timeout: float) -> bool:
        """Store all that is queued, and what was counted; False if that took longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        written = self._writer.close(timeout)
        return self._store.close(max(0.0, deadline - time.monotonic())) and written

    async def _agent_of(
        self, current: CurrentRequest, key: KeyFacts, data: Mapping[str, Any], listed: bool
    ) -> str | None:
        if key.ours:
            identity = own_identity(key)
        else:
            identity = await self._of_virtual_key(key)
        agent = choose_agent(identity, current.headers, None if listed else data.get("model"))
        if agent is None and not identity.internal:
            self.metrics.count("requests_without_agent", "", 1)
        if not identity.internal:
            current.counted_as = self.traffic.began(agent)
        return agent

    async def _of_virtual_key(self, key: KeyFacts) -> Identity:
        """What the store says; while it does not answer, what it said last."""
        if (known := self._virtual_keys.peek(key)) is not None:
            return known
        try:
            identity = await self._in_store(lambda c: identify(c, key))
        except (StoreError, TimeoutError):
            if (known := self._virtual_keys.peek(key, store_answers=False)) is None:
                raise
            return known
        if not identity.refused:  # an agent that is handed over answers at once
            self._virtual_keys.note(key, identity)
        return identity

    async def _skills_of_plugins(self, agent: str, messages: Sequence[Message]) -> tuple[Skill, ...] | None:
        """What a plugin chose, or retrieval that takes long; ``None``: left to the planner."""
        view = self._library.view(agent)
        described = Agent(agent, self.settings.mode)
        refs = await self._plugins.call_first("select_skills", agent=described, messages=messages, library=view)
        if refs is not None:
            return view.resolve(refs)
        if self._retriever.takes_long:
            return await asyncio.to_thread(self._retriever.select_for_new, agent, messages)
        return None

    async def _in_store(self, decide: Callable[[sa.Connection], T], undo: Callable[[T], None] | None = None) -> T:
        """Run ``decide`` in the store's thread; ``undo`` gets what came of it too late, or was rolled back.

        Raises:
            StoreError: if the store failed.
            TimeoutError: if it did not answer in time.
        """
        future = self._store.submit(decide, discard=undo)
        waiter = asyncio.wrap_future(future)
        done, _ = await asyncio.wait({waiter}, timeout=self.settings.gateway.commit_timeout)
        if done:
            return waiter.result()
        if not future.cancel() and undo is not None:
            waiter.add_done_callback(lambda late: _undo(late, undo))
        raise TimeoutError(f"the store did not answer within {self.settings.gateway.commit_timeout:g} s")

    def _give_back(self, decided: tuple[Plan, Injection | None]) -> None:
        if (ticket := decided[0].ticket) is not None:
            self.in_flight.end(ticket)


def _undo(late: asyncio.Future[T], undo: Callable[[T], None]) -> None:
    if not late.cancelled() and late.exception() is None:
        undo(late.result())


def _client_body(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body as the client sent it; LiteLLM adds to ``data`` as it goes."""
    body = (data.get("proxy_server_request") or {}).get("body")
    return body if isinstance(body, dict) else data
