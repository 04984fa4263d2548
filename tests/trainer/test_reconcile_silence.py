"""One adapter about which a vLLM never answers keeps no other away: over real sockets, with a short patience."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_trainer import reconcile
from metaclaw_trainer.proof import Prover
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.versions import Wanted
from metaclaw_trainer.vllm_client import VllmClient


class SilentVllm:
    """Answers as vLLM 0.32 does, except about the names in ``mute_load`` and ``mute_answer``: then never."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []
        self.mute_load: set[str] = set()
        self.mute_answer: set[str] = set()
        self.cut: set[str] = set()  # names on whose load the connection is closed
        self.over = threading.Event()
        vllm = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cards = [{"id": name, "root": root, "parent": "base"} for name, root in vllm.loaded.items()]
                self.say(200, {"data": [{"id": "base", "root": "/model", "parent": None}, *cards]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body.get("lora_name") or body["model"]
                word = self.path.removeprefix("/v1/").removesuffix("_lora_adapter")
                vllm.calls.append(f"{word} {name}")
                if name in (vllm.mute_answer if word == "completions" else vllm.mute_load):
                    vllm.over.wait()
                    return
                if word == "load" and name in vllm.cut:
                    self.close_connection = True
                    return
                if word == "completions":
                    self.say(200, {"model": name, "choices": [{"text": " there"}]})
                    return
                if word == "load":
                    vllm.loaded[name] = body["lora_path"]
                else:
                    del vllm.loaded[name]
                self.say(200, {})

            def say(self, status: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def vllm() -> Iterator[SilentVllm]:
    server = SilentVllm()
    yield server
    server.close()


@pytest.fixture
def wanted(tmp_path: Path) -> list[Wanted]:
    return [Wanted(name, str(tmp_path / name)) for name in ("a@v1", "b@v1", "c@v1")]


@pytest.fixture
def reconciler(vllm: SilentVllm, wanted: list[Wanted], tmp_path: Path) -> Iterator[Reconciler]:
    client = VllmClient(f"http://127.0.0.1:{vllm.server.server_port}", patience=httpx.Timeout(0.3))
    yield Reconciler([client], lambda: wanted, tmp_path, prover=Prover(lambda name: None, 0.3))
    client.close()


def test_a_load_that_hangs_keeps_no_other_away(reconciler: Reconciler, vllm: SilentVllm) -> None:
    vllm.mute_load = {"a@v1"}
    for _ in range(3):
        [state] = reconciler.once()
    assert (state.reachable, state.held) == (True, {"b@v1", "c@v1"})
    assert "did not answer /v1/load_lora_adapter in time" in state.failed["a@v1"]
    assert vllm.calls.count("load a@v1") == 1  # not in every look


def test_who_asks_waits_for_no_name_that_was_silent_a_moment_ago(reconciler: Reconciler, vllm: SilentVllm) -> None:
    vllm.mute_load = {"a@v1"}
    reconciler.once()
    started = time.monotonic()
    [state] = reconciler.once(retry_refused=True)
    assert time.monotonic() - started < 0.3
    assert state.held == {"b@v1", "c@v1"}


def test_a_look_waits_for_one_silence_and_what_failed_is_tried_last(
    reconciler: Reconciler, vllm: SilentVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "SILENT_PAUSE", 0.0)
    vllm.mute_load = {"a@v1", "b@v1"}
    for _ in range(3):
        [state] = reconciler.once()
    assert vllm.calls == ["load a@v1", "load b@v1", "load c@v1", "completions c@v1", "load a@v1"]
    assert (state.held, set(state.failed)) == ({"c@v1"}, {"a@v1", "b@v1"})


def test_what_is_proven_stays_held_when_an_earlier_name_falls_silent(
    reconciler: Reconciler, vllm: SilentVllm, wanted: list[Wanted]
) -> None:
    [first, *later] = wanted
    wanted[:] = later
    reconciler.once()
    wanted[:] = [first, *later]
    vllm.mute_answer = {"a@v1"}
    [state] = reconciler.once()
    assert state.held == {"b@v1", "c@v1"}
    assert "did not answer /v1/completions in time" in state.failed["a@v1"]
    assert vllm.loaded.keys() == {"a@v1", "b@v1", "c@v1"}


def test_a_silent_version_is_held_once_it_answers(
    reconciler: Reconciler, vllm: SilentVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "SILENT_PAUSE", 0.0)
    vllm.mute_answer = {"a@v1"}
    reconciler.once()
    vllm.mute_answer = set()
    [state] = reconciler.once()
    assert (state.held, state.failed) == ({"a@v1", "b@v1", "c@v1"}, {})
    assert vllm.calls.count("load a@v1") == 1


def test_a_connection_that_is_cut_ends_one_look_and_not_the_next(reconciler: Reconciler, vllm: SilentVllm) -> None:
    vllm.cut = {"a@v1"}
    [state] = reconciler.once()
    assert (state.reachable, state.held) == (False, set())
    [state] = reconciler.once()
    assert (state.reachable, state.held) == (True, {"b@v1", "c@v1"})
    assert "cannot be reached" in state.failed["a@v1"]
