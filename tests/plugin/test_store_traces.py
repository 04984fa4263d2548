"""Traces go in and come out exactly, on both databases."""

from __future__ import annotations

import math
import threading
import zlib

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import StoreError, UnknownSessionError, UnknownTraceError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.codec import (
    decode_ids,
    decode_logprobs,
    decode_trace,
    encode_ids,
    encode_logprobs,
    encode_trace,
    short_text,
)
from metaclaw_plugin.store.counters import count, read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.export import export_traces, list_summaries
from metaclaw_plugin.store.facts import get_fact, set_fact
from metaclaw_plugin.store.sessions import Evidence
from metaclaw_plugin.store.traces import (
    OVER_QUOTA,
    TraceFilter,
    find_trace,
    get_trace,
    insert_traces,
    iter_traces,
    load_session,
    stored_bytes,
)
from tests.store_cases import TRACE, a_trace, opened

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.integers(0, 2**32 - 1)))
@pytest.mark.law(2)
def test_law_2_token_ids_come_back_as_they_were(ids: list[int]) -> None:
    assert decode_ids(encode_ids(ids)) == tuple(ids)


@given(st.lists(st.floats(allow_nan=False)))
@pytest.mark.law(2)
def test_law_2_logprobs_come_back_to_the_bit(logprobs: list[float]) -> None:
    found = decode_logprobs(encode_logprobs(logprobs))
    assert found is not None
    assert [value.hex() for value in found] == [value.hex() for value in logprobs]


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_messages_of_any_json_come_back(message: dict[str, object]) -> None:
    trace = a_trace(messages=(message,), response=message)
    row = encode_trace(trace) | {"purpose": "unsettled"}
    assert decode_trace(row) == trace


def test_token_layout_is_little_endian_by_place_and_log_probabilities_whole() -> None:
    assert zlib.decompress(encode_ids([1, 256]) or b"") == b"\x01\x00\x00\x01\x00\x00\x00\x00"
    assert encode_logprobs([-2.0]) == b"\x00\x00\x00\x00\x00\x00\x00\xc0"
    assert encode_ids(None) is None
    assert decode_logprobs(None) is None
    assert decode_ids(encode_ids([])) == ()
    with pytest.raises(ValueError, match="cannot be read"):
        decode_ids(b"\x01\x00\x00\x00")


def test_a_long_prompt_costs_about_a_byte_a_token() -> None:
    words = [zlib.crc32(str(place % 5000).encode()) % 49_000 for place in range(20_000)]  # as many as OpenClaw's
    assert len(encode_ids(words) or b"") < 2 * len(words)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": (-1,)},
        {"response_token_ids": (2**32,)},
        {"response_token_ids": (1.5,)},
        {"response": {"role": object()}},
    ],
)
def test_what_cannot_be_stored_exactly_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="trace tr-0"):
        encode_trace(a_trace(**changes))


def test_damaged_row_is_named() -> None:
    row = encode_trace(TRACE) | {"body": b"no zlib"}
    with pytest.raises(StoreError, match="tr-0"):
        decode_trace(row)


def test_short_text_fits_every_database() -> None:
    assert short_text("a\x00b\ud800c", 4) == "ab?"
    assert short_text(None, 3) is None


def test_trace_round_trip(store: Engine) -> None:
    bare = a_trace(
        id="tr-1", prompt_token_ids=None, response_token_ids=None, response_logprobs=None, first_token_at=None
    )
    with store.begin() as c:
        report = insert_traces(c, [TRACE, encode_trace(bare)])
    assert report.stored == ("tr-0", "tr-1")
    with store.connect() as c:
        assert get_trace(c, "tr-0") == TRACE
        assert get_trace(c, "tr-1") == bare


def test_minus_infinity_is_kept_and_not_repaired(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [a_trace(response_logprobs=(-math.inf, -0.5))])
        assert get_trace(c, "tr-0").response_logprobs == (-math.inf, -0.5)


@pytest.mark.law(3)
def test_law_3_a_trace_that_is_written_twice_is_there_once(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [TRACE])
    with store.begin() as c:
        again = insert_traces(c, [TRACE, a_trace(id="tr-1")])
    assert (again.known, again.stored) == (("tr-0",), ("tr-1",))
    with store.connect() as c:
        assert [trace.id for trace in iter_traces(c)] == ["tr-0", "tr-1"]
        assert stored_bytes(c) == sum(encode_trace(trace)["size"] for trace in iter_traces(c))


def test_unknown_trace_and_session(store: Engine) -> None:
    with store.connect() as c:
        with pytest.raises(UnknownTraceError):
            get_trace(c, "tr-9")
        with pytest.raises(UnknownSessionError):
            load_session(c, "ses-9")
        assert find_trace(c, "alpha", "tr-9") is None


def test_filters_narrow_and_pages_go_on(store: Engine) -> None:
    traces = [
        a_trace(id=f"tr-{n}", agent="alpha" if n % 2 else "beta", session=f"s{n % 3}", turn=n, finished_at=float(n))
        for n in range(250)
    ]
    with store.begin() as c:
        insert_traces(c, traces)
    with store.connect() as c:
        assert sorted(t.id for t in iter_traces(c)) == sorted(t.id for t in traces)
        assert {t.agent for t in iter_traces(c, agent="beta")} == {"beta"}
        assert len(list(iter_traces(c, session="s1"))) == sum(n % 3 == 1 for n in range(250))
        assert {t.finished_at for t in iter_traces(c, since=10.0, until=12.0)} == {10.0, 11.0}
        assert len(list(iter_traces(c, limit=120))) == 120
        summaries = list_summaries(c, TraceFilter(), 2, newest_first=True)
        assert [row["seq"] for row in summaries] == [250, 249]
        assert [row["seq"] for row in list_summaries(c, TraceFilter(after_seq=248), 9)] == [249, 250]


@pytest.mark.law(4)
def test_law_4_a_trace_is_found_by_its_own_agent_alone(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [TRACE])
        assert find_trace(c, "alpha", "tr-0") == "tr-0"
        assert find_trace(c, "alpha", "chatcmpl-1") == "tr-0"
        assert find_trace(c, "beta", "tr-0") is None
        assert find_trace(c, "beta", "chatcmpl-1") is None


def test_session_is_loaded_in_order(store: Engine) -> None:
    with store.begin() as c:
        session = opened(c, "alpha", Evidence("x-session-id", "one"), 5.0)
        insert_traces(c, [a_trace(id=f"tr-{turn}", session=session, turn=turn) for turn in (2, 0, 1)])
        found = load_session(c, session)
    assert [trace.turn for trace in found.traces] == [0, 1, 2]
    assert (found.agent, found.started_at, found.closed_at, found.held_out) == ("alpha", 5.0, None, False)


def test_past_the_quota_nothing_more_is_stored_and_it_is_counted(store: Engine) -> None:
    size = encode_trace(TRACE)["size"]
    with store.begin() as c:
        report = insert_traces(c, [a_trace(id=f"tr-{n}") for n in range(3)], max_bytes=2 * size)
    assert report.stored == ("tr-0", "tr-1")
    assert report.over_quota == ("tr-2",)
    with store.connect() as c:
        assert read_counters(c, OVER_QUOTA) == {OVER_QUOTA: {"alpha": 1}}
        assert len(list(iter_traces(c))) == 2


def test_export_has_the_fields_of_a_trace_and_its_rewards(store: Engine) -> None:
    with store.begin() as c:
        insert_traces(c, [TRACE])
        reward = {
            "trace_id": "tr-0",
            "source": "judge",
            "value": 0.5,
            "confidence": 1.0,
            "rationale": "good",
            "at": 1.0,
        }
        c.execute(schema.rewards.insert().values(**reward))
        c.execute(schema.traces.update().values(reward=0.5, score="scored"))
        (record,) = export_traces(c, TraceFilter())
    assert list(record["response_token_ids"]) == [5, 6]
    assert record["skills"] == [{"name": "be-terse", "version": "0123456789ab", "shared": True}]
    assert (record["reward"], record["score"]) == (0.5, "scored")
    assert [(r["source"], r["value"]) for r in record["rewards"]] == [("judge", 0.5)]


def test_counters_add_up_from_many_threads(store: Engine) -> None:
    def add() -> None:
        for _ in range(20):
            with store.begin() as c:
                count(c, "hits", "alpha")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.begin() as c:
        count(c, "hits", "beta", -3)
        assert read_counters(c, "hits") == {"hits": {"alpha": 80, "beta": -3}}


def test_facts_are_replaced(store: Engine) -> None:
    with store.begin() as c:
        assert get_fact(c, "cursor") is None
        set_fact(c, "cursor", {"at": 1})
        set_fact(c, "cursor", [2])
        assert get_fact(c, "cursor") == [2]


def test_a_reader_sees_one_moment_while_others_write(store: Engine) -> None:
    options = {"isolation_level": "REPEATABLE READ"} if store.dialect.name == "postgresql" else {}
    with store.connect().execution_options(**options) as reader:
        assert list(iter_traces(reader)) == []
        with store.begin() as writer:
            insert_traces(writer, [TRACE])
        assert list(iter_traces(reader)) == []


def test_failed_transaction_leaves_nothing(store: Engine) -> None:
    def fail() -> None:
        with store.begin() as c:
            insert_traces(c, [TRACE])
            get_trace(c, "tr-9")

    with pytest.raises(UnknownTraceError):
        fail()
    with store.connect() as c:
        assert list(iter_traces(c)) == []
        assert stored_bytes(c) == 0


@pytest.mark.parametrize(
    "url", ["no url", "nosuchdb://x", "sqlite:////proc/nowhere/x.db", "postgresql://u:pw@127.0.0.1:1/x"]
)
def test_store_that_cannot_be_opened_says_so_without_the_password(url: str) -> None:
    with pytest.raises(StoreError, match="cannot open the store") as caught:
        open_store(url)
    assert "pw" not in str(caught.value)


def test_two_processes_may_open_a_new_store_at_once(store_url: str) -> None:
    engines: list[Engine] = []
    threads = [threading.Thread(target=lambda: engines.append(open_store(store_url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 8
    for engine in engines:
        with engine.connect() as c:
            assert c.execute(sa.select(sa.func.count()).select_from(schema.traces)).scalar_one() == 0
        engine.dispose()
