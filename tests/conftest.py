"""Fixtures shared by all tests: models built once, a real vLLM started once for the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # demo/ is no installed package

from demo.models import model_path  # noqa: E402

VLLM_START_TIMEOUT = 300.0  # seconds; 60-90 on a quiet machine


@dataclass(frozen=True)
class VllmProcess:
    """A running vLLM server."""

    url: str  # root URL, without /v1
    model: Path
    log: Path


def pick_free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    return pick_free_port


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random Llama of a few MB with SmolLM2's tokenizer."""
    return model_path("tiny")


@pytest.fixture(scope="session")
def smollm_model() -> Path:
    """SmolLM2-135M-Instruct."""
    return model_path("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_vllm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Real vLLM serving the tiny model as ``metaclaw-base``, adapters loadable at run time.

    ``METACLAW_TEST_VLLM`` names one that already runs, to save its start while tests are written.
    """
    if running := os.environ.get("METACLAW_TEST_VLLM"):
        yield VllmProcess(running, tiny_model, Path(os.devnull))
        return
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    port = pick_free_port()
    process = start_vllm(tiny_model, port, log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", process, log)
        # The first request is several times slower than the rest.
        warm_up = {"model": "metaclaw-base", "prompt": "Hello", "max_tokens": 2}
        httpx.post(f"{url}/v1/completions", json=warm_up, timeout=120).raise_for_status()
        yield VllmProcess(url, tiny_model, log)
    finally:
        stop_group(process)


def start_vllm(model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start vLLM in a process group of its own, so that its engine ends with it."""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--served-model-name", "metaclaw-base", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "4", "--max-cpu-loras", "32"]
    argv += [
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
        "--enforce-eager",
        "--generation-config",
        "vllm",
    ]
    argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    env = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        return subprocess.Popen(argv, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll ``url`` until it answers 200; fail with the log's end if the process dies or takes too long."""
    deadline = time.monotonic() + VLLM_START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    pytest.fail(f"{process.args!r} did not become ready (exit code {process.poll()}):\n{tail}")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all of its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
