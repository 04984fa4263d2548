"""One vLLM over HTTP: list, load and unload adapters, draw samples, score token ids.

Foreign errors are translated here: a vLLM that does not answer is ``VllmUnavailableError`` (``VllmSilentError`` if it
let the time run out), one that answers with an error is ``VllmRefusedError`` with its own words. Route names and fields
were checked against vLLM 0.32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from metaclaw_hooks.wire import ADAPTER_MIRROR

from metaclaw_trainer.errors import VllmRefusedError, VllmSilentError, VllmUnavailableError

CONTROL_TIMEOUT = httpx.Timeout(30.0, connect=5.0)  # seconds; a load reads the adapter from disk
LIST_TIMEOUT = httpx.Timeout(10.0, connect=5.0)  # seconds; one that hangs must not hold up the others for long
SAMPLE_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; long answers on a slow machine


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of vLLM's ``/v1/models``."""

    name: str
    root: str  # folder on the trainer's machine, or hub name
    parent: str | None  # name of the base model; None: it is the base model


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled continuation."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural, before temperature, one for each token id
    finish_reason: str | None
    text: str


class VllmClient:
    """Synchronous client of one vLLM; safe to use from several threads.

    Args:
        url: root URL without ``/v1``.
        api_key: sent as a Bearer token, if vLLM wants one.
        transport: for tests that need another network.
        patience: how long it may take to load, unload or prove an adapter.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        patience: httpx.Timeout = CONTROL_TIMEOUT,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.patience = patience
        self._http = httpx.Client(
            base_url=self.url, headers=self._headers, timeout=patience, transport=transport, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def asynchronous(self, timeout: httpx.Timeout) -> httpx.AsyncClient:
        """For answers that stream; the caller closes it."""
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=timeout, trust_env=False)

    def models(self) -> list[ServedModel]:
        """What vLLM serves now: the base model first, then its adapters."""
        body = self._json("GET", "/v1/models", timeout=LIST_TIMEOUT)
        try:
            return [ServedModel(m["id"], _on_our_disk(m.get("root") or ""), m.get("parent")) for m in body["data"]]
        except (KeyError, TypeError) as error:
            raise VllmRefusedError(f"vLLM at {self.url} answered /v1/models without a list of models") from error

    def load(self, name: str, path: str) -> None:
        """Load the PEFT folder ``path`` (on vLLM's machine) as ``name``; loading what is loaded is no error.

        Raises:
            VllmRefusedError: if vLLM cannot load it, or holds another adapter of that name.
            VllmUnavailableError: if vLLM does not answer.
        """
        try:
            self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except VllmRefusedError as error:
            held = {model.name: model.root for model in self.models()}
            if held.get(name) == path:
                return  # another replica of the trainer was first
            if error.status == 404 and name not in held and "Not Found" in str(error):
                raise VllmRefusedError(
                    f"vLLM at {self.url} has no /v1/load_lora_adapter: start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                    status=404,
                ) from error
            raise

    def unload(self, name: str) -> None:
        """Unload ``name``; unloading what is not loaded is no error."""
        try:
            self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except VllmRefusedError as error:
            if error.status != 404:
                raise

    def sample(
        self,
        model: str,
        token_ids: Sequence[int],
        *,
        n: int = 1,
        max_tokens: int = 16,
        parameters: Mapping[str, Any] | None = None,
    ) -> list[Drawn]:
        """Draw ``n`` continuations of ``token_ids``; ``parameters`` are vLLM's own (temperature, top_p, stop ...)."""
        body = {
            "model": model,
            "prompt": list(token_ids),
            "n": n,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "return_token_ids": True,
            **(parameters or {}),
        }
        answer = self._json("POST", "/v1/completions", body, SAMPLE_TIMEOUT)
        return [self._drawn(choice) for choice in answer.get("choices", ())]

    def _drawn(self, choice: Mapping[str, Any]) -> Drawn:
        ids = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or logprobs is None or len(ids) != len(logprobs) or any(value is None for value in logprobs):
            raise VllmRefusedError(f"vLLM at {self.url} gave no token ids with log-probabilities; vLLM 0.32 does")
        return Drawn(tuple(ids), tuple(map(float, logprobs)), choice.get("finish_reason"), choice.get("text") or "")

    def say_a_token(self, model: str) -> None:
        """See that ``model`` answers.

        Raises:
            VllmRefusedError: if it does not, or another model answers in its place.
            VllmUnavailableError: if vLLM is away.
        """
        answer = self._json("POST", "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1})
        if answer.get("model") != model or not answer.get("choices"):
            raise VllmRefusedError(f"vLLM at {self.url} does not answer as {model}")

    def prompt_logprobs(
        self, model: str, token_ids: Sequence[int], timeout: httpx.Timeout = SAMPLE_TIMEOUT
    ) -> tuple[float, ...]:
        """Natural log-probability, before temperature, of each of ``token_ids[1:]`` given what precedes it; length T-1.

        Raises:
            VllmRefusedError: if a token id is outside the model's vocabulary, or the sequence is too long for it.
        """
        body = {"model": model, "prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        answer = self._json("POST", "/v1/completions", body, timeout)
        try:
            pairs = list(zip(token_ids, answer["choices"][0]["prompt_logprobs"], strict=True))
            scored = tuple(float(entry[str(token)]["logprob"]) for token, entry in pairs[1:])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise VllmRefusedError(f"vLLM at {self.url} did not score the tokens that it was given") from error
        if not all(map(math.isfinite, scored)):
            raise VllmRefusedError(f"vLLM at {self.url} gave a log-probability that is none")
        return scored

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: httpx.Timeout | None = None
    ) -> dict[str, Any]:
        response = self._request(method, path, body, timeout)
        try:
            answer = response.json()
        except json.JSONDecodeError as error:
            raise VllmRefusedError(f"vLLM at {self.url} answered {path} with something that is no JSON") from error
        if not isinstance(answer, dict):
            raise VllmRefusedError(f"vLLM at {self.url} answered {path} with no JSON object")
        return answer

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: httpx.Timeout | None = None
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body, timeout=timeout or self.patience)
        except httpx.TimeoutException as error:
            raise VllmSilentError(f"vLLM at {self.url} did not answer {path} in time") from error
        except httpx.HTTPError as error:
            raise VllmUnavailableError(f"vLLM at {self.url} cannot be reached ({error}); is it running?") from error
        if response.is_error:
            raise VllmRefusedError(
                f"vLLM at {self.url} refused {path}: {refusal_text(response)}", status=response.status_code
            )
        return response


def _on_our_disk(root: str) -> str:
    """The folder as the trainer named it, also where vLLM holds a copy that it fetched."""
    _, mirror, path = root.partition(f"/{ADAPTER_MIRROR}/")
    return f"/{path}" if mirror else root


def refusal_text(response: httpx.Response) -> str:
    """vLLM's own words for an error, on one line, at most 300 characters."""
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = response.text
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", body))
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(f"{response.status_code} {body}".split())[:300]
