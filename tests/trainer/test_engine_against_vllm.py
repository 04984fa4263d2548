"""The trainer's log-probs are the sampler's, for the base model and for an adapter that vLLM loaded from our folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from metaclaw_trainer.adapters import AdapterConfig, AdapterState
from metaclaw_trainer.batching import Datum, datum_of_lists
from metaclaw_trainer.checkpoints import Checkpoint, write_checkpoint
from metaclaw_trainer.engine_thread import EngineThread

from tests.trainer.engine_parts import random_sample, tiny_settings

pytestmark = pytest.mark.vllm

SHAPE = AdapterConfig(8, 16.0, ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"))


def sampled(url: str, model: str, prompt: list[int], temperature: float) -> Datum:
    """A completion of ``prompt`` with the log-probs that vLLM reports."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": temperature}
    body |= {"logprobs": 0, "return_token_ids": True, "seed": 1, "ignore_eos": True}
    choice = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()["choices"][0]
    response, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    assert len(response) == len(logprobs) == 24
    tokens, zeros = prompt + response, [0.0] * (len(prompt) - 1)
    return datum_of_lists(tokens[:-1], tokens[1:], zeros + logprobs, zeros + [1.0] * 24)


def test_an_exported_adapter_gives_the_samplers_log_probs(tiny_vllm: Any, tiny_model: Path, tmp_path: Path) -> None:
    engine = EngineThread(tiny_settings(tiny_model, tmp_path, rank=8))
    engine.start()
    engine.call(lambda e: e.create("ada", SHAPE, seed=1))
    torch.manual_seed(0)
    weights = {n: w + 0.2 * torch.randn_like(w) for n, w in engine.call(lambda e: e.state("ada")).weights.items()}
    state = AdapterState(SHAPE, weights, {}, 0)
    engine.call(lambda e: e.restore("ada", state))
    folder = write_checkpoint(tmp_path / "v1", Checkpoint(state, {}), str(tiny_model), "f00d").path
    body = {"lora_name": f"ada-{tmp_path.name}@v1", "lora_path": str(folder)}
    httpx.post(f"{tiny_vllm.url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()

    prompt = list(random_sample(3).token_ids)
    for key, model in ((None, "metaclaw-base"), ("ada", body["lora_name"])):
        for temperature in (1.0, 0.7):  # logprobs are those before temperature, on both sides
            datum = sampled(tiny_vllm.url, model, prompt, temperature)
            found = engine.call(lambda e, k=key, d=datum: e.logprobs(k, [d]))[0]
            assert float((found - datum.sampled_N).abs().mean()) < 2e-3, (model, temperature)
    # and the adapter matters: the base model gives these tokens other log-probs
    other = engine.call(lambda e: e.logprobs(None, [datum]))[0]
    assert float((other - datum.sampled_N).abs().mean()) > 0.3
    engine.stop()
