"""Bodies at the edge: what is read, for whom, for how long, and how much of them may be held together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.gateway.bodies import STRANGERS_BODY, Bodies, Body, Message, Refusal, Standing
from metaclaw_plugin.settings import GatewaySettings, parse_settings

MEGABYTE = 1_000_000


class Wire:
    """What a client sends, piece by piece; ``None``: it stops there and stays."""

    def __init__(self, *pieces: bytes | None, ends: bool = True) -> None:
        self._pieces = list(pieces)
        self._ends = ends
        self.received = 0

    async def receive(self) -> Message:
        piece = self._pieces.pop(0)
        if piece is None:
            await asyncio.sleep(3600)
            raise AssertionError
        self.received += len(piece)
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces) or not self._ends}


def bodies(**settings: Any) -> Bodies:
    return Bodies(GatewaySettings(**settings))


def asking(standing: Standing, asked: list[int] | None = None) -> Callable[[], Coroutine[Any, Any, Standing]]:
    async def ask() -> Standing:
        if asked is not None:
            asked.append(1)
        return standing

    return ask


async def taken(body: Body) -> bytes:
    message = await body.receive()
    assert message["more_body"] is False
    return bytes(message["body"])


async def test_a_body_in_one_piece_asks_nobody_about_its_key() -> None:
    asked: list[int] = []
    body = Body(Wire(b"{}").receive, {}, bodies())
    assert await body.read(asking("refused", asked), wants_key=True) is None
    assert (asked, body.unread, await taken(body)) == ([], False, b"{}")


async def test_a_body_with_a_known_key_is_read_whole_and_given_in_one_piece() -> None:
    wide = bodies()
    body = Body(Wire(b'{"a":', b" 1", b"}").receive, {}, wide)
    assert await body.read(asking("known"), wants_key=True) is None
    assert await taken(body) == b'{"a": 1}'
    assert [room.held for room in (wide.limits("known")[0], wide.limits("stranger")[0])] == [0, 0]


async def test_of_a_body_whose_key_is_refused_no_more_than_the_first_piece_is_read() -> None:
    wire = Wire(b"x" * 65_536, *[b"x" * 65_536] * 400)
    body = Body(wire.receive, {}, bodies())
    assert await body.read(asking("refused"), wants_key=True) is None
    assert (body.unread, wire.received, await taken(body)) == (True, 65_536, b"")


@pytest.mark.parametrize("standing", ["refused", "stranger"])
async def test_a_body_without_a_known_key_is_read_on_open_routes_up_to_the_length_of_a_form(standing: Standing) -> None:
    body = Body(Wire(b"x" * 1000, b"x" * 1000).receive, {}, bodies())
    assert await body.read(asking(standing), wants_key=False) is None
    assert len(await taken(body)) == 2000
    wire = Wire(*[b"x" * 100_000] * 100)
    refusal = await Body(wire.receive, {}, bodies()).read(asking(standing), wants_key=False)
    assert refusal is not None
    assert (refusal.status, wire.received) == (413, STRANGERS_BODY + 100_000)


@pytest.mark.parametrize("pieces", [[None], [b"x", None], [b"x", b"x", None]])
async def test_a_body_that_does_not_come_is_waited_for_so_long_alone(pieces: Sequence[bytes | None]) -> None:
    short = bodies(body_timeout=0.05)
    refusal = await Body(Wire(*pieces).receive, {}, short).read(asking("known"), wants_key=True)
    assert refusal is not None
    assert (refusal.status, refusal.headers) == (408, ((b"connection", b"close"),))
    assert "body_timeout" in refusal.complaint
    assert short.limits("known")[0].held == 0


async def test_a_body_that_drips_is_ended_by_the_clock_though_it_never_stops() -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    body = Body(drip, {}, bodies(body_timeout=0.2))
    refusal = await asyncio.wait_for(body.read(asking("known"), wants_key=True), 10)
    assert refusal is not None
    assert refusal.status == 408


async def test_bodies_that_arrive_share_one_room_and_strangers_have_one_of_their_own() -> None:
    shared = bodies(max_body_bytes=2 * MEGABYTE, max_arriving_bytes=3 * MEGABYTE)

    def read(standing: Standing, *pieces: bytes | None) -> asyncio.Task[Refusal | None]:
        return asyncio.create_task(Body(Wire(*pieces).receive, {}, shared).read(asking(standing), wants_key=False))

    waiting = [read("known", b"x" * MEGABYTE, b"x" * MEGABYTE, None), read("stranger", b"x" * 300_000, None)]
    await asyncio.sleep(0.01)
    assert [shared.limits(who)[0].held for who in ("known", "stranger")] == [2 * MEGABYTE, 300_000]
    for standing, length in (("known", MEGABYTE + 1), ("stranger", 100_000)):
        refused = await read(standing, b"x" * length, b"x")
        assert refused is not None
        assert (refused.status, refused.headers) == (503, ((b"retry-after", b"5"),))
    assert await read("known", b"x" * (MEGABYTE - 1), b"x") is None
    assert await read("known", b"x" * 2 * MEGABYTE) is None  # it is all there, and holds up nobody
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert [shared.limits(who)[0].held for who in ("known", "stranger")] == [0, 0]


async def test_a_client_that_leaves_gives_its_room_back() -> None:
    shared = bodies()
    messages: list[Message] = [
        {"type": "http.request", "body": b"x", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    body = Body(receive, {}, shared)
    assert await body.read(asking("known"), wants_key=True) is None
    assert await body.receive() == {"type": "http.disconnect"}
    assert shared.limits("known")[0].held == 0


def test_the_longest_body_must_fit_into_the_room() -> None:
    with pytest.raises(ConfigError, match="max_arriving_bytes"):
        parse_settings({"gateway": {"max_arriving_bytes": 1_000_000}}, "test")
