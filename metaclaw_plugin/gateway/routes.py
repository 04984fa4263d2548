"""Our own routes, on the gateway's port and behind its authentication.

``mount(app)`` puts them into LiteLLM's application. Every answer is about the caller's own agents; what is another's
is answered like what does not exist.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.errors import ForbiddenAgentError, UnknownAgentError, UnknownTraceError
from metaclaw_plugin.gateway.adapter_routes import add_adapter_routes
from metaclaw_plugin.gateway.asking import Asking
from metaclaw_plugin.gateway.identity import (
    Identity,
    KeyFacts,
    choose_agent,
    identify,
    narrow,
    own_identity,
    own_models,
)
from metaclaw_plugin.gateway.own_route import OwnRoute
from metaclaw_plugin.gateway.process import GatewayProcess, this_process
from metaclaw_plugin.store import overview, schema
from metaclaw_plugin.store.export import list_summaries, stored_json
from metaclaw_plugin.store.sessions import close_session, find_session
from metaclaw_plugin.store.traces import TraceFilter, find_trace, get_stored

T = TypeVar("T")
Work = Callable[[Connection, Identity], T]
Ask = Callable[[Any, Work[Any]], Coroutine[Any, Any, Any]]
_PATIENCE = 30.0  # seconds that a caller waits for the store


class Feedback(BaseModel):
    """What a human thought of one answer."""

    model_config = ConfigDict(extra="forbid")

    trace_id: str | None = Field(None, min_length=1, max_length=200, description="From the header x-metaclaw-trace-id.")
    response_id: str | None = Field(None, min_length=1, max_length=1000, description="The `id` of the response.")
    value: float = Field(ge=-1, le=1, allow_inf_nan=False, description="From -1 (bad) to 1 (good).")
    comment: str = Field("", max_length=20_000, description="Why; kept beside the value.")

    @model_validator(mode="after")
    def _one_target(self) -> Feedback:
        if (self.trace_id is None) == (self.response_id is None):
            raise ValueError("give either trace_id or response_id")
        return self


class FeedbackReply(BaseModel):
    """``trace_id`` is null while the trace is not stored yet; the feedback is joined with it later."""

    id: str
    agent: str
    trace_id: str | None


class SessionReply(BaseModel):
    """``closed`` is false if it was closed already."""

    session: str
    closed: bool


class TracesReply(BaseModel):
    """Oldest first; ``after`` of the next page, null on the last one."""

    data: list[dict[str, Any]]
    after: int | None


class StatusReply(BaseModel):
    """One entry for each agent of the caller's key."""

    agents: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Caller:
    """Whose key a request has, and which of the key's agents it may name."""

    auth: Any
    headers: Mapping[str, str]


def create_router(authenticate: Callable[..., Any], process: Callable[[], GatewayProcess] = this_process) -> APIRouter:
    """The routes under ``/metaclaw/v1``; ``authenticate`` is the dependency that yields a ``UserAPIKeyAuth``."""
    router = APIRouter(prefix="/metaclaw/v1", tags=["metaclaw"], route_class=OwnRoute)
    asking = Asking("own routes")

    async def who(request: Request, auth: Any = Depends(authenticate)) -> _Caller:
        return _Caller(auth, request.headers)

    async def read(by: _Caller, work: Work[T]) -> T:
        def run() -> T:
            engine = process().engine
            identity = narrow(_identity(engine, by.auth), by.headers)
            with engine.connect() as c:  # takes no lock: an answer that is being stored need not wait
                return work(c, identity)

        return await asking.ask(run, _PATIENCE)

    async def write(by: _Caller, work: Work[T]) -> T:
        def run() -> T:
            engine = process().engine
            identity = narrow(_identity(engine, by.auth), by.headers)
            with engine.begin() as c:
                return work(c, identity)

        return await asking.ask(run, _PATIENCE)

    caller = Depends(who)

    _add_writing(router, caller, write)
    _add_reading(router, caller, read, process)
    add_adapter_routes(router, caller, read, write, process)
    return router


def _identity(engine: Engine, auth: Any) -> Identity:
    key = KeyFacts.of(auth)
    if key.ours:
        return own_identity(key)
    with engine.begin() as c:
        return identify(c, key)


def _add_writing(router: APIRouter, caller: Any, ask: Ask) -> None:
    @router.post("/feedback", summary="Rate an answer")
    async def feedback(body: Feedback, auth: Any = caller) -> FeedbackReply:
        found: FeedbackReply = await ask(auth, lambda c, identity: _save_feedback(c, identity, body))
        return found

    @router.post("/sessions/{session}/end", summary="End a session")
    async def end_session(
        session: Annotated[str, Path(max_length=400, description="Our id, or the one that the client goes by.")],
        auth: Any = caller,
    ) -> SessionReply:
        def work(c: Connection, identity: Identity) -> SessionReply:
            found = find_session(c, identity.agents, session)
            return SessionReply(session=found, closed=close_session(c, found, "ended", time.time()))

        reply: SessionReply = await ask(auth, work)
        return reply


def _add_reading(router: APIRouter, caller: Any, ask: Ask, process: Callable[[], GatewayProcess]) -> None:
    @router.get("/traces", summary="List traces of the caller's agents")
    async def traces(
        agent: Annotated[str | None, Query(description="One of the caller's agents; unset: the first.")] = None,
        session: Annotated[str | None, Query(description="Traces of this session alone.")] = None,
        since: Annotated[float | None, Query(allow_inf_nan=False, description="Unix seconds.")] = None,
        after: Annotated[int, Query(ge=0, le=2**62, description="`after` of the page before.")] = 0,
        limit: Annotated[int, Query(ge=1, le=500, description="Traces on a page.")] = 50,
        auth: Any = caller,
    ) -> TracesReply:
        def work(c: Connection, identity: Identity) -> TracesReply:
            where = TraceFilter(agent=_own(identity, agent), session=session, since=since, after_seq=after)
            found = list_summaries(c, where, limit)
            return TracesReply(data=found, after=found[-1]["seq"] if len(found) == limit else None)

        reply: TracesReply = await ask(auth, work)
        return reply

    @router.get("/traces/{trace_id}", summary="One trace with its rewards")
    async def trace(trace_id: Annotated[str, Path(max_length=200)], auth: Any = caller) -> Response:
        def work(c: Connection, identity: Identity) -> dict[str, Any]:
            for agent in identity.agents:
                found = find_trace(c, agent, trace_id)
                if found is not None:
                    return stored_json(get_stored(c, found))
            raise UnknownTraceError(f"no trace {trace_id[:80]!r} of yours")

        # ASCII, since a client may have sent half a surrogate pair, which UTF-8 cannot hold.
        return Response(json.dumps(await ask(auth, work)), media_type="application/json")

    @router.get("/status", summary="How the caller's agents are doing")
    async def status(auth: Any = caller) -> StatusReply:
        def work(c: Connection, identity: Identity) -> StatusReply:
            mode = process().settings.mode
            return StatusReply(agents=[overview.agent_overview(c, name, mode) for name in identity.agents])

        reply: StatusReply = await ask(auth, work)
        return reply


def mount(app: FastAPI) -> None:
    """Put our routes into LiteLLM's application, and the caller's agents into its ``/v1/models``."""
    from litellm.proxy import proxy_server
    from litellm.proxy._types import LiteLLMRoutes
    from litellm.proxy.auth.user_api_key_auth import user_api_key_auth

    asking = Asking("list of models")
    own = create_router(user_api_key_auth)
    app.include_router(own)
    # LiteLLM lets virtual keys call what it lists alone; what each key may see, our routes decide.
    paths = [route.path for route in own.routes if isinstance(route, APIRoute)]
    LiteLLMRoutes.openai_routes.value.extend(paths)
    LiteLLMRoutes.llm_api_routes.value.extend(paths)  # for keys that are held to models' routes

    async def models(request: Request, auth: Any = Depends(user_api_key_auth)) -> Any:
        names = await asking.ask(lambda: _models_of(auth), _PATIENCE)
        router = proxy_server.llm_router
        listed = [*(auth.models or auth.team_models or (router.get_model_names() if router else ()))]
        kept = [name for name in listed if not name.startswith("metaclaw/")]
        seen = auth.model_copy(update={"models": [*names, *kept] or ["no-default-models"]})
        query = {name: value for name, value in request.query_params.items() if name in _LIST_QUERY}
        flags = {name: value.lower() in {"1", "true", "yes"} for name, value in query.items() if name in _LIST_FLAGS}
        return await proxy_server.model_list(request=request, user_api_key_dict=seen, **(query | flags))

    before = len(app.router.routes)
    for path in ("/v1/models", "/models"):
        app.add_api_route(path, models, methods=["GET"], include_in_schema=False)
    ours = app.router.routes[before:]
    app.router.routes[:] = [*ours, *app.router.routes[:before]]  # the first route that matches answers


_LIST_FLAGS = {
    "return_wildcard_routes",
    "include_model_access_groups",
    "only_model_access_groups",
    "include_metadata",
    "healthy_only",
}
_LIST_QUERY = _LIST_FLAGS | {"team_id", "fallback_type", "scope", "client_version"}


def _models_of(auth: Any) -> list[str]:
    return own_models(_identity(this_process().engine, auth))


def _save_feedback(c: Connection, identity: Identity, body: Feedback) -> FeedbackReply:
    target = body.trace_id or body.response_id or ""
    default = choose_agent(identity, {})
    if default is None:
        raise ForbiddenAgentError("this key has no agent, so there is nothing of it to rate")
    agent, trace = default, find_trace(c, default, target)
    for other in () if trace else identity.agents:
        if (found := find_trace(c, other, target)) is not None:
            agent, trace = other, found
            break
    feedback = secrets.token_hex(12)
    c.execute(
        schema.feedback.insert().values(
            id=feedback,
            agent=agent,
            target=trace or target,
            value=body.value,
            comment=body.comment.replace("\x00", ""),
            at=time.time(),
        )
    )
    return FeedbackReply(id=feedback, agent=agent, trace_id=trace)


def _own(identity: Identity, agent: str | None) -> str:
    if agent is not None and agent not in identity.agents:
        raise UnknownAgentError(f"no agent {agent[:80]!r} of yours")
    if not identity.agents:
        raise UnknownAgentError("this key has no agent")
    return agent or identity.agents[0]
