"""vLLM, asked directly for replays: these calls bypass the gateway and are not captured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from metaclaw_hooks.types import Message, Trace

from metaclaw_plugin.errors import SamplerRefusedError, SamplerUnavailableError

TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; a long answer on a slow machine


@dataclass(frozen=True, slots=True)
class Reply:
    """One sampled answer."""

    message: Message
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, before temperature, one for each of ``token_ids``
    finish_reason: str | None


class Sampler:
    """Asks the vLLM at ``url`` (root URL, without /v1); ``headers`` carry its key."""

    def __init__(self, http: httpx.AsyncClient, url: str, headers: Mapping[str, str] | None = None) -> None:
        self._http = http
        self._headers = dict(headers or {})
        self._url = url.rstrip("/")

    async def reply(self, model: str, trace: Trace, max_tokens: int, seed: int) -> Reply:
        """Let ``model`` answer the prompt of ``trace``, sampled as it was then.

        Raises:
            SamplerRefusedError: if vLLM will not answer this prompt.
            SamplerUnavailableError: if vLLM does not answer.
        """
        sampling = trace.sampling
        body: dict[str, Any] = {
            "model": model,
            "messages": list(trace.messages),
            "max_tokens": min(max_tokens, sampling.max_tokens or max_tokens),
            "temperature": 1.0 if sampling.temperature is None else sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "seed": seed,
            "logprobs": True,
            "return_token_ids": True,
        }
        if trace.tools:
            body["tools"] = list(trace.tools)
        if sampling.top_k is not None:
            body["top_k"] = sampling.top_k
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        answer = await self._post("/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            reply = Reply(
                message={key: value for key, value in choice["message"].items() if value is not None},
                prompt_token_ids=tuple(answer["prompt_token_ids"]),
                token_ids=tuple(choice["token_ids"]),
                logprobs=tuple(float(item["logprob"]) for item in choice["logprobs"]["content"]),
                finish_reason=choice.get("finish_reason"),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise SamplerRefusedError(f"vLLM at {self._url} gave no token ids with log-probabilities") from error
        if not reply.prompt_token_ids:
            raise SamplerRefusedError(f"vLLM at {self._url} gave no token ids of the prompt")
        if len(reply.token_ids) != len(reply.logprobs):
            raise SamplerRefusedError(f"vLLM at {self._url} gave another number of log-probabilities than tokens")
        return reply

    async def logprobs(self, model: str, token_ids: Sequence[int], start: int) -> list[float]:
        """Natural log-probabilities of ``token_ids[start:]`` under ``model``, each given what stands before it."""
        body = {"model": model, "prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        answer = await self._post("/v1/completions", body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise SamplerRefusedError(f"vLLM at {self._url} did not score the tokens that it was given") from error
        return self._scored(entries, token_ids)[start - 1 :]

    async def conversation_logprob(self, model: str, messages: Sequence[Message]) -> float:
        """Mean natural log-probability per token of a whole conversation under ``model``, template included."""
        body = {
            "model": model,
            "messages": list(messages),
            "add_generation_prompt": False,
            "continue_final_message": True,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "temperature": 0.0,
            "return_token_ids": True,
        }
        answer = await self._post("/v1/chat/completions", body)
        values = self._scored(answer.get("prompt_logprobs"), answer.get("prompt_token_ids") or ())
        return math.fsum(values) / len(values)

    def _scored(self, entries: Any, token_ids: Sequence[int]) -> list[float]:
        try:
            pairs = zip(token_ids[1:], entries[1:], strict=True)
            values = [float(entry[str(token)]["logprob"]) for token, entry in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise SamplerRefusedError(f"vLLM at {self._url} did not score the tokens that it was given") from error
        if not values or not all(math.isfinite(value) for value in values):
            raise SamplerRefusedError(f"vLLM at {self._url} gave a log-probability that is none")
        return values

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._http.post(self._url + path, json=body, headers=self._headers, timeout=TIMEOUT)
        except ValueError as error:  # a client may have sent half a surrogate pair, or a NaN
            raise SamplerRefusedError(f"vLLM at {self._url} cannot be sent what no JSON can carry: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SamplerUnavailableError(
                f"vLLM at {self._url} did not answer {path}: {type(error).__name__}"
            ) from error
        if answer.status_code >= 500 or answer.status_code == 404:  # 404: the adapter is gone, and will be loaded again
            raise SamplerUnavailableError(f"vLLM at {self._url} answered {path} with {answer.status_code}")
        if not answer.is_success:
            raise SamplerRefusedError(f"vLLM at {self._url} refused {path} with {answer.status_code}")
        try:
            said = answer.json()
        except ValueError as error:
            raise SamplerUnavailableError(f"vLLM at {self._url} answered {path} with no JSON") from error
        if not isinstance(said, dict):
            raise SamplerRefusedError(f"vLLM at {self._url} answered {path} with no JSON object")
        return said
