"""A real vLLM server for tests, in a process group of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from metaclaw_plugin.settings import VllmSettings
from metaclaw_plugin.vllm_adapters import FOLDER_ENV, URL_ENV

VLLM_START_TIMEOUT = 300.0  # seconds; 60-90 on a quiet machine


@dataclass(frozen=True)
class VllmProcess:
    """A running vLLM server."""

    url: str  # root URL, without /v1
    model: Path
    log: Path
    trainer_port: int = 0  # where it looks for the trainer whose adapters are not on this machine


def pick_free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_vllm(model: Path, port: int, log: Path, trainer_port: int = 9) -> subprocess.Popen[bytes]:
    """Start vLLM in a process group of its own, so that its engine ends with it.

    It fetches adapters that are not on this machine from a trainer on ``trainer_port``.
    """
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
    argv += ["--lora-target-modules", *VllmSettings().lora_targets]
    argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    argv += ["--middleware", "metaclaw_plugin.vllm_adapters.FetchAdapters"]
    env = os.environ | {
        URL_ENV: f"http://127.0.0.1:{trainer_port}",
        FOLDER_ENV: str(log.with_suffix("")),
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
