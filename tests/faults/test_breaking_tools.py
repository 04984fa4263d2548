"""What breaks things does break them, and mends them again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout, web

from metaclaw_plugin.gateway.command import METRICS_ENV
from tests.faults import points
from tests.faults.accounts import has_answered, late_of
from tests.faults.disk import Disk
from tests.faults.link import Link

BODY = b"x" * 5000
ROOT = Path(__file__).resolve().parents[2]
PASSES = """
import sys, time
from pathlib import Path
from metaclaw_plugin.gateway.command import METRICS_ENV
from tests.faults import points
from tests.faults.accounts import has_answered, late_of
import zlib
points.POINTS["here"] = ("zlib", "crc32", "after")
points.install(Path(sys.argv[1]), "worker", ("here",))
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    zlib.crc32(b"")
    print(time.time(), flush=True)
    time.sleep(0.02)
"""


async def test_a_link_refuses_cuts_slows_and_passes() -> None:
    async def said(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=BODY)

    app = web.Application()
    app.router.add_post("/", said)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    link = Link(runner.addresses[0][1])
    await link.start()

    async def ask() -> bytes:
        async with (
            ClientSession(timeout=ClientTimeout(total=2)) as http,
            http.post(f"http://127.0.0.1:{link.port}/", data=BODY) as answer,
        ):
            return await answer.read()

    assert await ask() == BODY
    for mode in ("refuse", "cut", "cut-up", "silent"):
        await link.set(mode)  # type: ignore[arg-type]
        with pytest.raises((ClientError, TimeoutError)):
            await ask()
        assert (link.touched > 0) == (mode != "refuse"), "who is refused touches nothing"
        await link.set("pass")
        assert await ask() == BODY, f"after {mode}"
    link.delay = 0.2
    await link.set("slow")
    began = time.monotonic()
    assert await ask() == BODY
    assert time.monotonic() - began >= 0.4, "the request and the answer have waited"
    assert link.touched >= 2
    await link.stop()
    await runner.cleanup()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_passes_an_armed_point_gets_the_signal(tmp_path: Path, number: signal.Signals) -> None:
    points.arm(tmp_path, "elsewhere", number)
    command = [sys.executable, "-c", PASSES, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert abs(float(process.stdout.readline()) - time.time()) < 5
    points.set_clock(tmp_path, "worker", 3600.0)
    deadline = time.monotonic() + 10
    while float(process.stdout.readline()) < time.time() + 3000:
        assert time.monotonic() < deadline, "the clock did not move"
    assert points.clock_of(tmp_path, "worker") == 3600.0
    assert process.poll() is None, "it died at a point that it never passed"
    points.arm(tmp_path, "here", number)
    assert process.wait(10) == -number
    done = points.fired(tmp_path, "here")
    assert done is not None
    assert done.pid == process.pid
    assert points.disarm(tmp_path, "elsewhere")
    assert not points.disarm(tmp_path, "here")


def test_a_full_disk_is_full_until_it_is_freed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root; without it RLIMIT_FSIZE is used")
    disk = Disk(tmp_path / "small")
    with disk.mounted():
        assert not disk.is_full
        disk.fill([])
        assert disk.is_full
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "one-more").write_bytes(bytes(10_000))
        disk.free()
        (disk.folder / "one-more").write_bytes(bytes(10_000))


def test_where_nothing_can_be_mounted_a_process_cannot_make_files_longer(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    writes = (
        "import sys; sys.stdin.readline(); open(sys.argv[1], 'wb', buffering=0).write(bytes(100_000)); print('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writes, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    disk.fill([process.pid])
    assert disk.is_full
    process.communicate(b"\n", timeout=20)
    assert (tmp_path / "file").stat().st_size < 100_000
    disk.free()


async def test_a_hung_wire_goes_on_where_it_was() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link(server.sockets[0].getsockname()[1])
    await link.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    await link.set("silent")
    writer.write(b"hello")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(5), 0.3)
    await link.set("pass")
    assert await asyncio.wait_for(reader.read(5), 2) == b"hello"
    assert link.touched == 1
    writer.close()
    await link.stop()
    server.close()


async def test_a_question_is_refused_its_answer_when_its_wire_is_refused() -> None:
    async def hear(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    link = Link(server.sockets[0].getsockname()[1])
    await link.start()
    _, idle = await asyncio.open_connection("127.0.0.1", link.port)
    assert not await link.used(0.1), "nobody asks"
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    asked = asyncio.create_task(link.used(5))
    await asyncio.sleep(0)
    writer.write(b"a question")
    assert await asked
    await link.set("refuse")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert link.touched == 1, "the idle connection is none that it has broken"
    idle.close()
    await link.stop()
    server.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_is_ended_with_its_connections_counted(number: signal.Signals) -> None:
    taking = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    taken = []
    while True:
        taken.append(server.accept())
        print("taken", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", taking], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    clients = []
    for _ in range(3):
        clients.append(socket.create_connection(("127.0.0.1", port)))
        assert process.stdout.readline() == "taken\n"
    assert points.end_frozen(process.pid, number, port) == 3
    assert process.wait(10) == -number
    assert points.end_frozen(process.pid, number, port) == 0
    process.stdout.close()
    for client in clients:
        client.close()


def test_a_gateway_worker_is_up_once_it_has_stored_an_answer(tmp_path: Path) -> None:
    counts = """
import os
from metaclaw_plugin.gateway.metrics import Metrics
metrics = Metrics()
metrics.count("commits_late", "alpha", 2)
print(os.getpid(), flush=True)
input()
metrics.committed(True, 0.1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", counts],
        env={**os.environ, METRICS_ENV: str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert late_of(tmp_path, [pid]) == 2
    assert not has_answered(tmp_path, pid)
    process.communicate(b"\n", timeout=20)
    assert has_answered(tmp_path, pid)
