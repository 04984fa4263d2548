"""Do vLLM and the trainer hold the same model? One short answer, its log-probabilities by both.

The trainer is asked over the routes for training runs of one's own: a run with a fresh adapter (which changes nothing),
the cross-entropy of the sampled tokens, and the run is closed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from metaclaw_plugin.doctor.finding import Finding, failure, ok, warning
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.vllm_command import BASE_NAME

CLOSE = 0.1  # nats per token; bfloat16 against float32 differs by a few hundredths
FAR = 0.3  # from here on samples are set aside by the trainer
ABOUT = "vLLM and trainer"


@dataclass(frozen=True)
class Answer:
    """What vLLM sampled: token ids of prompt and answer, log-probabilities of the answer in nats."""

    prompt: list[int]
    sampled: list[int]
    logprobs: list[float]


def look_at_agreement(settings: Settings) -> Iterator[Finding]:
    """Nothing, if one of the two does not answer: that is told elsewhere."""
    trainer, headers = settings.rl.remote_url.rstrip("/"), settings.rl.headers
    with httpx.Client(timeout=120.0, trust_env=False) as http:
        try:
            answer = _sample(http, settings)
            created = http.post(f"{trainer}/v1/lora/create", json={"rank": 1}, headers=headers)
            if created.status_code != 200:
                return
            run = str(created.json()["session_id"])
            try:
                gap = _gap(http, trainer, headers, run, answer)
            finally:
                http.delete(f"{trainer}/v1/lora/{run}", headers=headers)
        except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError):
            return
    yield _judge(gap)


def _sample(http: httpx.Client, settings: Settings) -> Answer:
    url = settings.vllm.url.rstrip("/")
    body = {
        "model": BASE_NAME,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": 16,
        "temperature": 1.0,
        "logprobs": True,
        "return_token_ids": True,
    }
    said: dict[str, Any] = (
        http.post(f"{url}/v1/chat/completions", json=body, headers=settings.vllm.headers).raise_for_status().json()
    )
    choice = said["choices"][0]
    logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
    return Answer(list(said["prompt_token_ids"]), list(choice["token_ids"]), logprobs)


def _gap(http: httpx.Client, trainer: str, headers: dict[str, str], run: str, answer: Answer) -> float:
    """By how much the mean log-probability of the answer differs, in nats per token."""
    tokens = answer.prompt + answer.sampled
    before = [0.0] * (len(answer.prompt) - 1)
    count = len(answer.sampled)
    datum = {
        "model_input_tokens": tokens[:-1],
        "target_tokens": tokens[1:],
        "logprobs": before + answer.logprobs,
        "advantages": before + [1.0] * count,
    }
    body = {"session_id": run, "datums": [datum], "loss_fn": "cross_entropy"}
    reply = http.post(f"{trainer}/v1/train/forward_backward", json=body, headers=headers).raise_for_status()
    return abs(float(reply.json()["loss"]) / count + sum(answer.logprobs) / count)


def _judge(gap: float) -> Finding:
    seen = f"log-probabilities of one answer differ by {gap:.3f} nats per token"
    if gap < CLOSE:
        return ok(ABOUT, seen)
    if gap < FAR:
        return warning(ABOUT, seen, "give both the same weight type: metaclaw.vllm.dtype and metaclaw.trainer.dtype")
    return failure(ABOUT, seen, "they do not hold the same model: compare metaclaw.base_model with what vLLM serves")
