"""Are the answers still answers? Judged by the base model's own likelihood of them, and by repetition."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import httpx

BASE_MODEL = "metaclaw-base"
AT_ONCE = 4


def distinct2(texts: Sequence[str]) -> float:
    """Share of word pairs that are different ones, over all texts together (Li et al. 2016); 1.0: none comes twice."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


async def base_log_likelihood(vllm: str, exchanges: Sequence[tuple[str, str]]) -> float:
    """Mean log-likelihood per token, in nats, of all answers under the base model.

    ``exchanges``: (question, answer); vLLM's own tokenizer and chat template are asked for the tokens.

    Raises:
        httpx.HTTPError: if vLLM does not answer.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=vllm, timeout=300) as client:
        scored = await asyncio.gather(*(_score(client, slots, *exchange) for exchange in exchanges))
    values = [value for one in scored for value in one]
    return sum(values) / len(values)


async def _score(client: httpx.AsyncClient, slots: asyncio.Semaphore, question: str, answer: str) -> list[float]:
    async with slots:
        prompt = await _tokens(client, {"messages": [{"role": "user", "content": question}]})
        reply = await _tokens(client, {"prompt": answer, "add_special_tokens": False})
        if not reply:
            return []
        body = {"model": BASE_MODEL, "prompt": prompt + reply, "max_tokens": 1, "prompt_logprobs": 0}
        response = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    positions = response["choices"][0]["prompt_logprobs"][len(prompt) :]
    return [position[str(token)]["logprob"] for position, token in zip(positions, reply, strict=True)]


async def _tokens(client: httpx.AsyncClient, text: dict[str, object]) -> list[int]:
    response = await client.post("/tokenize", json={"model": BASE_MODEL, **text})
    tokens: list[int] = response.raise_for_status().json()["tokens"]
    return tokens
