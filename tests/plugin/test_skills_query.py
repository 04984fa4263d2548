"""The query is what the human said, whatever the client wraps around it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from metaclaw_plugin.skills.query import awaits_answer, build_query, clean, humans_backwards

REQUESTS = Path(__file__).parents[1] / "data" / "openclaw"
INTERNAL = {
    "role": "user",
    "content": [
        {"type": "text", "text": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nx\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"}
    ],
}


def recorded(name: str) -> list[dict]:
    body = json.loads((REQUESTS / name).read_text())["body"]
    return body.get("messages") or body["input"]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("chat_turn1_webchat.json", "Please help me plan a trip to Rome in May"),
        ("chat_turn2_with_tool_history.json", "second turn alpha"),
        ("responses_api.json", "Hi resp, RUNTOOL please"),
        ("aux_session_title.json", "Write me a haiku about otters"),
    ],
)
def test_a_recorded_openclaw_request_asks_what_the_human_asked(name: str, asked: str) -> None:
    assert build_query(recorded(name)).text == asked


def test_earlier_questions_are_context_and_answers_are_not() -> None:
    query = build_query(recorded("chat_turn2_with_tool_history.json"))
    assert query.context == "Hi alpha, RUNTOOL please"


@pytest.mark.parametrize(
    "wrapped",
    [
        "[Sun 2026-11-22 02:16 UTC] Sort my mail",
        "[Telegram Ann id:7 +2m 2026-11-22T02:16Z] Sort my mail\n[message_id: 99]",
        'Conversation info (untrusted metadata):\n```json\n{"sender": "ann"}\n```\n\nSort my mail',
        "System: [2026-11-22 02:16:01] Node connected\n\nSort my mail",
        "Sort my mail\n\nRuntime: agent=alpha | session=agent:alpha:main | channel=webchat",
        "<system-reminder>Files changed: a.py</system-reminder>\nSort my mail",
        "Sort my mail\n<metaclaw-skills>\n## tests\nWrite tests.\n</metaclaw-skills>",
        "Sort my mail\n<metaclaw-skills>\nthe rest was cut off",
        "<system-reminder>one</system-reminder>Sort my mail<system-reminder>\ntwo\n</system-reminder>",
        "<environment_details>a <system-reminder>b</system-reminder></environment_details>\nSort my mail",
        "Sender (untrusted metadata):\n```json\n{}\n```\nChat (untrusted, not yours):\n```\n{}\n```\n\nSort my mail",
        "[from: Ann] [Sun 2026-11-22 02:16 UTC] Sort my mail",
    ],
)
def test_what_a_channel_adds_is_taken_off(wrapped: str) -> None:
    assert clean(wrapped) == "Sort my mail"


def test_ordinary_brackets_and_code_stay() -> None:
    text = "Why does [x for x in y] raise? And what is `Runtime: fast`?"
    assert clean(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "What does <system-reminder> mean?",
        "Sender (untrusted metadata):\n```json\nthat never ends",
        "</system-reminder> comes before <system-reminder>",
    ],
)
def test_what_does_not_end_is_the_humans_own(text: str) -> None:
    assert clean(text) == text


# What a client may repeat without end. A pattern that goes through the rest of the text for each of them, as a lazy
# one does, takes minutes for a request of the permitted size.
HOSTILE = [
    "<system-reminder>",
    "<system-reminder></system-reminder><",
    "a (untrusted):\n```json\n",
    "(untrusted",
    "\n```\t\t\t",
    "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>",
    "<metaclaw-skills>",
    "Runtime: a",
    "Runtime: a=\n",
    "System: [",
    "[message_id:",
    "[from ",
    "[2026-11-22 ",
    "[2026-11-22 02:16\n",
    "data:a;base64,",
]


@pytest.mark.parametrize("repeated", HOSTILE)
def test_no_text_takes_long(repeated: str) -> None:
    thirty_two_kilobytes = repeated * (32_000 // len(repeated))
    megabyte = repeated * (1_000_000 // len(repeated))
    messages = [{"role": "user", "content": text} for text in (*[thirty_two_kilobytes] * 20, megabyte)]
    started = time.process_time()
    build_query(messages)
    awaits_answer(messages)
    assert time.process_time() - started < 1


def test_thousands_of_the_clients_own_messages_are_not_all_gone_through() -> None:
    own = {"role": "user", "content": "<system-reminder>x</system-reminder>\n" * 860}
    messages = [{"role": "user", "content": "hi"}, *[own] * 1000]
    started = time.process_time()
    assert build_query(messages).text == ""
    assert awaits_answer(messages) is False
    assert time.process_time() - started < 1
    assert build_query(messages[:20]).text == "hi"


def test_internal_context_is_no_human_message_wherever_it_stands() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "result"},
        INTERNAL,
    ]
    assert list(humans_backwards(messages)) == [1]
    assert awaits_answer(messages) is False, "a tool loop goes on"
    assert awaits_answer([*messages[:2], INTERNAL]) is True
    assert awaits_answer([INTERNAL]) is False


def test_an_image_alone_is_a_human_message_with_no_words() -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]
    assert list(humans_backwards(messages)) == [0]
    assert build_query(messages).text == ""


def test_a_message_of_a_million_characters_is_cut_before_it_is_searched() -> None:
    assert len(build_query([{"role": "user", "content": "word " * 200_000}]).text) <= 8_000
