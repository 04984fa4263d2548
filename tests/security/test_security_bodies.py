"""Bodies that never end: without a key nothing of them is kept, with one a little while alone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.gateway_server import GatewayServer, running_gateway
from tests.replay_upstream import ReplayUpstream
from tests.security.tried import tried

pytestmark = pytest.mark.gateway

MAX_BODY, ROOM = 2_000_000, 5_000_000  # bytes
SECONDS = 3.0  # that a body may take
CONNECTIONS = 80  # that send most of a body, without a key
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/metaclaw/v1/feedback")
SMALL = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi case:text-whole"}]}


@pytest.fixture(scope="module")
def narrow(free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    limits = {"max_body_bytes": MAX_BODY, "max_arriving_bytes": ROOM, "body_timeout": SECONDS}
    with (
        ReplayUpstream() as upstream,
        running_gateway(tmp_path_factory.mktemp("narrow"), upstream.url, free_port(), gateway=limits) as server,
    ):
        yield server


def half(stack: ExitStack, server: GatewayServer, path: str, key: str | None, sent: int) -> socket.socket:
    """A connection that declares a body of ``MAX_BODY`` bytes, sends so many, and stops."""
    head = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", f"content-length: {MAX_BODY}"]
    head += [f"authorization: Bearer {key}"] if key else []
    port = int(server.url.rpartition(":")[2])
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
    connection.sendall("\r\n".join([*head, "", ""]).encode() + b"{" + b" " * (sent - 1))
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    said = b""
    while b"\r\n\r\n" not in said:
        said += connection.recv(65_536) or pytest.fail(f"closed after {said!r}")
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65_536)
    return int(lines[0].split(" ")[1]), headers, json.loads(body)


@pytest.mark.parametrize("key", [None, "mc-never-made"])
@pytest.mark.parametrize("path", PATHS)
def test_without_a_key_the_answer_is_that_to_a_whole_body_and_comes_before_its_end(
    narrow: GatewayServer, path: str, key: str | None
) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    whole = httpx.post(narrow.url + path, json=SMALL, headers=headers, timeout=30)
    with ExitStack() as stack:
        status, told, body = answer_of(half(stack, narrow, path, key, MAX_BODY // 2))
    tried("bodies that never end")
    assert (status, body) == (whole.status_code, whole.json())
    assert status == 401
    assert sorted(told) == sorted(whole.headers)


def test_a_form_without_a_key_is_refused_like_any_other_body(narrow: GatewayServer) -> None:
    files = {"file": ("a.wav", b"x" * 1_000_000, "audio/wav")}
    answer = httpx.post(f"{narrow.url}/v1/audio/transcriptions", files=files, data={"model": "m"}, timeout=30)
    assert answer.status_code == 401, answer.text


def test_bodies_without_a_key_take_no_memory(narrow: GatewayServer) -> None:
    gateway = psutil.Process(narrow.process.pid)
    with ExitStack() as stack:
        half(stack, narrow, PATHS[0], None, MAX_BODY - 10)
        time.sleep(0.5)
        before = gateway.memory_info().rss
        held = [half(stack, narrow, PATHS[n % 4], None, MAX_BODY - 10) for n in range(CONNECTIONS)]
        assert {answer_of(one)[0] for one in held} == {401}
        grown = gateway.memory_info().rss - before
    tried("bodies that never end", CONNECTIONS)
    assert grown < CONNECTIONS * MAX_BODY / 4, f"{grown:,} bytes"


def test_a_public_page_takes_a_form_and_no_more_from_a_stranger(narrow: GatewayServer) -> None:
    answer = httpx.post(f"{narrow.url}/login", content=b"x" * 1_500_000, timeout=30)
    assert (answer.status_code, "came without a key" in answer.text) == (413, True)


@pytest.mark.parametrize("path", PATHS[:3])
def test_a_body_that_drips_is_ended_in_the_callers_dialect(narrow: GatewayServer, path: str) -> None:
    with ExitStack() as stack:
        began = time.monotonic()
        connection = half(stack, narrow, path, narrow.key, 1000)
        connection.settimeout(0.1)
        said = b""
        while not said:
            assert time.monotonic() - began < 10 * SECONDS
            connection.sendall(b" ")
            try:
                said = connection.recv(65_536)
            except TimeoutError:
                continue
        took = time.monotonic() - began
        connection.settimeout(10)
        while True:  # and then the connection is closed, so that it costs no socket either
            try:
                more = connection.recv(65_536)
            except ConnectionResetError:
                break
            if not more:
                break
            said += more
    tried("bodies that never end")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in said
    assert (b'"type": "error"' in said) == (path == "/v1/messages")
    assert SECONDS - 0.1 < took < 3 * SECONDS


def test_bodies_with_a_key_hold_so_much_together_and_small_requests_go_on(narrow: GatewayServer) -> None:
    headers = {"authorization": f"Bearer {narrow.key}"}
    big = json.dumps(SMALL | {"padding": "x" * 1_000_000}).encode()
    with ExitStack() as stack:
        held = [half(stack, narrow, "/v1/messages", narrow.key, MAX_BODY - 10) for _ in range(3)]
        assert httpx.post(narrow.url + PATHS[0], json=SMALL, headers=headers, timeout=30).status_code == 200
        answers = sorted((answer_of(one) for one in held), key=lambda answer: answer[0])
    assert [status for status, _, _ in answers] == [408, 408, 503]
    _, told, body = answers[-1]
    assert (told["retry-after"], body["error"]["type"]) == ("5", "overloaded_error")
    tried("bodies that never end", 3)
    assert httpx.post(narrow.url + PATHS[0], content=big, headers=headers, timeout=30).status_code == 200
