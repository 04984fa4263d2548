"""The soak asks on a schedule, finds the rate that holds, and says when something grew, failed or was lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks import soak, soak_search
from benchmarks.soak_load import TURNS, AtOnce, OpenLoop, Reply, Target
from benchmarks.soak_report import BARE, Bounds, failures, show
from benchmarks.soak_search import judged, search
from benchmarks.soak_watch import Row, latency, slopes

BOUNDS = Bounds(queue=100.0, memory=50.0)


class Server:
    """Answers after ``wait`` seconds, and remembers when it was asked what."""

    def __init__(self, wait: float) -> None:
        self.wait = wait
        self.asked: list[tuple[float, dict[str, Any]]] = []
        self.sessions: list[str] = []
        self.most = self._busy = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append((time.monotonic(), body))
        self.sessions.append(request.headers["x-session-id"])
        self._busy += 1
        self.most = max(self.most, self._busy)
        try:
            return await self._answer(request, body["stream"])
        finally:
            self._busy -= 1

    async def _answer(self, request: web.Request, stream: bool) -> web.StreamResponse:
        if not stream:
            await asyncio.sleep(self.wait)
            choice = {"message": {"content": "said"}}
            return web.json_response({"choices": [choice]}, headers={"x-metaclaw-trace-id": "t"})
        response = web.StreamResponse(headers={"x-metaclaw-trace-id": "t"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"content":"sa"}}]}\n\n')
        await asyncio.sleep(self.wait)
        await response.write(b'data: {"choices":[{"delta":{"content":"id"}}]}\n\ndata: [DONE]\n\n')
        return response


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[Target]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield Target(f"http://127.0.0.1:{port}", {"alpha": "a", "beta": "b"})
    finally:
        await runner.cleanup()


async def let(load: OpenLoop | AtOnce, seconds: float) -> None:
    task = asyncio.create_task(load.run())
    await asyncio.sleep(seconds)
    load.stop()
    await task


@pytest.mark.parametrize("wait", [0.0, 0.6])
async def test_requests_begin_on_schedule_however_long_answers_take(wait: float) -> None:
    server = Server(wait)
    async with served(server) as target:
        load = OpenLoop(target, rate=40.0, name="n")
        await let(load, 1.5)
    assert 50 <= len(load.replies) <= 62  # 60 are due
    assert all(one.whole and one.trace == "t" and one.text == "said" for one in load.replies)
    assert load.skipped == 0
    assert latency(load.replies)["first"]["p50"] < 0.3  # of streams alone: their first bytes do not wait
    assert min(one.ended - one.due for one in load.replies) >= wait


async def test_no_more_than_the_limit_are_under_way_and_what_was_not_begun_is_counted() -> None:
    server = Server(0.5)
    async with served(server) as target:
        load = OpenLoop(target, rate=40.0, name="n", limit=4)
        await let(load, 1.5)
    assert server.most == 4
    assert load.skipped > 30
    assert 55 <= load.skipped + len(load.replies) <= 62


async def test_a_conversation_goes_on_for_its_turns_with_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak_load.THINK", 0.05)
    server = Server(0.0)
    async with served(server) as target:
        load = OpenLoop(target, rate=40.0, name="n")
        await let(load, 1.0)
    turns = {session: server.sessions.count(session) for session in server.sessions}
    assert max(turns.values()) == TURNS == 2
    later = [body["messages"] for _, body in server.asked if len(body["messages"]) > 1]
    assert later
    assert all([m["role"] for m in one] == ["user", "assistant", "user"] for one in later)
    assert all(one[1]["content"] == "said" for one in later)


async def test_so_many_streams_are_open_at_once() -> None:
    server = Server(0.2)
    async with served(server) as target:
        load = AtOnce(target, count=12, name="n", ramp=0.1)
        await let(load, 0.9)
    assert server.most == 12
    assert 36 <= len(load.replies) <= 60
    assert all(one.whole for one in load.replies)
    assert max(one.first - one.due for one in load.replies) < 0.19 < min(one.ended - one.due for one in load.replies)


async def test_what_is_refused_or_unreadable_is_a_failed_request() -> None:
    server = Server(0.0)
    async with served(server) as target:
        gone = OpenLoop(Target(target.url + "/nowhere", target.keys), rate=20.0, name="n")
        await let(gone, 0.3)
        server._answer = lambda request, stream: asyncio.sleep(0, web.Response(text="no json"))  # type: ignore[method-assign]
        odd = OpenLoop(target, rate=20.0, name="n")
        await let(odd, 0.3)
    assert {one.error[:3] for one in gone.replies} == {"404"}
    assert not any(one.whole for one in odd.replies)


def rows_of(count: int, *, untrained: float = 0.0, trainer: float = 0.0, every: float = 2.0) -> list[Row]:
    """Rows of a steady run, but for what grows a second."""
    return [
        {
            "at": i * every,
            "seconds": every,
            "open": 5 + i % 3,
            "requests": 20,
            "failed": 0,
            "skipped": 0,
            "late": 0,
            "first": {"p50": 0.1, "p95": 0.2, "p99": 0.2, "max": 0.3},
            "took": {"p50": 0.2, "p95": 0.3, "p99": 0.3, "max": 0.4},
            "pids": {"trainer": 7},
            "memory": {"trainer": 400.0 + trainer * i * every, "this program": 100.0 * i},
            "cores": {"trainer": 0.9},
            "waits": {"unscored": i % 4, "unforwarded": 40 - i % 5, "untrained": 20 + i % 3 + untrained * i * every},
            "versions": i,
            "sizes": {"store": 1.0},
        }
        for i in range(1, count + 1)
    ]


def replied(count: int, seconds: float, whole: bool = True) -> list[Reply]:
    return [
        Reply(0.0, True, first=0.01, ended=seconds, whole=whole, trace="t", error="" if whole else "503: no")
        for _ in range(count)
    ]


def phase(rows: list[Row], replies: list[Reply], rate: float = 20.0, skipped: int = 0) -> list[str]:
    load = OpenLoop(Target("", {}), rate, "n", replies=replies, skipped=skipped)
    return judged(rows, load, 60.0, slow=2.0)["trouble"]


def test_a_phase_is_held_unless_a_queue_grows_or_answers_come_late() -> None:
    fine = replied(100, 0.3)
    assert phase(rows_of(30), fine) == []
    (line,) = phase(rows_of(30, untrained=1.0), fine)
    assert line == "untrained grew by 0.99/s"
    assert (
        phase(rows_of(30, untrained=0.2), fine) == []
    )  # a hundredth of the rate, and fewer than come and go by themselves
    assert phase(rows_of(30), replied(100, 3.0)) == ["p95 was 3.00 s (more than 2 s)"]
    assert phase(rows_of(30), [*fine, *replied(2, 0.1, whole=False)]) == ["2 requests failed"]
    assert phase(rows_of(30), fine, skipped=3) == ["3 requests could not be begun, 256 were under way"]


@pytest.fixture
def playing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A system that trains 20 requests a second; the list has the rates that were tried."""
    tried: list[float] = []

    class Played:
        def __init__(self, stage: object, load: OpenLoop) -> None:
            self.load = load

        async def rows(self, *_: object, shown: bool) -> list[Row]:
            tried.append(self.load.rate)
            self.load.replies = replied(10, 0.2)
            return rows_of(30, untrained=max(0.0, self.load.rate - 20.0))

    async def idle(*_: object) -> float:
        return 1.0

    monkeypatch.setattr(soak_search, "Watch", Played)
    monkeypatch.setattr(soak_search, "until_idle", idle)
    return tried


def make(rate: float, name: str) -> OpenLoop:
    return OpenLoop(Target("", {}), rate, name)


async def test_the_search_takes_the_last_rate_that_held_and_says_what_limits(playing: list[float]) -> None:
    found = await search(None, make, 10.0, 60.0, 2.0, asyncio.Event())
    assert found.held == pytest.approx(10.0 * 1.15**5)  # 20.1: it grows by 0.1/s, which a phase does not see
    assert found.held * 0.95 < 20.0 < playing[-1]
    assert playing[-1] == playing[-2]  # tried again, so that chance ends no search
    assert "untrained grew by" in found.limit
    assert "trainer 0.90" in found.limit


async def test_a_first_rate_that_is_not_held_is_said(playing: list[float]) -> None:
    found = await search(None, make, 40.0, 60.0, 2.0, asyncio.Event())
    assert found.held is None
    assert failures({"limit": found.limit}, BOUNDS) == [f"no load was held for long: {found.limit}"]


def run_of(rows: list[Row], **more: Any) -> dict[str, Any]:
    found = {"machine": "m", "gateway_processes": 2, "rows": rows, "slopes": slopes(rows), "errors": {}, "skipped": 0,
             "late": 0, "not_stored": 0, "without_trace": 0, "counted": {"traces_stored": 5}, "idle_after": 1.0,
             "all": {"requests": 600, "failed": 0, "first": {}, "took": {}}}  # fmt: skip
    return found | more


def test_a_run_that_stood_it_has_no_failures_and_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_of(rows_of(30, every=10.0), held=17.5, limit="20.1 requests/s, not held: untrained grew by 0.5/s")
    assert failures(found, BOUNDS) == []
    show(found)
    said = capsys.readouterr().out
    assert "highest rate that was held: 17.5 requests/s; against the next: 20.1" in said
    assert said.count("\n| ") == 16  # the heads and 15 stretches
    assert "queues_per_second" in said


def test_the_exit_status_says_whether_it_stood_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "soak.json"
    for more, code in (({}, 0), ({"not_stored": 2}, 1)):

        async def done(_: object, found: dict[str, Any] = run_of(rows_of(9), **more)) -> dict[str, Any]:
            return found

        monkeypatch.setattr(soak, "soak", done)
        assert soak.main(["--json", str(target)]) == code
        assert len(json.loads(target.read_text())["failures"]) == code
        assert ("FAILED: 2 traces were lost" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (run_of(rows_of(30, every=10.0, untrained=1.0)), "untrained grew by 290 (1.00/s), more than 100"),
        (
            run_of(rows_of(30, every=10.0, trainer=0.5)),
            "the memory of trainer grew by 145 MiB (30.00 a minute), more than 50",
        ),
        (run_of(rows_of(9), not_stored=2), "2 traces were lost"),
        (run_of(rows_of(9), without_trace=3), "3 answers came without the id of a trace"),
        (run_of(rows_of(9), counted={"traces_lost": 1}), "the gateway counts 1 traces_lost"),
        (run_of(rows_of(9), skipped=4), "4 requests were not begun"),
        (run_of(rows_of(9), idle_after=None), "what waited was not scored"),
        (run_of([*rows_of(9), rows_of(1)[0] | {"pids": {"trainer": 8}}]), "trainer was started again"),
        (
            run_of(rows_of(9), all={"requests": 9, "failed": 1}, errors={"503: no": 1}),
            "1 of 9 requests failed: {'503: no': 1}",
        ),
        (run_of(rows_of(9), all={"requests": 0, "failed": 0}), "no request was answered"),
        (run_of(rows_of(9), sides={BARE: {"failed": 1, "errors": {"x": 1}}}), "1 streams of the upstream alone failed"),
    ],
)
def test_each_reason_why_a_run_failed_is_a_line_of_its_own(found: dict[str, Any], said: str) -> None:
    (line,) = failures(found, BOUNDS)
    assert line.startswith(said)
