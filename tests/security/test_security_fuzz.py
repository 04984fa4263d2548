"""No request, however odd, gets a 500 of our making, a traceback, or ends a process.

A few hundred requests belong to every run; ``make fuzz`` sends 20,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
from hypothesis import strategies as st

from metaclaw_plugin.console.app import create_app
from tests.gateway_server import PLAIN_KEY, running_plain_litellm
from tests.security.console_visits import ACTING, filled, session
from tests.security.fuzzing import JSON, TEXTS, TOTAL, Fuzzer, drive, from_document, mutated
from tests.security.house import House

pytestmark = [pytest.mark.gateway, pytest.mark.law(9), pytest.mark.timeout(1800)]

SAID = [{"role": "user", "content": "hi case:fresh"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": SAID, "temperature": 1, "tools": [TOOL], "stream": False},
    "/v1/messages": {"model": "m", "messages": SAID, "max_tokens": 9, "system": "s", "stream": False},
    "/v1/responses": {"model": "m", "input": "hi case:fresh", "instructions": "s", "stream": False},
}
FIELDS = (
    "n", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs", "user", "metadata", "prompt_cache_key",
    "tool_choice", "response_format", "max_tokens", "max_completion_tokens", "logit_bias", "reasoning_effort",
    "parallel_tool_calls",
    "stream_options", "previous_response_id", "thinking", "extra_body", "store", "modalities", "return_token_ids",
)  # fmt: skip
HEADERS = (
    "x-agent-id",
    "x-session-id",
    "x-turn-type",
    "x-session-done",
    "x-metaclaw-record",
    "x-upstream-key",
    "session_id",
)


def finish(house: House, fuzzer: Fuzzer, least: int) -> None:
    print(fuzzer.name, dict(fuzzer.statuses))
    assert not fuzzer.faults, f"{len(fuzzer.faults)} faults\n" + "\n".join(fuzzer.faults[:20])
    assert house.dead() == []
    assert fuzzer.sent >= least, fuzzer.statuses
    assert len(fuzzer.statuses) > 1, "every request was answered alike: something refused them all at the door"


def test_fuzzed_requests_to_the_trainer(house: House) -> None:
    key = {"authorization": f"Bearer {house.trainer_keys['worker']}"}
    document = httpx.get(f"{house.trainer}/openapi.json", headers=key, timeout=30).json()
    run = httpx.post(f"{house.trainer}/v1/lora/create", json={"rank": 4}, headers=key, timeout=60).json()["session_id"]
    fuzzer = Fuzzer("trainer", house.trainer, key)
    opened = [run]
    count = 0

    def note(reply: requests.Response, **_: Any) -> None:
        if reply.ok and reply.url.endswith("/v1/lora/create"):
            opened.append(reply.json()["session_id"])

    def into_a_run(case: Any) -> None:
        """Every other request about a training run is about one that is there."""
        nonlocal count
        count += 1
        if count % 2 and isinstance(case.body, dict) and "session_id" in case.body:
            case.body["session_id"] = run
        Fuzzer.case(fuzzer, case)

    fuzzer.case = into_a_run  # type: ignore[method-assign]
    fuzzer.session.hooks["response"].append(note)
    from_document(fuzzer, document, TOTAL * 35 // 100)
    for one in opened:  # there may be 64 at once, and others want some
        httpx.delete(f"{house.trainer}/v1/lora/{one}", headers=key, timeout=60)
    finish(house, fuzzer, TOTAL // 4)


def test_fuzzed_requests_to_our_routes_of_the_gateway(house: House) -> None:
    document = httpx.get(f"{house.gateway}/openapi.json", timeout=60).json()
    document["paths"] = {path: of for path, of in document["paths"].items() if path.startswith("/metaclaw")}
    fuzzer = Fuzzer("gateway's own routes", house.gateway, {"authorization": f"Bearer {house.keys['own']}"})
    from_document(fuzzer, document, TOTAL * 25 // 100)
    finish(house, fuzzer, TOTAL // 8)


# What fuzzing found, kept as it was found.
FOUND: dict[str, tuple[str, str, bytes | None]] = {
    "a number past 64 bits": ("GET", "/metaclaw/v1/traces?after=340372356483924201832448", None),
    "a time that is none": ("GET", "/metaclaw/v1/traces?since=nan", None),
    "a body that is true": ("POST", "/metaclaw/v1/feedback", b"true"),
    "a body that is a number": ("POST", "/metaclaw/v1/feedback", b"1.5"),
    "a body that is a list": ("POST", "/v1/embeddings", b"[]"),
    "a body that is null": ("POST", "/metaclaw/v1/adapters/rollback", b"null"),
    "a version past 64 bits": (
        "POST",
        "/metaclaw/v1/adapters/rollback",
        b'{"agent": "alpha", "to": 99999999999999999999}',
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_gets_a_clear_no(house: House, what: str) -> None:
    method, path, body = FOUND[what]
    headers = {"authorization": f"Bearer {house.keys['own']}", "content-type": "application/json"}
    answer = httpx.request(method, house.gateway + path, content=body, headers=headers, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def plain(
    house: House, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], str]]:
    """LiteLLM alone before the same upstream; started when it is first asked for."""
    started: list[Any] = []

    def url() -> str:
        if not started:
            context = running_plain_litellm(tmp_path_factory.mktemp("plain"), house.upstream.url, free_port())
            started[:] = [context, context.__enter__()]
        return str(started[1])

    yield url
    if started:
        started[0].__exit__(None, None, None)


def test_fuzzed_requests_for_answers_of_models(house: House, plain: Callable[[], str]) -> None:
    """A 500 counts as ours unless LiteLLM alone gives one for the same body."""

    def litellms_own(request: requests.PreparedRequest, _reply: requests.Response) -> bool:
        path = "/" + str(request.url).split("/", 3)[3]
        body = _for_litellm_alone(request.body)
        headers = {"authorization": f"Bearer {PLAIN_KEY}", "content-type": "application/json"}
        alone = requests.post(plain() + path, data=body, headers=headers, timeout=60)
        pardoned.append(f"{path} {alone.status_code} {body:.300}")
        return alone.status_code >= 500

    pardoned: list[str] = []
    fuzzer = Fuzzer("gateway's models", house.gateway, {"authorization": f"Bearer {house.keys['own']}"})
    fuzzer.pardon = litellms_own
    headers = st.dictionaries(st.sampled_from(HEADERS), TEXTS.filter(_fits_a_header), max_size=3)
    for path, good in DIALECTS.items():
        bodies = st.one_of(mutated(good, FIELDS).map(json.dumps), JSON.map(json.dumps), st.binary(max_size=80))

        def send(drawn: tuple[Any, dict[str, str]], path: str = path) -> None:
            body, more = drawn
            told = {**more, "content-type": "application/json"}
            fuzzer.send("POST", house.gateway + path, data=body, headers=told)

        drive(st.tuples(bodies, headers), TOTAL * 25 // 300, send)
    print("LiteLLM alone fails on these too:", *sorted(set(pardoned))[:20], sep="\n  ")
    finish(house, fuzzer, TOTAL // 8)


def _for_litellm_alone(body: Any) -> Any:
    """The same body for the base model: LiteLLM alone knows no agents, which here answer to any name and to none."""
    try:
        told = json.loads(body)
    except (ValueError, TypeError):
        return body
    return json.dumps(told | {"model": "metaclaw/metaclaw-base"}) if isinstance(told, dict) else body


def _fits_a_header(text: str) -> bool:
    return text.isprintable() and text.isascii() and text == text.strip()


def test_fuzzed_requests_to_the_console(house: House) -> None:
    with httpx.Client(base_url=house.console, timeout=30, verify=False) as client:
        cookie = session(client, house, "proxy_admin")
        page = client.get("/", headers=cookie).text
    token = page.split('"X-CSRF-Token": "')[1].split('"')[0]
    headers = {**cookie, "x-csrf-token": token, "origin": house.console}
    fuzzer = Fuzzer("console", house.console, headers)
    document = create_app(house.settings, house.config).openapi()
    document["paths"].pop("/live/overview")  # has no end
    from_document(fuzzer, document, TOTAL // 10)
    names = (
        "value", "comment", "version", "to", "mode", "name", "description", "body", "category", "triggers", "key",
        "theme", "answer", "windows", "sleep_start", "sleep_end", "idle_minutes", "calendar",
    )  # fmt: skip
    forms = st.dictionaries(st.sampled_from(names), TEXTS, max_size=6)
    acting = [filled(route) for route in sorted(ACTING - {"POST /health"})]
    acting += [("POST", "/agents/alpha/settings"), ("POST", "/skills/alpha"), ("POST", "/skills/_shared/preview")]
    acting += [("POST", "/sign-in"), ("POST", "/theme")]

    def send(drawn: tuple[tuple[str, str], dict[str, str]]) -> None:
        (method, path), form = drawn
        data = {name: text.encode("utf-8", "surrogatepass") for name, text in form.items()}
        fuzzer.send(method, house.console + path, data=data)

    drive(st.tuples(st.sampled_from(acting), forms), TOTAL // 10, send)
    finish(house, fuzzer, TOTAL // 10)
