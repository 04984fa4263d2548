"""A wire between two processes that can be refused, slowed, silenced, or cut in the middle of a body."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field
from typing import Literal

PIECE = 65536


@dataclass
class Link:
    """Passes bytes from its own port to ``target``; what it does with them may be changed at any time.

    mode:
        pass     as they come
        refuse   nobody listens; what is open is reset
        slow     each piece waits ``delay`` seconds
        cut      the connection is reset after ``after`` bytes of the answer
        cut-up   the same, of the request
        silent   connections are taken, and nothing passes
    """

    target: int  # port on 127.0.0.1
    port: int = 0
    mode: Literal["pass", "refuse", "slow", "cut", "cut-up", "silent"] = "pass"
    delay: float = 0.5
    after: int = 300
    touched: int = 0  # questions that the present mode has broken off, or pieces that it has held up
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _unanswered: set[asyncio.StreamWriter] = field(default_factory=set)  # clients that wait for an answer
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> None:
        await self._listen()

    async def stop(self) -> None:
        await self._deafen()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def set(self, mode: Literal["pass", "refuse", "slow", "cut", "cut-up", "silent"]) -> None:
        """Change what it does, for open connections too."""
        if mode != "pass":
            self.touched = 0
        self.mode = mode
        if mode == "refuse":
            await self._deafen()
        elif self._server is None:
            await self._listen()

    async def used(self, timeout: float) -> bool:
        """Wait until a question passes; False if none does.

        Refused then, it is known to be broken off. Of those who find nobody to connect to, nothing is known here.
        """
        self._asked.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), timeout)
        return self._asked.is_set()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _deafen(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.touched += len(self._unanswered)
        self._reset(list(self._open))

    def _reset(self, writers: list[asyncio.StreamWriter]) -> None:
        for writer in writers:
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):  # closed already
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            answer, there = await asyncio.open_connection("127.0.0.1", self.target)
            self._open.add(there)
            pair = (writer, there)
            up = asyncio.create_task(self._pump(reader, there, "cut-up", pair))
            down = asyncio.create_task(self._pump(answer, writer, "cut", pair))
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the other end is down, or this one is stopped
        finally:
            for end in (writer, there):
                if end is not None:
                    self._open.discard(end)
                    self._unanswered.discard(end)
                    end.close()
            self._tasks.discard(task)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        cut: str,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        passed, asks = 0, cut == "cut-up"
        while data := await reader.read(PIECE):
            if asks:
                self._unanswered.add(pair[0])
                self._asked.set()
            else:
                self._unanswered.discard(pair[0])
            self.touched += self.mode in ("silent", "slow")
            while self.mode == "silent":
                await asyncio.sleep(0.05)
            if self.mode == "slow":
                await asyncio.sleep(self.delay)
            if self.mode == cut:
                if passed + len(data) > self.after:
                    writer.write(data[: max(0, self.after - passed)])
                    with contextlib.suppress(ConnectionError):
                        await writer.drain()
                    await asyncio.sleep(0.01)
                    self.touched += 1
                    self._reset(list(pair))
                    return
                passed += len(data)
            writer.write(data)
            await writer.drain()
