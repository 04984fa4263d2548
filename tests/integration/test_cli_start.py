"""`metaclaw start` with the real gateway and the real worker in front of a model elsewhere, and what may go wrong."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

METACLAW = (sys.executable, "-m", "metaclaw_plugin.cli.main")
pytestmark = pytest.mark.gateway


@dataclass
class House:
    """A home of its own, and commands run for it."""

    home: Path
    port: int
    env: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*METACLAW, *arguments], capture_output=True, text=True, timeout=240, check=False, env=self.environment()
        )

    def environment(self) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if key != "METACLAW_CONFIG"}
        return {**env, "METACLAW_HOME": str(self.home), "UPSTREAM_KEY": "sk-theirs", **self.env}

    def ours(self) -> list[psutil.Process]:
        """All processes that run for this home, whoever started them."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("METACLAW_HOME") == str(self.home) and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_until_empty(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while self.ours():
            assert time.monotonic() < deadline, [process.cmdline() for process in self.ours()]
            time.sleep(0.2)


@pytest.fixture
def upstream() -> Iterator[str]:
    """A model on the internet, as far as the gateway can tell."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "gpt",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "Good day."}, "finish_reason": "stop"}
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
            }
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def free_ports() -> int:
    """A port for the gateway, below those that the system hands out; the console's, 20 further, is free as well."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as gateway, socket.socket() as console, contextlib.suppress(OSError):
            gateway.bind(("127.0.0.1", port))
            console.bind(("127.0.0.1", port + 20))
            return port


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "home", free_ports())
    yield house
    house.command("stop")
    for process in house.ours():
        process.kill()


@pytest.fixture
def key(house: House, upstream: str) -> str:
    """Set up for skills only, in front of the upstream; the key of the agent ``plain``."""
    options = ("--kind", "skills", "--upstream", "openai/gpt", "--upstream-base", upstream)
    more = ("--upstream-key-variable", "UPSTREAM_KEY", "--agent", "plain", "--port", str(house.port), "--json")
    done = house.command("setup", *options, *more)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["agents"]["plain"])


def ask(house: House, key: str) -> httpx.Response:
    body = {"model": "metaclaw/plain", "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{house.port}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)


def status(house: House) -> dict[str, Any]:
    done = house.command("status", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_from_setup_to_an_answer_to_stop(house: House, key: str) -> None:
    started = house.command("start", "--detach")
    assert started.returncode == 0, started.stderr
    assert f"http://127.0.0.1:{house.port}/v1" in started.stdout
    console = f"http://127.0.0.1:{house.port + 20}"
    assert f"Console: {console}." in started.stdout
    secret = house.command("console", "--key").stdout.strip()
    signed_in = httpx.post(f"{console}/sign-in", data={"key": secret}, trust_env=False)
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")

    again = house.command("start")
    assert again.returncode == 1
    assert "already runs" in again.stderr
    assert len(again.stderr.splitlines()) == 1

    reply = ask(house, key)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "Good day."
    assert ask(house, "mc-of-nobody").status_code == 401

    found = status(house)
    assert {process["name"]: process["state"] for process in found["processes"]} == {
        "gateway": "ready",
        "worker": "ready",
        "console": "ready",
    }
    assert [(agent["name"], agent["why"]) for agent in found["agents"]] == [
        ("plain", "mode skills_only: learns skills, not weights")
    ]
    assert "the worker runs" in house.command("logs", "worker").stdout

    assert house.command("stop").returncode == 0
    assert house.ours() == []
    assert status(house)["running"] is False


def test_a_gateway_that_is_killed_comes_back_and_kill_9_of_all_that_watches_leaves_nothing(
    house: House, key: str
) -> None:
    assert house.command("start", "--detach").returncode == 0
    proxy = next(process for process in house.ours() if "litellm.proxy.proxy_cli" in " ".join(process.cmdline()))
    proxy.kill()
    deadline = time.monotonic() + 120
    while True:
        gateway = next(process for process in status(house)["processes"] if process["name"] == "gateway")
        if gateway["restarts"] == 1 and gateway["state"] == "ready":
            break
        assert time.monotonic() < deadline, gateway
        time.sleep(0.5)
    assert ask(house, key).status_code == 200

    state = json.loads((house.home / "run" / "supervisor.json").read_text())
    os.kill(state["pid"], signal.SIGKILL)
    house.wait_until_empty()
    assert house.command("start", "--detach").returncode == 0
    assert ask(house, key).status_code == 200


def test_ctrl_c_while_it_starts_ends_all_and_the_next_start_works(house: House, key: str) -> None:
    process = subprocess.Popen(
        [*METACLAW, "start"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=house.environment()
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "gateway starting" in line:
            break
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    house.wait_until_empty(10)
    assert house.command("start", "--detach").returncode == 0


def test_a_taken_port_is_one_line_and_nothing_runs(house: House, key: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", house.port))
        holder.listen()
        for options in ((), ("--detach",)):
            done = house.command("start", *options)
            assert done.returncode == 1
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"metaclaw: port {house.port} of the gateway is taken by process {os.getpid()}")
            assert "change metaclaw.gateway.port" in last
            assert "Traceback" not in done.stderr
            house.wait_until_empty(10)
        alone = house.command("gateway")
        assert alone.returncode == 1
        assert f"port {house.port} of the gateway is taken" in alone.stderr
        assert len(alone.stderr.splitlines()) == 1


def test_a_model_that_is_none_is_said_before_anything_is_started(house: House, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = house.command("setup", "--yes", "--kind", "local", "--base-model", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    for options in (("start",), ("start", "--detach"), ("vllm",), ("trainer",)):
        done = house.command(*options)
        assert done.returncode == 1
        assert "holds no config.json, so it is no model folder" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert house.ours() == []


@pytest.mark.vllm
def test_a_vllm_that_dies_at_start_is_told_with_cause_and_remedy(
    house: House, tiny_model: Path, free_port: Callable[[], int]
) -> None:
    done = house.command(
        *("setup", "--yes", "--kind", "local", "--base-model", str(tiny_model), "--port", str(house.port)),
        *("--vllm-url", f"http://127.0.0.1:{free_port()}", "--trainer-url", f"http://127.0.0.1:{free_port()}"),
    )
    assert done.returncode == 0, done.stderr
    config = house.home / "litellm_config.yaml"
    config.write_text(config.read_text().replace("max_model_len: 4096", "max_model_len: 10000000"))
    done = house.command("start")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("metaclaw: the vllm died at start: ")
    assert "lower metaclaw.vllm.max_model_len" in last
    assert "Traceback" not in done.stderr
    house.wait_until_empty(10)
