"""What runs: vLLM takes adapters at run time and returns token ids, the trainer takes our key and has our model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from metaclaw_plugin.doctor.finding import Finding, failure, ok, warning
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.supervisor.plan import reachable, trains
from metaclaw_plugin.vllm_command import BASE_NAME

START = "metaclaw start, or metaclaw logs if it was started"
CLOCK = 60.0  # seconds by which a server's clock may be off


def look_at_services(settings: Settings) -> Iterator[Finding]:
    with httpx.Client(timeout=10.0, trust_env=False) as http:
        yield from _gateway(http, settings)
        if trains(settings):
            yield from _vllm(http, settings)
            yield from _trainer(http, settings)


def _gateway(http: httpx.Client, settings: Settings) -> Iterator[Finding]:
    url = f"http://{reachable(settings.gateway.host)}:{settings.gateway.port}"
    try:
        alive = http.get(f"{url}/health/liveliness").status_code == 200
        open_to_all = http.get(f"{url}/v1/models").status_code == 200
    except httpx.HTTPError:
        yield warning("gateway", f"does not answer at {url}", START)
        return
    if not alive:
        yield failure("gateway", f"what answers at {url} is no LiteLLM", "stop it, or change metaclaw.gateway.port")
    elif open_to_all:
        yield failure("gateway", "answers without a key", "general_settings.custom_auth in the config file")
    else:
        yield ok("gateway", f"{url}, asks for a key")


def _vllm(http: httpx.Client, settings: Settings) -> Iterator[Finding]:
    url, headers = settings.vllm.url.rstrip("/"), settings.vllm.headers
    try:
        listed = http.get(f"{url}/v1/models", headers=headers)
        if listed.status_code == 401:
            yield failure("vLLM", f"{url} refuses our key", "metaclaw.vllm.api_key, as vLLM was started with")
            return
        if listed.status_code != 200:
            yield failure("vLLM", f"{url} answers with status {listed.status_code}", "check metaclaw.vllm.url")
            return
        names = [str(model.get("id")) for model in listed.json().get("data", [])]
        if BASE_NAME not in names:
            shown = ", ".join(names) or "nothing"
            yield failure(
                "vLLM", f"serves {shown}, but not {BASE_NAME}", f"start it with --served-model-name {BASE_NAME}"
            )
            return
        yield ok("vLLM", f"{url} serves {BASE_NAME} and {len(names) - 1} adapters")
        yield _run_time_loading(http, url, headers)
        yield _token_ids(http, url, headers)
    except (httpx.HTTPError, ValueError):
        yield warning("vLLM", f"does not answer at {url}", START)


def _run_time_loading(http: httpx.Client, url: str, headers: dict[str, str]) -> Finding:
    """The route is there only when it is allowed; an empty request is refused by it and changes nothing."""
    if http.post(f"{url}/v1/load_lora_adapter", json={}, headers=headers).status_code == 404:
        return failure(
            "vLLM adapters",
            "cannot be loaded at run time",
            "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, as `metaclaw vllm` does",
        )
    return ok("vLLM adapters", "can be loaded at run time")


def _token_ids(http: httpx.Client, url: str, headers: dict[str, str]) -> Finding:
    body = {
        "model": BASE_NAME,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "logprobs": True,
        "return_token_ids": True,
    }
    reply = http.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60.0)
    if reply.status_code != 200:
        return failure(
            "vLLM tokens", f"a request fails with status {reply.status_code}: {reply.text[:100]}", "metaclaw logs vllm"
        )
    answer = reply.json()
    if not answer.get("prompt_token_ids") or not answer["choices"][0].get("token_ids"):
        return failure("vLLM tokens", "it returns no token ids, so nothing can be trained on", "vLLM 0.11 or newer")
    return ok("vLLM tokens", "ids and log-probabilities are returned")


def _trainer(http: httpx.Client, settings: Settings) -> Iterator[Finding]:
    url = settings.rl.remote_url.rstrip("/")
    try:
        health = http.get(f"{url}/v1/health")
        known = http.get(f"{url}/v1/agents", headers=settings.rl.headers)
    except httpx.HTTPError:
        yield warning("trainer", f"does not answer at {url}", START)
        return
    if health.status_code != 200:
        yield failure("trainer", f"{url} answers with status {health.status_code}", "check metaclaw.rl.remote_url")
        return
    if known.status_code == 401:
        yield failure(
            "trainer", "refuses our key", "metaclaw trainer --new-key NAME there, metaclaw.rl.remote_api_key here"
        )
        return
    said = health.json()
    yield ok("trainer", f"{url}, {said.get('device')}, {said.get('base_model')}")
    ours, theirs = settings.base_model, str(said.get("base_model") or "")
    if ours and settings.rl.backend == "local" and Path(ours).name != Path(theirs).name:
        yield failure("models", f"vLLM is to serve {ours}, the trainer adapts {theirs}", "make them the same model")
    yield from _clock(health)


def _clock(reply: httpx.Response) -> Iterator[Finding]:
    if "date" not in reply.headers:
        return
    off = abs(time.time() - parsedate_to_datetime(reply.headers["date"]).timestamp())
    if off > CLOCK:
        yield warning("clock", f"the trainer's machine is {off:.0f} s off", "set both clocks by NTP")
    else:
        yield ok("clock", "agrees with the trainer's machine")
