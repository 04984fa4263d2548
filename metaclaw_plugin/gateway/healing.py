"""When vLLM has forgotten an adapter: load it again and ask once more; if that fails, another version answers.

vLLM forgets all adapters when it restarts; the trainer brings them back within seconds, but no request shall fail in
between. Nor shall one fail because the server closed an idle connection in the moment in which it was used again. This
transport sits next to the network, so LiteLLM and the tap see only the answer that came in the end.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx
import sqlalchemy as sa
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version, version_name
from metaclaw_hooks.types import BASE_VERSION, VersionState
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.gateway.current import CURRENT
from metaclaw_plugin.gateway.routing import InFlight, Route, Ticket, upstream_model
from metaclaw_plugin.store.adapters import list_versions
from metaclaw_plugin.store.schema import sessions

logger = logging.getLogger(__name__)

LOAD_TIMEOUT = 10.0  # seconds
_CLOSED = (errno.ECONNRESET, errno.EPIPE)  # what writing to a connection says that the other end has closed


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request asked for."""

    agent: str
    number: int
    body: dict[str, object]


class HealingTransport(httpx.AsyncBaseTransport):
    """Passes requests to ``inner``; one that fails for want of an adapter, or by a closed connection, is helped.

    ``count(name, agent, n)`` counts ``adapters_reloaded`` and ``adapter_fallbacks``.
    """

    def __init__(
        self,
        inner: httpx.AsyncBaseTransport,
        engine: Engine,
        in_flight: InFlight,
        count: Callable[[str, str, int], None],
    ) -> None:
        self._inner = inner
        self._engine = engine
        self._in_flight = in_flight
        self._count = count
        self._loading: dict[str, asyncio.Lock] = {}  # one load of a version at a time

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        response = await self._ask(request, content)
        if response.status_code != 404 or (asked := _asked(content)) is None:
            return response
        body = await response.aread()
        await response.aclose()
        response = httpx.Response(404, headers=_plain(response.headers), content=body)
        for version in await self._versions(asked):
            if not await self._load(request, asked.agent, version):
                continue
            if version != asked.number:
                if not await self._move(asked, version):
                    continue
                model = upstream_model(asked.agent, version).partition("/")[2]
                content = json.dumps(asked.body | {"model": model}).encode()
            answer = await self._inner.handle_async_request(_again(request, content))
            if answer.status_code != 404 or version == BASE_VERSION:
                return answer
            await answer.aclose()
        return response

    async def _ask(self, request: httpx.Request, content: bytes) -> httpx.Response:
        """The answer of ``inner``; asked once more if the connection ends before the answer begins."""
        try:
            return await self._inner.handle_async_request(request)
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            if not _was_closed(error):
                raise
            logger.warning("vLLM closed a connection before it answered; it is asked once more")
        return await self._inner.handle_async_request(_again(request, content))

    async def aclose(self) -> None:
        """Left open on purpose: LiteLLM closes clients that share this transport."""

    async def _versions(self, asked: _Asked) -> list[int]:
        """What may answer, best first: the version that was asked for, the newest others that serve, the base model."""

        def serving() -> list[int]:
            with self._engine.connect() as c:
                records = list_versions(c, asked.agent, states=(VersionState.SERVING,))
            return sorted((r.version.number for r in records if r.version.number != asked.number), reverse=True)

        try:
            others = await asyncio.to_thread(serving)
        except SQLAlchemyError as error:
            logger.warning("other versions of %s cannot be looked up: %s", asked.agent, type(error).__name__)
            others = []
        return [asked.number, *others, BASE_VERSION]

    async def _load(self, request: httpx.Request, agent: str, number: int) -> bool:
        """Ask vLLM to load a version; whether it should be there now."""
        if number == BASE_VERSION:
            return True
        name = version_name(agent, number)

        def path() -> str | None:
            with self._engine.connect() as c:
                found = list_versions(c, agent, number=number)
            return found[0].version.path if found else None

        async with self._loading.setdefault(name, asyncio.Lock()):
            try:
                folder = await asyncio.to_thread(path)
                if folder is None:
                    return False
                order = json.dumps({"lora_name": name, "lora_path": folder}).encode()
                load = self._inner.handle_async_request(_again(request, order, "/v1/load_lora_adapter"))
                answer = await asyncio.wait_for(load, LOAD_TIMEOUT)
                said = (await answer.aread())[:300]
                await answer.aclose()
            except (SQLAlchemyError, httpx.HTTPError, TimeoutError) as error:
                logger.warning("%s was gone from vLLM and could not be loaded: %s", name, type(error).__name__)
                return False
        if answer.is_success:
            self._count("adapters_reloaded", agent, 1)
            logger.warning("%s was gone from vLLM; it is loaded again", name)
            return True
        there = answer.status_code == 400 and b"already" in said  # another request was first
        if not there:
            logger.error("%s was gone from vLLM, which refuses to load it again: %d", name, answer.status_code)
        return there

    async def _move(self, asked: _Asked, version: int) -> bool:
        """Note on the request, its session and the counts that another version answers; False if that one has gone."""
        current = CURRENT.get()
        if current is None or current.plan is None:
            return version == BASE_VERSION  # without a plan nothing would say which version answered
        plan = current.plan
        session = None if plan.turn is None else plan.turn.session
        try:
            ticket = await asyncio.to_thread(self._begin, asked, version, session)
        except SQLAlchemyError as error:
            logger.warning("%s: the move to version %d is not stored: %s", asked.agent, version, type(error).__name__)
        else:
            if ticket is None:
                return False
            if plan.ticket is not None:
                self._in_flight.end(plan.ticket)
            plan = replace(plan, ticket=ticket)
        route = Route(upstream_model(asked.agent, version), version, left=asked.number)
        current.plan = replace(plan, route=route)
        self._count("adapter_fallbacks", asked.agent, 1)
        logger.error("%s@v%d is gone from vLLM: version %d answers", asked.agent, asked.number, version)
        return True

    def _begin(self, asked: _Asked, version: int, session: str | None) -> Ticket | None:
        """Count the request on ``version`` and move its session's pin there; None if that version has been retired."""
        with self._engine.begin() as c:
            if version != BASE_VERSION:
                found = list_versions(c, asked.agent, number=version)
                if not found or found[0].version.state is not VersionState.SERVING:
                    return None
            if session is not None:
                pinned = sa.and_(sessions.c.id == session, sessions.c.adapter_version == asked.number)
                c.execute(sessions.update().where(pinned).values(adapter_version=version))
            return self._in_flight.begin(c, asked.agent, version)


def _was_closed(error: httpx.TransportError) -> bool:
    """Whether there was a connection; LiteLLM's transport calls it a failure to connect when writing fails, too."""
    return not isinstance(error, httpx.ConnectError) or getattr(error.__cause__, "errno", None) in _CLOSED


def _asked(content: bytes) -> _Asked | None:
    """The adapter version that a request body names; None if it names none."""
    try:
        body = json.loads(content)
        agent, number = parse_version(body["model"])
    except (ValueError, KeyError, TypeError, InvalidNameError):
        return None
    return _Asked(agent, number, body)


def _again(request: httpx.Request, content: bytes, path: str | None = None) -> httpx.Request:
    """The request with another body, and another path below the root if one is given."""
    url = request.url
    if path is not None:
        root = url.path.partition("/v1/")[0]
        url = url.copy_with(path=root + path, query=None)
    dropped = {"content-length", "transfer-encoding", "host"}
    headers = {key: value for key, value in request.headers.items() if key.lower() not in dropped}
    return httpx.Request(request.method, url, headers=headers, content=content, extensions=request.extensions)


def _plain(headers: httpx.Headers) -> dict[str, str]:
    dropped = {"content-encoding", "content-length", "transfer-encoding"}
    return {key: value for key, value in headers.items() if key.lower() not in dropped}
