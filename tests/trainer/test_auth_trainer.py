"""Keys of the trainer: who gets in, and from where."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaclaw_trainer.auth import KeyRing, host_of, is_loopback, refuse_open_bind
from metaclaw_trainer.errors import KeyFileError

from tests.trainer.engine_parts import tiny_settings
from tests.trainer_server import TrainerServer, serving


@pytest.fixture(scope="module")
def trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerServer]:
    with serving(tiny_settings(tiny_model, tmp_path_factory.mktemp("home"), vllm_urls=[])) as server:
        yield server


@pytest.fixture
def no_keys(trainer: TrainerServer) -> None:
    trainer.services.keys.path.unlink(missing_ok=True)


def test_a_secret_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    key, secret = ring.add("worker")
    assert secret.startswith("mct-")
    assert secret not in ring.path.read_text()
    assert ring.path.stat().st_mode & 0o777 == 0o600
    assert KeyRing(ring.path).find(secret) == key
    assert ring.find(secret + "x") is None
    assert ring.find("") is None


def test_a_revoked_key_opens_nothing_and_keys_are_needed_still(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    key, secret = ring.add("worker")
    other = KeyRing(ring.path)
    assert other.find(secret)
    ring.revoke(key.id)
    assert other.find(secret) is None, "seen by a ring that had read the file before"
    assert other.needed
    with pytest.raises(KeyFileError, match="no key 'nope'"):
        ring.revoke("nope")


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    threads = [threading.Thread(target=ring.add, args=(f"k{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ring.entries()) == 8


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"keys": [{"id": 1}]}', "\x00"])
def test_a_damaged_key_file_shuts_the_door(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeyFileError, match="no file of keys"):
        KeyRing(path).find("mct-x")


@given(st.text())
def test_any_text_can_be_presented_as_a_key(text: str) -> None:
    ring = KeyRing(Path(os.devnull).parent / "metaclaw-no-such-file")
    assert ring.find(text) is None


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.9.9.9", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_only_loopback_is_open_without_a_key(tmp_path: Path, host: str, local: bool) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    assert is_loopback(host) is local
    if local:
        refuse_open_bind(host, ring)
    else:
        with pytest.raises(KeyFileError, match="--new-key"):
            refuse_open_bind(host, ring)
        ring.add("worker")
        refuse_open_bind(host, ring)


def test_the_port_is_no_part_of_the_host() -> None:
    assert [host_of(h) for h in ("a:1", "a", "[::1]:4", "::1", "")] == ["a", "a", "[::1]", "::1", ""]


@pytest.mark.usefixtures("no_keys")
def test_without_keys_loopback_may_do_all_and_no_web_page_may(trainer: TrainerServer) -> None:
    assert trainer.http.get("/v1/agents").status_code == 200
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}):
        response = trainer.http.get("/v1/agents", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "loopback_only")
    assert trainer.http.get("/v1/agents", headers={"origin": "http://localhost:4020"}).status_code == 200


@pytest.mark.usefixtures("no_keys")
def test_with_a_key_everything_but_health_wants_it(trainer: TrainerServer) -> None:
    _, secret = trainer.services.keys.add("worker")
    for path in ("/v1/agents", "/v1/versions", "/metrics", "/openapi.json", "/v1/nowhere"):
        response = trainer.http.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "missing_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert trainer.http.get("/v1/health").status_code == 200
    with_key = {"authorization": f"Bearer {secret}"}
    assert trainer.http.get("/v1/agents", headers=with_key).status_code == 200
    assert trainer.http.get("/v1/agents", headers={"authorization": f"bearer  {secret}"}).status_code == 200
    for wrong in (f"Bearer {secret}x", f"Basic {secret}", "Bearer", secret, "Bearer \xff"):
        refused = trainer.http.get("/v1/agents", headers={"authorization": wrong.encode("latin-1")})
        assert refused.status_code == 401


@pytest.mark.usefixtures("no_keys")
def test_a_key_that_is_wrong_is_refused_before_its_body_is_read(trainer: TrainerServer) -> None:
    trainer.services.keys.add("worker")
    response = trainer.http.post("/v1/samples", content=b"{", headers={"authorization": "Bearer mct-wrong"})
    assert response.status_code == 401


def _run(*arguments: str, config: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "config.yaml"
    file.write_text(config)
    command = [sys.executable, "-m", "metaclaw_trainer", "--config", str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_keys_are_made_listed_and_revoked_from_the_command_line(tmp_path: Path) -> None:
    config = f"metaclaw: {{home: {tmp_path}}}"
    made = _run("--new-key", "worker", config=config, tmp_path=tmp_path)
    ring = KeyRing(tmp_path / "trainer" / "keys.json")
    [key] = ring.entries()
    assert ring.find(made.stdout.strip()) == key
    listed = _run("--keys", config=config, tmp_path=tmp_path).stdout
    assert key.id in listed
    assert made.stdout.strip() not in listed
    assert _run("--revoke-key", key.id, config=config, tmp_path=tmp_path).returncode == 0
    assert "revoked" in _run("--keys", config=config, tmp_path=tmp_path).stdout


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ("metaclaw: {home: HOME, trainer: {batch_sise: 2}}", (), "did you mean batch_size?"),
        ("metaclaw: {home: HOME, trainer: {rank: many}}", (), "metaclaw.trainer.rank"),
        ("metaclaw: [", (), "not valid YAML"),
        ("metaclaw: {home: HOME}", ("--host", "0.0.0.0", "--port", "0"), "refusing to listen on 0.0.0.0"),
        ("metaclaw: {home: HOME}", ("--host", "::1%nowhere", "--port", "0"), "cannot listen on"),
        ("metaclaw: {home: HOME, trainer: {store: 'sqlite:////proc/x/y.db'}}", ("--port", "0"), "cannot open"),
        ("metaclaw: {home: HOME, base_model: HOME}", ("--port", "0"), "cannot load the base model"),
        ("metaclaw: {home: HOME}", ("--port", "0"), "no base model"),
    ],
)
def test_what_stops_the_trainer_from_starting_is_one_line(
    tmp_path: Path, config: str, arguments: tuple[str, ...], words: str
) -> None:
    ended = _run(*arguments, config=config.replace("HOME", str(tmp_path)), tmp_path=tmp_path)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("metaclaw trainer: ")]
    assert ended.returncode == 1
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        ended = _run("--port", port, config=f"metaclaw: {{home: {tmp_path}}}", tmp_path=tmp_path)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}: Address already in use" in ended.stderr


def test_a_client_from_elsewhere_is_refused_without_a_key(tmp_path: Path) -> None:
    from metaclaw_trainer.api.gate import Gate

    async def inner(*_: object) -> None:
        raise AssertionError("the gate let it in")

    gate = Gate(inner, KeyRing(tmp_path / "keys.json"), 1000)
    transport = httpx.ASGITransport(gate, client=("10.0.0.9", 5))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/v1/agents")

    import asyncio

    assert asyncio.run(ask()).status_code == 403
