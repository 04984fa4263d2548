"""Bodies of requests, read whole at the edge before LiteLLM sees any of them, as LiteLLM itself would.

A body that lies in one piece costs nothing here. One that is still arriving is held in memory, so it may arrive for so
long alone, all of them together may hold so much, and those that came without a key that is known far less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

from metaclaw_plugin.settings import GatewaySettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# Of the key that a request came with. refused: the authentication is ours, and will not take it; stranger: it is
# somebody else's, and there is none.
Standing = Literal["known", "refused", "stranger"]

REFUSED = "metaclaw.refused"  # in a request's scope: its body was not read, so no authentication may let it pass
STRANGERS_BODY = 1_000_000  # bytes of a body that came without a known key: a form to sign in with
_STRANGERS_SHARE = 8  # they have one part in so many of the room
_OTHER_JSON = frozenset(bytes([first]) for first in b'["-0123456789tfn')  # first bytes of JSON values but objects
_RETRY_AFTER = 5  # seconds


class Refusal(NamedTuple):
    """Why a body is not taken, as an answer; ``headers``: those that go with it."""

    status: int
    complaint: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Room:
    """Bytes that bodies may hold while they arrive, all of one process together. For the event loop's thread alone."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def take(self, number: int) -> bool:
        """Hold ``number`` more bytes; False: there is no room for them."""
        if self.held + number > self.most:
            return False
        self.held += number
        return True

    def give_back(self, number: int) -> None:
        """``number`` bytes are held no longer."""
        self.held -= number


class Bodies:
    """Reads bodies within the limits of ``settings``; one per process."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self._room = Room(settings.max_arriving_bytes)
        self._strangers = Room(settings.max_arriving_bytes // _STRANGERS_SHARE)

    def limits(self, standing: Standing) -> tuple[Room, int]:
        """The room of a body that is still arriving, and its most bytes."""
        if standing == "known":
            return self._room, self.settings.max_body_bytes
        return self._strangers, min(STRANGERS_BODY, self._strangers.most, self.settings.max_body_bytes)


class Body:
    """One request's body."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], bodies: Bodies) -> None:
        self.unread = False  # the key is refused whatever stands in it, so LiteLLM is given none
        self._receive = receive
        self._headers = headers
        self._bodies = bodies
        self._ready: list[Message] = []  # what the application has yet to be given

    async def read(self, ask: Callable[[], Awaitable[Standing]], wants_key: bool) -> Refusal | None:
        """Why the body is not taken; ``None``: it is.

        ``ask`` finds out about the request's key; it is called for bodies alone that do not lie there in one piece.
        ``wants_key``: nobody without a key is answered, so that a body without one need not be read at all.
        """
        limit, seconds = self._bodies.settings.max_body_bytes, self._bodies.settings.body_timeout
        length = self._headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            return _too_long(limit)
        try:
            async with asyncio.timeout(seconds):
                message = await self._receive()
                if message["type"] == "http.request" and message.get("more_body", False):
                    return await self._read_on(message, ask, wants_key)
        except TimeoutError:
            complaint = f"the request body did not arrive within {seconds:g} s; send it faster, or raise "
            return Refusal(408, complaint + "metaclaw.gateway.body_timeout", ((b"connection", b"close"),))
        self._ready = [message]  # all of it, or word that the client has left
        return _too_long(limit) if len(message.get("body", b"")) > limit else None

    async def _read_on(
        self, message: Message, ask: Callable[[], Awaitable[Standing]], wants_key: bool
    ) -> Refusal | None:
        standing = await ask()
        if standing == "refused" and wants_key:
            self.unread = True
            self._ready = [{"type": "http.request", "body": b"", "more_body": False}]
            return None
        room, limit = self._bodies.limits(standing)
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                part = message.get("body", b"")
                if size + len(part) > limit:
                    return _too_long(limit) if standing == "known" else _too_long_without_key(limit)
                if not room.take(len(part)):
                    return _FULL
                parts.append(part)
                size += len(part)
                if not message.get("more_body", False):
                    break
                message = await self._receive()
                if message["type"] != "http.request":  # the client has left
                    self._ready = [message]
                    return None
        finally:
            room.give_back(size)
        self._ready = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
        return None

    def is_no_object(self) -> bool:
        """Whether it is JSON of another kind, which LiteLLM takes for an object, and fails over with a bare 500."""
        if "form" in self._headers.get("content-type", "") or not self._ready:
            return False
        return self._ready[0].get("body", b"").lstrip()[:1] in _OTHER_JSON

    async def receive(self) -> Message:
        """What the application is given."""
        return self._ready.pop() if self._ready else await self._receive()


_FULL = Refusal(
    503,
    "the bodies that are still arriving fill metaclaw.gateway.max_arriving_bytes; try again",
    ((b"retry-after", b"%d" % _RETRY_AFTER),),
)


def _too_long(limit: int) -> Refusal:
    return Refusal(
        413, f"the request body is longer than {limit} bytes; send less, or raise metaclaw.gateway.max_body_bytes"
    )


def _too_long_without_key(limit: int) -> Refusal:
    return Refusal(413, f"the request body is longer than {limit} bytes, and came without a key that is known")
