"""docs/http.md and docs/sessions.md say what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.answer import ADAPTER_HEADER, TRACE_HEADER
from metaclaw_plugin.gateway.identity import AGENT_HEADER
from metaclaw_plugin.gateway.planning import RECORD_HEADER
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.settings import SessionSettings, StoreSettings

ROOT = Path(__file__).resolve().parent.parent.parent
HTTP = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
SESSIONS = (ROOT / "docs" / "sessions.md").read_text(encoding="utf-8")


def test_routes_in_the_docs_are_those_of_the_gateway() -> None:
    spec = importlib.util.spec_from_file_location("write_http_docs", ROOT / "scripts" / "write_http_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "/metaclaw/v1/feedback" in HTTP
    assert module.with_routes(HTTP) == HTTP, "run: python scripts/write_http_docs.py"


def test_headers_are_documented() -> None:
    for header in (AGENT_HEADER, RECORD_HEADER, TRACE_HEADER.decode(), ADAPTER_HEADER.decode()):
        assert f"`{header}`" in HTTP
    source = Path(sessions.__file__).read_text(encoding="utf-8")
    for header in re.findall(r'headers\.get\("(x-[a-z-]+)"', source):
        assert f"`{header}`" in HTTP or f"`{header}`" in SESSIONS, header


def test_evidence_is_documented_in_the_order_in_which_it_is_taken() -> None:
    everything: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "x-session-id": ({"x-session-id": "1"}, {}),
        "x-litellm-session-id": ({"x-litellm-session-id": "1"}, {}),
        "affinity": ({"x-session-affinity": "1"}, {}),
        "prompt_cache_key": ({}, {"prompt_cache_key": "1"}),
        "metadata": ({}, {"metadata": {"session_id": "1"}}),
        "runtime": ({}, {"messages": [{"role": "user", "content": "Hi\n\nRuntime: agent=a | sessionId=1"}]}),
    }
    headers = {name: value for given, _ in everything.values() for name, value in given.items()}
    body = {name: value for _, given in everything.values() for name, value in given.items()}
    order = []
    for name, (named, fields) in everything.items():
        found = sessions._named(RequestEvidence(headers, body), body.get("messages", []))
        assert found is not None
        order.append(found.name)
        for gone in named:
            del headers[gone]
        for gone in fields:
            del body[gone]
        assert order[-1] == name
    table = SESSIONS[SESSIONS.index("| evidence |") :]
    words = ["x-session-id", "x-litellm-session-id", "x-session-affinity", "prompt_cache_key", "metadata.session_id"]
    words += ["previous_response_id", "sessionId=", "the conversation itself"]
    places = [table.index(word) for word in words]
    assert places == sorted(places)


def test_settings_and_their_defaults_are_documented() -> None:
    defaults = SessionSettings()
    assert f"{defaults.idle_timeout:.0f} by default" in SESSIONS
    assert f"`metaclaw.sessions.held_out_one_in`, {defaults.held_out_one_in} by default" in SESSIONS
    for name in SessionSettings.model_fields:
        assert f"metaclaw.sessions.{name}" in SESSIONS
    for name in StoreSettings.model_fields:
        assert f"metaclaw.store.{name}" in SESSIONS
