"""What the pages show, with nothing there, with hostile text, and with parts away."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from metaclaw_hooks.types import Reward

from metaclaw_plugin.console import shown
from metaclaw_plugin.console.conversation import same_beginning
from metaclaw_plugin.console.curves import lineage
from metaclaw_plugin.console.guard import MAX_BODY
from metaclaw_plugin.console.house import House
from metaclaw_plugin.console.pages import FOLDER
from metaclaw_plugin.console.rooms import overview
from metaclaw_plugin.console.tokens import STEPS, Tokens, tint
from metaclaw_plugin.skills.query import BLOCK_CLOSE, BLOCK_OPEN
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.adapters import record_candidate
from metaclaw_plugin.store.rewards import put_rewards
from tests.console.conftest import Browser, store_traces
from tests.console.hostile import HOSTILE, hostile_trace
from tests.publishing_cases import serve, version_body
from tests.store_cases import a_trace

PAGES = ("/", "/agents/alpha", "/agents/alpha/conversations", "/sessions/ses-0", "/skills", "/skills/alpha", "/health")


class Seen(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def assert_harmless(text: str) -> None:
    """No script but our files, no style or handler in the markup, no address of others, no character that hides."""
    for tag, attributes in Seen(text).tags:
        assert tag not in ("iframe", "object", "embed", "base", "style", "img"), tag
        assert tag != "meta" or "http-equiv" not in attributes
        if tag == "script":
            assert re.fullmatch(r"/static/[\w/.-]+", attributes["src"] or "")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("href", "src", "action", "hx-get", "hx-post"):
                assert re.match(r"[/#?]", value or ""), (tag, name, value)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]", text.replace("\n", ""))


def test_nothing_that_was_said_acts_on_a_page(filled: House, admin: Browser) -> None:
    rationale = "\n".join(HOSTILE).replace("\x00", "").replace("\ud800", "")
    store_traces(filled, hostile_trace())
    with filled.writing() as c:
        put_rewards(c, "tr-h", [Reward("<b>judge</b>", 0.5, rationale, 0.5, rationale)], 1.0)
        serve(c, 1, "alpha")
        c.execute(
            sa.update(schema.adapters).values(decision={"sentence": rationale, "<i>": rationale}, problem=rationale)
        )
        c.execute(schema.counters.insert().values(name="hook_calls", label="<b>x</b>:score_trace", value=1, at=1.0))
    for path in (
        *PAGES,
        "/sessions/ses-h",
        "/traces/tr-h/messages?end=3",
        *(f"/traces/tr-h/messages/{n}" for n in range(-1, 3)),
    ):
        page = admin.get(path)
        assert_harmless(page)
    page = admin.get("/sessions/ses-h")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert '<span class="odd">U+202E</span>' in page
    assert '<span class="odd">U+0000</span>' in page
    assert '<span class="odd">U+D800</span>' in page
    assert "مرحبا بالعالم" in page


def test_hostile_addresses_and_notes_are_only_text(filled: House, admin: Browser) -> None:
    for path in (
        "/sessions/%3Cscript%3E",
        "/agents/%3Cscript%3E",
        "/traces/%3Cb%3E",
        "/skills/..%2f..%2fetc",
        "/nowhere/<b>",
    ):
        answer = admin.client.get(path, headers=admin.headers())
        assert answer.status_code in (400, 404, 409), path
        assert_harmless(answer.text)
    assert "<b>" not in admin.get("/?said=<b>evil</b>")
    assert "evil" not in admin.get("/?said=evil")
    assert_harmless(admin.get('/skills?q=<script>&owner="><b>'))


def test_a_megabyte_in_one_message_is_folded_and_can_be_had_whole(filled: House, admin: Browser) -> None:
    long = "x" * 1_000_000 + "THE END"
    store_traces(filled, a_trace(id="tr-l", session="ses-l", messages=({"role": "user", "content": long},)))
    page = admin.get("/sessions/ses-l")
    assert len(page) < 40_000
    assert "Show the 996,007 characters that are left" in page
    assert "THE END" in admin.get("/traces/tr-l/messages/0")


def test_a_turn_with_thousands_of_messages_shows_the_last_and_gives_the_rest_by_pieces(
    filled: House, admin: Browser
) -> None:
    messages = tuple({"role": "user", "content": f"number {n}."} for n in range(2_000))
    store_traces(filled, a_trace(id="tr-m", session="ses-m", messages=messages))
    page = admin.get("/sessions/ses-m")
    assert "number 1999." in page
    assert "number 1979." not in page
    assert "Show 1980 earlier messages" in page
    more = admin.get("/traces/tr-m/messages?end=1980")
    assert "number 1979." in more
    assert "end=1960" in more


def test_a_turn_shows_what_is_new_in_it(filled: House, admin: Browser) -> None:
    first = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"})
    answer = {"role": "assistant", "content": "Yes, one."}
    returned = {"role": "assistant", "content": "Yes, one.", "refusal": None}  # as clients send it back
    second = (*first, returned, {"role": "user", "content": "Two?"})
    store_traces(
        filled,
        a_trace(id="tr-1", session="ses-n", messages=first, response=answer),
        a_trace(id="tr-2", session="ses-n", turn=1, messages=second, response=answer),
    )
    page = admin.get("/sessions/ses-n")
    assert page.count("Be kind.") == 1
    assert page.count("One?") == 1
    assert page.count("Two?") == 1
    assert same_beginning((*first, answer), second) == 3


def test_injected_skills_are_set_apart() -> None:
    block = f"{BLOCK_OPEN}\n## be-brief\n{BLOCK_CLOSE}"
    assert shown.split_skills(f"You are terse.\n\n{block}\nThanks") == [
        (False, "You are terse.\n\n"),
        (True, block),
        (False, "\nThanks"),
    ]


@pytest.mark.parametrize("path", ["/", "/skills", "/health"])
def test_with_no_data_a_page_says_what_to_do_first(admin: Browser, path: str) -> None:
    page = admin.get(path)
    assert {"/": "metaclaw agents add", "/skills": "metaclaw skills add", "/health": "metaclaw hooks list"}[
        path
    ] in page


def test_an_agent_without_a_request_says_how_to_point_it_here(filled: House, admin: Browser) -> None:
    assert "metaclaw agents keys beta" in admin.get("/agents/beta")
    assert "point the agent at the gateway" in admin.get("/agents/beta/conversations")
    assert admin.client.get("/agents/beta/curves", headers=admin.headers()).json()["learning"]["at"] == []


def test_what_is_not_there_is_not_found(filled: House, admin: Browser) -> None:
    for path in (
        "/agents/gamma",
        "/sessions/none",
        "/traces/none",
        "/skills/gamma",
        "/nowhere",
        "/traces/tr-0/messages/7",
    ):
        admin.get(path, 404)


def test_a_store_that_is_away_is_said_and_comes_back(filled: House, admin: Browser) -> None:
    path = filled.settings.home / "metaclaw.db"
    filled.engine.dispose()
    kept = path.read_bytes()
    for extra in ("-wal", "-shm"):
        path.with_name(path.name + extra).unlink(missing_ok=True)
    path.write_bytes(b"this is no database" * 100)
    for page in (*PAGES, "/traces/tr-0", "/traces/tr-0/tokens", "/traces/tr-0/messages/0"):
        assert "The store " in admin.get(page, 503), page
    assert "The store " in admin.post("/traces/tr-0/feedback", 503, value="1")
    assert "The store does not answer" in overview.table(filled, "")
    filled.engine.dispose()
    path.write_bytes(kept)
    assert "alpha" in admin.get("/")


def test_a_trainer_that_is_away_is_said_and_takes_no_page_away(filled: House, admin: Browser) -> None:
    filled.glance.look_now(None)
    for page in PAGES:
        admin.get(page)
    assert "the trainer is not running" in admin.get("/agents/alpha")
    assert re.search(r"trainer</strong> (down|waiting)", admin.get("/health"))


def test_a_version_says_what_it_was_trained_from(filled: House, admin: Browser) -> None:
    with filled.writing() as c:
        for number, parent in ((1, 0), (2, 1), (3, 1), (4, 3)):
            record_candidate(c, version_body(number, "alpha", parent=parent))
    page = admin.get("/agents/alpha")
    assert re.findall(r"trained from</th><td>([^<]*)<", page) == ["v3, v1, base", "v1, base", "v1, base", "base"]
    assert lineage(40, {40: 39, 39: 38}) == [39, 38]  # as far as the page has them
    assert lineage(2, {2: 2}) == []


def test_every_answer_keeps_the_browser_in_bounds(client: TestClient, admin: Browser, filled: House) -> None:
    for path in (*PAGES, "/nowhere", "/static/console.js", "/healthz"):
        headers = client.get(path, headers=admin.headers()).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors http://127.0.0.1:4000 http://localhost:4000" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == ("max-age=3600" if path.startswith("/static") else "no-store")


def test_a_body_without_end_is_refused(client: TestClient) -> None:
    assert client.post("/sign-in", content=b"x" * (MAX_BODY + 1)).status_code == 413
    chunks = iter([b"key=", b"x"])
    assert client.post("/sign-in", content=chunks).status_code == 413


def test_the_scripts_of_others_are_those_of_their_packages() -> None:
    vendor = FOLDER / "static" / "vendor"
    record = json.loads((vendor / "vendored.json").read_text())
    sums = {name: digest for package in record.values() for name, digest in package["sha256"].items()}
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in vendor.iterdir()}
    found.pop("vendored.json")
    assert found == sums
    assert all(any(name.endswith("LICENSE") for name in package["sha256"]) for package in record.values())


def test_tokens_are_tinted_by_how_likely_they_were(tiny_model: Any) -> None:
    tokens = Tokens(str(tiny_model))
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode("An otter \N{OTTER} swims").ids
    found = tokens.tinted(ids, [-0.01] * len(ids))
    assert found is not None
    assert "".join(stretch.text for stretch in found) == "An otter \N{OTTER} swims"
    assert [tint(value) for value in (0.0, -0.2, -1.0, -2.0, -4.0, -9.0)] == [0, 1, 2, 3, 4, 5]
    assert list(STEPS) == sorted(STEPS, reverse=True)


@pytest.mark.parametrize("model", [None, "no/such-model", "/nowhere", "a/b/c"])
def test_without_a_tokenizer_the_page_says_so(filled: House, admin: Browser, model: str | None) -> None:
    filled.tokens = Tokens(model)
    page = admin.get("/traces/tr-0/tokens")
    assert "Their text cannot be shown" in page
    assert "2 tokens" in page


def test_an_open_page_is_told_when_something_changed(filled: House, admin: Browser) -> None:
    text = overview.event("agents", overview.table(filled, ""))
    lines = text.splitlines()
    assert lines[0] == "event: agents"
    assert all(line.startswith("data: ") for line in lines[1:] if line)
    assert "alpha" in text
    trace = dataclasses.replace(a_trace(), id="tr-new")
    store_traces(filled, trace)
    assert filled.live.get("") == filled.live.get("")
