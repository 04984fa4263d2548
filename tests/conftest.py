"""Fixtures shared by all tests: models built once, a real vLLM started once for the run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from demo.models import model_path
from tests.vllm_server import VllmProcess, pick_free_port, start_vllm, stop_group, wait_until_ready

# A shell without job control starts background commands with Ctrl-C ignored, and so would every child of ours be.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
    port, trainer_port = pick_free_port(), pick_free_port()
    process = start_vllm(tiny_model, port, log, trainer_port)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", process, log)
        # The first request is several times slower than the rest.
        warm_up = {"model": "metaclaw-base", "prompt": "Hello", "max_tokens": 2}
        httpx.post(f"{url}/v1/completions", json=warm_up, timeout=120).raise_for_status()
        yield VllmProcess(url, tiny_model, log, trainer_port)
    finally:
        stop_group(process)
