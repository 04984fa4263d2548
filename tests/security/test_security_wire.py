"""Requests that lie about themselves on the wire, and requests that take for ever."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence

import httpx
import pytest

from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import iter_traces
from tests.security.house import House
from tests.security.tried import tried

pytestmark = pytest.mark.gateway

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi case:fresh"}]}).encode()
DRIPS = 40  # connections that send a byte now and then


def address(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


def exchange(url: str, data: bytes, seconds: float = 20.0) -> bytes:
    """Send ``data`` as it is; all that comes back until the other side closes or is silent."""
    with socket.create_connection(address(url), timeout=seconds) as connection:
        connection.sendall(data)
        said = b""
        try:
            while part := connection.recv(65_536):
                said += part
                if b"\r\n\r\n" in said and _whole(said):
                    break
        except TimeoutError:
            pass
        return said


def _whole(said: bytes) -> bool:
    head, _, body = said.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return body.endswith(b"0\r\n\r\n")


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/") else 0


def request(house: House, who: str, lines: Sequence[bytes], body: bytes = BODY, length: bool = True) -> bytes:
    head = [b"POST /v1/chat/completions HTTP/1.1", b"host: 127.0.0.1", b"content-type: application/json"]
    head += [f"authorization: Bearer {house.keys[who]}".encode(), *lines]
    if length:
        head.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*head, b"connection: close", b"", body])


def agents_of_new_traces(house: House, before: set[str]) -> set[str]:
    engine = open_store(house.settings.store_url)
    try:
        with engine.connect() as c:
            return {trace.agent for trace in iter_traces(c) if trace.id not in before}
    finally:
        engine.dispose()


def stored(house: House) -> set[str]:
    engine = open_store(house.settings.store_url)
    try:
        with engine.connect() as c:
            return {trace.id for trace in iter_traces(c)}
    finally:
        engine.dispose()


SMUGGLED: dict[str, list[bytes]] = {
    "plainly": [b"x-agent-id: beta"],
    "twice, ours last": [b"x-agent-id: beta", b"x-agent-id: alpha"],
    "twice, ours first": [b"x-agent-id: alpha", b"x-agent-id: beta"],
    "a list": [b"x-agent-id: alpha, beta"],
    "a list of the other": [b"x-agent-id: beta,alpha"],
    "in capitals": [b"X-AGENT-ID: beta"],
    "with underscores": [b"x_agent_id: beta"],
    "with spaces around": [b"x-agent-id: \t beta \t "],
    "folded over two lines": [b"x-agent-id: alpha\r\n beta"],
    "a space before the colon": [b"x-agent-id : beta"],
    "a NUL in the value": [b"x-agent-id: beta\x00"],
    "a lone line feed": [b"x-note: 1\nx-agent-id: beta"],
    "a lone carriage return": [b"x-note: 1\rx-agent-id: beta"],
    "in bytes that are no text": [b"x-agent-id: \xff\xfebeta"],
    "a look-alike": ["x-agent-id: b\u0435ta".encode()],
    "another key": [b"x-api-key: mc-of-another"],
    "another key twice": [b"authorization: Bearer mc-of-another"],
    "LiteLLM's own headers": [
        b"x-litellm-api-key: mc-of-another",
        b"x-litellm-customer-id: beta",
        b"x-litellm-tags: beta",
    ],
    "as the upstream's model": [b"x-litellm-model-id: beta@v1"],
    "a forwarded user": [b"x-forwarded-user: beta", b"x-forwarded-for: 10.0.0.1", b"x-real-ip: 10.0.0.1"],
    "hop by hop": [b"connection: x-agent-id", b"x-agent-id: alpha"],
    "a trailer": [b"trailer: x-agent-id"],
    "a host with a path": [b"host: evil.example/?x=/metaclaw/metrics"],
}


@pytest.mark.law(4)
@pytest.mark.parametrize("how", SMUGGLED)
def test_law_4_no_header_however_written_speaks_for_another_agent(house: House, how: str) -> None:
    before = stored(house)
    asked = len(house.upstream.requests)
    said = exchange(house.gateway, request(house, "own", SMUGGLED[how]))
    tried("headers that would speak for another agent")
    assert status_of(said) in (200, 400, 401, 403), said[:300]
    assert b"Traceback" not in said
    assert agents_of_new_traces(house, before) <= {"alpha"}
    assert not [r for r in house.upstream.requests[asked:] if "beta" in str(r.get("model"))]


SECOND = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\ncontent-length: 2\r\n\r\n{}"
FRAMINGS: dict[str, tuple[list[bytes], bytes]] = {
    "length and chunks": ([b"content-length: 4", b"transfer-encoding: chunked"], b"0\r\n\r\n" + SECOND),
    "chunks, written oddly": ([b"transfer-encoding: xchunked", b"content-length: 4"], b"0\r\n\r\n" + SECOND),
    "chunks, twice": ([b"transfer-encoding: chunked", b"transfer-encoding: identity"], b"0\r\n\r\n" + SECOND),
    "two lengths": ([b"content-length: 0", b"content-length: 60"], SECOND),
    "a list of lengths": ([b"content-length: 0, 60"], SECOND),
    "a negative length": ([b"content-length: -5"], BODY),
    "a length with a sign": ([b"content-length: +5"], BODY),
    "a length in hex": ([b"content-length: 0x20"], BODY),
    "a length without end": ([b"content-length: " + b"9" * 40], BODY),
    "a chunk without end": ([b"transfer-encoding: chunked"], b"ffffffffffffffffff\r\nx\r\n0\r\n\r\n"),
    "a chunk of no size": ([b"transfer-encoding: chunked"], b"zz\r\nx\r\n0\r\n\r\n"),
    "chunks that end early": ([b"transfer-encoding: chunked"], b'5\r\n{"a"\r\n0\r\n\r\n'),
}


@pytest.mark.parametrize("how", FRAMINGS)
@pytest.mark.parametrize("where", ["gateway", "trainer", "console"])
def test_no_framing_lets_a_second_request_ride_on_the_first(house: House, where: str, how: str) -> None:
    """The second request, hidden in the body of the first, is of a key that was never asked for: it gets no answer."""
    lines, body = FRAMINGS[how]
    url, path = {
        "gateway": (house.gateway, b"/v1/chat/completions"),
        "trainer": (house.trainer, b"/v1/samples"),
        "console": (house.console, b"/sign-in"),
    }[where]
    key = house.keys["own"] if where == "gateway" else house.trainer_keys["worker"]
    hidden = body.replace(b"KEY", house.keys["other"].encode())
    head = [b"POST " + path + b" HTTP/1.1", b"host: 127.0.0.1", b"content-type: application/json"]
    head += [b"authorization: Bearer " + key.encode(), *lines, b"", hidden]
    before = stored(house)
    said = exchange(url, b"\r\n".join(head), seconds=1.0)
    tried("framings that hide a request in another")
    assert said.count(b"HTTP/1.1 2") == 0, said[:500]
    assert b"HTTP/1.1 500" not in said
    assert agents_of_new_traces(house, before) <= {"alpha"}


@pytest.mark.parametrize("where", ["gateway", "trainer", "console"])
def test_bodies_that_drip_hold_up_nobody(house: House, where: str) -> None:
    """Connections that send a byte now and then cost a socket each; everybody else is served as before."""
    url, path = {
        "gateway": (house.gateway, "/v1/chat/completions"),
        "trainer": (house.trainer, "/v1/samples"),
        "console": (house.console, "/sign-in"),
    }[where]
    key = house.keys["own"] if where == "gateway" else house.trainer_keys["worker"]
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    )
    drips = [socket.create_connection(address(url), timeout=10) for _ in range(DRIPS)]
    stop = threading.Event()

    def drip() -> None:
        for number, one in enumerate(drips):  # half of them stay in their head, half in their body
            one.sendall(head.encode() + (b"content-length: 1000\r\n\r\n{" if number % 2 else b"x-slow: "))
        while not stop.wait(0.2):
            for one in drips:
                try:
                    one.sendall(b"a")
                except OSError:
                    continue

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        time.sleep(1.0)
        began = time.monotonic()
        for _ in range(5):
            _ask_politely(house, where)
        assert time.monotonic() - began < 15
    finally:
        stop.set()
        thread.join(10)
        for one in drips:
            one.close()
    tried("connections that drip", DRIPS)
    _ask_politely(house, where)
    assert house.dead() == []


def _ask_politely(house: House, where: str) -> None:
    if where == "gateway":
        headers = {"authorization": f"Bearer {house.keys['own']}", "content-type": "application/json"}
        answer = httpx.post(f"{house.gateway}/v1/chat/completions", content=BODY, headers=headers, timeout=30)
    elif where == "trainer":
        headers = {"authorization": f"Bearer {house.trainer_keys['worker']}"}
        answer = httpx.get(f"{house.trainer}/v1/agents", headers=headers, timeout=30)
    else:
        answer = httpx.get(f"{house.console}/healthz", timeout=30)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("declared", [True, False], ids=["its length told", "in chunks"])
@pytest.mark.parametrize("where", ["gateway", "our routes", "trainer", "console"])
def test_a_body_that_is_too_long_is_refused_before_it_is_held(house: House, where: str, declared: bool) -> None:
    """8 MB where 2, 2, 4 and half a MB are the most."""
    url = {
        "gateway": f"{house.gateway}/v1/chat/completions",
        "our routes": f"{house.gateway}/metaclaw/v1/feedback",
        "trainer": f"{house.trainer}/v1/samples",
        "console": f"{house.console}/sign-in",
    }[where]
    key = house.trainer_keys["worker"] if where == "trainer" else house.keys["own"]
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    pieces = (b"x" * 2**20 for _ in range(8))
    tried("bodies that are too long")
    try:
        answer = httpx.post(url, content=b"x" * 2**23 if declared else pieces, headers=headers, timeout=60)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # closed on us while we still sent
    assert answer.status_code == 413, answer.text[:300]
