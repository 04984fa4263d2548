"""Law 3 under ``kill -9``: what a client received whole is in the store, once; and with two workers."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from metaclaw_plugin.gateway.identity import internal_key
from tests.gateway_cases import ROUTES, request_of
from tests.gateway_server import kill, running_gateway, start_gateway
from tests.postgres_server import create_database, running_postgres
from tests.replay_upstream import ReplayUpstream, Script

pytestmark = [pytest.mark.gateway, pytest.mark.law(3)]

KILLS = int(os.environ.get("METACLAW_TEST_KILLS", "2"))  # 50 take a quarter of an hour
HELD = 5  # streams that are open when it is told to stop; fewer than the upstream has threads
BEGUN = 3  # pieces of each that it has had by then
SEED = int(os.environ.get("METACLAW_TEST_SEED", "20261122"))
_ENDS = {"chat": b"data: [DONE]", "messages": b'"message_stop"', "responses": b"data: [DONE]"}


class Talkers:
    """Clients that talk until they are told to stop, and remember which trace ids they received whole answers for."""

    def __init__(self, url: str, key: str, number: int) -> None:
        self.whole: list[str] = []
        self.broken = 0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._talk, args=(url, key, list(ROUTES)[place % 3], place % 2 == 0), daemon=True)
            for place in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def _talk(self, url: str, key: str, route: str, stream: bool) -> None:
        headers = {"authorization": f"Bearer {key}"}
        body = request_of(route, f"fresh-{'stream' if stream else 'whole'}", stream)
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                try:
                    response = client.post(url + ROUTES[route], json=body, headers=headers)
                except httpx.HTTPError:
                    self.broken += 1
                    time.sleep(0.05)
                    continue
                if response.status_code == 200 and (not stream or _ENDS[route] in response.content):
                    self.whole.append(response.headers["x-metaclaw-trace-id"])

    def wait_for_one(self) -> None:
        deadline = time.monotonic() + 60
        while not self.whole and time.monotonic() < deadline:
            time.sleep(0.02)

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def fresh_scripts(replay: ReplayUpstream) -> None:
    for kind in ("whole", "stream"):
        replay.scripts[f"fresh-{kind}"] = Script.recorded(f"text-{kind}", fresh_ids=True, delay=0.01)


def stored_ids(database: Path) -> Counter[str]:
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return Counter(row[0] for row in connection.execute("SELECT id FROM traces"))


def test_killed_at_random_moments_it_loses_nothing_that_a_client_received(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path: Path
) -> None:
    fresh_scripts(replay)
    chance = random.Random(SEED)
    whole: list[str] = []
    with running_gateway(tmp_path, replay.url, free_port(), skills={"max_skills": 0}) as server:
        database = server.settings.home / "metaclaw.db"
        for number in range(KILLS):
            talkers = Talkers(server.url, server.key, 6)
            talkers.wait_for_one()  # a busy machine takes its time over the first
            time.sleep(chance.uniform(0.0, 2.0))
            kill(server.process)
            talkers.finish()
            assert talkers.whole, f"no answer before kill {number}"
            whole += talkers.whole
            stored = stored_ids(database)
            assert [trace for trace in whole if stored[trace] != 1] == []
            server.process = start_gateway(tmp_path, tmp_path / "config.yaml", server.settings)
    assert len(whole) == len(set(whole))
    print(f"{KILLS} kills, {len(whole)} answers received whole, all stored once")


def test_told_to_stop_it_finishes_what_it_has_begun(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path: Path
) -> None:
    """Streams that are open when the signal comes, and go on for a while, are received to their ends, and stored."""
    go_on = threading.Event()

    def step(piece: int) -> None:
        if piece >= BEGUN:
            go_on.wait(60)

    replay.scripts["held-stream"] = Script.recorded("text-stream", fresh_ids=True, step=step)
    with running_gateway(tmp_path, replay.url, free_port()) as server, ThreadPoolExecutor(HELD) as threads:
        opened = threading.Barrier(HELD + 1)
        answers = [
            threads.submit(open_stream, server.url, server.key, list(ROUTES)[place % 3], opened)
            for place in range(HELD)
        ]
        opened.wait(60)  # each has had the first bytes of its answer
        os.kill(server.process.pid, signal.SIGTERM)
        wait_until_refused(server.url)
        assert server.process.poll() is None, "it ended while answers were open"
        go_on.set()
        whole = [answer.result(60) for answer in answers]
        server.process.wait(30)
    stored = stored_ids(server.settings.home / "metaclaw.db")
    assert len(set(whole)) == HELD
    assert [trace for trace in whole if stored[trace] != 1] == []


def open_stream(url: str, key: str, route: str, opened: threading.Barrier) -> str:
    """Read a stream to its end, telling ``opened`` when it has begun; the id of its trace.

    Raises:
        httpx.HTTPError: if it is cut off.
    """
    body, headers = request_of(route, "held-stream", True), {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", url + ROUTES[route], json=body, headers=headers) as answer,
    ):
        pieces = answer.iter_raw()
        received = next(pieces)
        opened.wait(60)
        received += b"".join(pieces)
        assert answer.status_code == 200
        assert _ENDS[route] in received
        return str(answer.headers["x-metaclaw-trace-id"])


def wait_until_refused(url: str) -> None:
    """Until nobody listens: it has heard that it shall stop."""
    deadline = time.monotonic() + 30
    with httpx.Client(timeout=5) as client:
        while time.monotonic() < deadline:
            try:
                client.get(f"{url}/health/liveliness")
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                return
            time.sleep(0.05)
    raise AssertionError("it takes connections 30 s after SIGTERM")


def test_two_workers_share_one_postgresql_and_one_count(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path: Path
) -> None:
    fresh_scripts(replay)
    with (
        running_postgres() as postgres,
        running_gateway(
            tmp_path,
            replay.url,
            free_port(),
            gateway={"workers": 2},
            store={"url": create_database(postgres, "metaclaw")},
        ) as server,
    ):
        talkers = Talkers(server.url, server.key, 8)
        time.sleep(4)
        talkers.finish()
        stored = Counter(trace.id for trace in server.traces())
        assert len(talkers.whole) > 20
        assert talkers.broken == 0
        assert [trace for trace in talkers.whole if stored[trace] != 1] == []
        internal = internal_key(server.settings.home)
        page = httpx.get(f"{server.url}/metaclaw/metrics", headers={"authorization": f"Bearer {internal}"}).text
        counted = re.search(r'metaclaw_commit_seconds_count\{stored="yes"\} ([0-9.]+)', page)
        assert counted is not None
        assert float(counted[1]) == sum(stored.values())
        conversation(server.url, server.key)


def conversation(url: str, key: str) -> None:
    """Turns of one conversation find their session, whichever worker they meet."""
    sessions = set()
    messages = [{"role": "user", "content": "Two workers, one talk. case:text-whole"}]
    for _ in range(6):
        with httpx.Client(timeout=30, headers={"authorization": f"Bearer {key}"}) as client:  # a connection of its own
            answer = client.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": messages})
            trace = answer.headers["x-metaclaw-trace-id"]
            sessions.add(client.get(f"{url}/metaclaw/v1/traces/{trace}").json()["session"])
        messages.append(answer.json()["choices"][0]["message"] | {"provider_specific_fields": None})
        messages.append({"role": "user", "content": "Go on. case:text-whole"})
    assert len(sessions) == 1
