"""vLLM is killed under a trainer: training goes on, callers are told, and what vLLM held comes back by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.wire import SampleBody
from metaclaw_trainer.settings import TrainerSettings

from tests.trainer.engine_parts import as_sampled, random_sample
from tests.trainer_server import TrainerServer, serving
from tests.vllm_server import pick_free_port, start_vllm, stop_group, wait_until_ready

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("METACLAW_TEST_RESTARTS" not in os.environ, reason="METACLAW_TEST_RESTARTS=1 takes 4 minutes"),
]

AGENT, BATCH = "restarted", 4
PROMPT = [100, 200, 300, 400]


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def post(trainer: TrainerServer, route: str, **body: Any) -> dict[str, Any]:
    response = trainer.http.post(route, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def train(trainer: TrainerServer, number: int) -> None:
    """A batch that the base model might have drawn; until version ``number`` is listed."""
    raw = [
        random_sample(100 * number + i, rewards=(1.0 if i % 2 else -1.0,), response=12, agent=AGENT)
        for i in range(BATCH)
    ]
    samples = as_sampled(trainer.services.engine, raw)
    post(trainer, "/v1/samples", samples=[SampleBody.of(sample).model_dump() for sample in samples])
    eventually(lambda: trainer.services.agents.status(AGENT).newest == number)


def open_session(trainer: TrainerServer) -> str:
    """A training session that has learned something and saved its weights."""
    session = str(
        post(trainer, "/v1/lora/create", base_model=trainer.services.settings.base_model, rank=4)["session_id"]
    )
    tokens, zeros = [*PROMPT, 77, 77], [0.0] * (len(PROMPT) - 1)
    datum = {
        "model_input_tokens": tokens[:-1],
        "target_tokens": tokens[1:],
        "logprobs": [*zeros, -1.0, -1.0],
        "advantages": [*zeros, 1.0, 1.0],
    }
    for _ in range(3):
        post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum], loss_fn="cross_entropy")
        post(trainer, "/v1/train/optim_step", session_id=session, learning_rate=0.02)
    post(trainer, "/v1/weights/save", session_id=session, name="w")
    return session


def spoken(trainer: TrainerServer, session: str) -> tuple[Any, Any]:
    """What version 1 and the session say, greedily, with log-probabilities to two digits."""
    greedy = {"temperature": 0.0, "max_tokens": 6}
    body = {**greedy, "tokens": PROMPT, "top_k": -1, "top_p": 1.0, "session_id": session}
    [one] = post(trainer, "/v1/sample", **body)["sequences"]
    [drawn] = trainer.services.vllm[0].sample(f"{AGENT}@v1", PROMPT, max_tokens=6, parameters={"temperature": 0.0})
    return (
        (tuple(one["tokens"]), [round(value, 2) for value in one["logprobs"]]),
        (drawn.token_ids, [round(value, 2) for value in drawn.logprobs]),
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@pytest.mark.law(5)
@pytest.mark.timeout(900)
def test_what_a_killed_vllm_held_comes_back_and_training_does_not_wait(tmp_path: Path, tiny_model: Path) -> None:
    port = pick_free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "vllm.log"
    settings = TrainerSettings(
        base_model=str(tiny_model), home=tmp_path / "home", device="cpu", dtype="float32", rank=4, nice=0,
        batch_size=BATCH, poll_interval=0.05, learning_rate=1e-2, max_staleness=9, vllm_urls=[url],
    )  # fmt: skip
    process = start_vllm(tiny_model, port, log)
    try:
        wait_until_ready(f"{url}/health", process, log)
        with serving(settings) as trainer:
            trainer.http.put(f"/v1/agents/{AGENT}", json={"allowed": True})
            train(trainer, 1)
            reply = trainer.http.put("/v1/served", json={"versions": [f"{AGENT}@v1"]})
            assert reply.json()["held"] == [f"{AGENT}@v1"]
            session = open_session(trainer)
            before = spoken(trainer, session)

            kill(process)
            asked = trainer.http.post("/v1/sample", json={"tokens": PROMPT, "session_id": session})
            assert (asked.status_code, asked.json()["error"]["code"]) == (503, "vllm_unavailable")
            train(trainer, 2)
            reply = trainer.http.put("/v1/served", json={"versions": [f"{AGENT}@v1", f"{AGENT}@v2"]})
            assert reply.json()["held"] == []
            assert "cannot be reached" in reply.json()["failed"][0]["reason"]
            assert trainer.http.get("/v1/health").status_code == 200

            process = start_vllm(tiny_model, port, log)
            wait_until_ready(f"{url}/health", process, log)
            wanted = {f"{AGENT}@v1", f"{AGENT}@v2", f"run.{session}.1"}
            eventually(lambda: wanted <= {model.name for model in trainer.services.vllm[0].models()})
            assert spoken(trainer, session) == before
    finally:
        stop_group(process)
