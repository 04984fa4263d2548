"""A store that hangs, and does not fail: a real PostgreSQL that holds its connections and answers nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from metaclaw_plugin.gateway.keys import FRESH
from tests.gateway_cases import ask, request_of
from tests.gateway_server import running_gateway
from tests.postgres_server import create_database, frozen, running_postgres
from tests.replay_upstream import ReplayUpstream

pytestmark = pytest.mark.gateway

A_FEW_SECONDS = 12.0  # two waits of two seconds, on a machine that does other things too
MORE_THAN_THREADS = 24


@pytest.mark.law(5)
def test_law_5_a_store_that_hangs_keeps_no_known_key_waiting(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path: Path
) -> None:
    with (
        running_postgres() as postgres,
        running_gateway(
            tmp_path, replay.url, free_port(), store={"url": create_database(postgres, "metaclaw")}
        ) as server,
    ):

        def chat(key: str, route: str = "chat") -> tuple[httpx.Response, float]:
            started = time.monotonic()
            answer = ask(server.url, key, route, request_of(route, "text-whole", stream=False))
            return answer, time.monotonic() - started

        assert chat(server.key)[0].status_code == 200
        assert len(server.new_traces(wait=10)) == 1
        with frozen(postgres), ThreadPoolExecutor(MORE_THAN_THREADS) as clients:
            time.sleep(FRESH)
            strangers = [clients.submit(chat, f"mc-unknown-{n}") for n in range(8)]
            known = list(clients.map(chat, [server.key] * 8))
            assert [answer.status_code for answer, _ in known] == [200] * 8
            assert max(took for _, took in known) < A_FEW_SECONDS
            refused, _ = chat("mc-unknown", "messages")
            for answer, took in [*(future.result() for future in strangers), (refused, 0.0)]:
                assert (answer.status_code, took < A_FEW_SECONDS) == (503, True)
                assert answer.headers["retry-after"].isdigit()
            assert refused.json()["type"] == "error"
            assert strangers[0].result()[0].json()["error"]["type"] == "server_error"
        deadline = time.monotonic() + 30
        stored: list[str] = []
        while not stored and time.monotonic() < deadline:
            answer, _ = chat(server.key)
            assert answer.status_code == 200
            if (trace := answer.headers.get("x-metaclaw-trace-id")) is not None:
                stored.append(trace)
        more = [chat(server.key)[0] for _ in range(5)]
        stored += [answer.headers["x-metaclaw-trace-id"] for answer in more]
        assert {trace.id for trace in server.traces()} >= set(stored)
        assert chat("mc-unknown")[0].status_code == 401
