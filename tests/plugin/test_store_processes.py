"""Several processes on one store: nothing is counted twice, merged or lost."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces, stored_bytes
from tests.store_cases import TRACE, a_trace

PROCESSES = 3
REQUESTS = 12
SETTINGS = Settings(sessions={"held_out_one_in": 0})  # type: ignore[arg-type]


def work(url: str, me: int) -> None:
    """One gateway process: requests of a session that all share, and conversations of its own."""
    engine = open_store(url)
    talk: list[dict[str, str]] = []
    for n in range(REQUESTS):
        shared = RequestEvidence({"x-session-id": "shared"}, {"messages": [{"role": "user", "content": f"{me} {n}"}]})
        talk.append({"role": "user", "content": f"question {n} to process {me}"})
        with engine.begin() as c:
            ours = sessions.resolve(c, "alpha", sessions.hear(shared, SETTINGS), time.time(), SETTINGS)
            heard = sessions.hear(RequestEvidence({}, {"messages": talk}), SETTINGS)
            alone = sessions.resolve(c, "alpha", heard, time.time(), SETTINGS)
        answer = {"role": "assistant", "content": f"answer {n} of process {me}"}
        with engine.begin() as c:
            for turn, name in ((ours, "shared"), (alone, "alone")):
                sessions.settle(c, turn, [answer], time.time(), None)
                trace = a_trace(id=f"{name}-{me}-{n}", session=turn.session, turn=turn.turn, exchange=turn.exchange)
                insert_traces(c, [trace])
        talk.append(answer)
    engine.dispose()


@pytest.mark.law(3)
def test_law_3_every_trace_of_every_process_is_there_once_in_its_place(store: Engine) -> None:
    url = store.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")  # as gateway workers: no connection is inherited
    running = [spawn.Process(target=work, args=(url, me)) for me in range(PROCESSES)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * PROCESSES
    t = schema.traces.c
    with store.connect() as c:
        rows = c.execute(sa.select(t.id, t.session, t.turn, t.exchange, t.size)).all()
        assert stored_bytes(c) == sum(row.size for row in rows)
        by_session = Counter(row.session for row in rows)
    total = PROCESSES * REQUESTS
    shared = [row for row in rows if row.id.startswith("shared")]
    assert len(rows) == 2 * total
    assert len({row.session for row in shared}) == 1
    assert sorted(row.turn for row in shared) == list(range(total))
    assert sorted(by_session.values()) == [REQUESTS] * PROCESSES + [total]
    for me in range(PROCESSES):
        own = [row for row in rows if row.id.startswith(f"alone-{me}-")]
        assert sorted((row.turn, row.exchange) for row in own) == [(n, n) for n in range(REQUESTS)]


def insert_same(url: str) -> None:
    engine = open_store(url)
    for n in range(30):
        with engine.begin() as c:
            insert_traces(c, [a_trace(id=f"tr-{n}", agent=agent) for agent in ("beta", "alpha")][n % 2 :])
    engine.dispose()


@pytest.mark.law(3)
def test_law_3_the_same_trace_from_two_processes_is_stored_and_weighed_once(store: Engine) -> None:
    url = store.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    running = [spawn.Process(target=insert_same, args=(url,)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    with store.connect() as c:
        ids = c.execute(sa.select(schema.traces.c.id)).scalars().all()
        sizes = c.execute(sa.select(sa.func.sum(schema.traces.c.size))).scalar_one()
        assert sorted(ids) == sorted(f"tr-{n}" for n in range(30))
        assert stored_bytes(c) == sizes
    assert TRACE.id in ids
