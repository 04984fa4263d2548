"""Which version answers a request, and when a version may be unloaded."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Kind, VersionState
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import UnknownVersionError, VersionStateError
from metaclaw_plugin.gateway.routing import InFlight, pick_route
from metaclaw_plugin.store import adapters as versions
from metaclaw_plugin.store import draining
from metaclaw_plugin.store.schema import in_flight, sessions
from tests.publishing_cases import Turn, serve, version_body
from tests.session_cases import add_session


@pytest.fixture
def engine(store: Engine) -> Engine:
    """SQLite and PostgreSQL in turn."""
    return store


def pin(c: sa.Connection, version: int | None) -> None:
    c.execute(sessions.update().where(sessions.c.id == "s1").values(adapter_version=version))


def test_without_any_version_the_base_model_answers(engine: Engine) -> None:
    with engine.begin() as c:
        add_session(c)
        route = pick_route(c, "ada", Turn())
        assert (route.model, route.adapter_version, route.left) == ("metaclaw/metaclaw-base", 0, None)


@pytest.mark.law(6)
def test_law_6_a_tool_loop_stays_on_the_version_that_asked_for_the_tool(engine: Engine) -> None:
    with engine.begin() as c:
        add_session(c)
        serve(c, 1)
        assert pick_route(c, "ada", Turn()).model == "metaclaw/ada@v1"
        serve(c, 2)
        loop = Turn(new_exchange=False, adapter_version=1)
        assert pick_route(c, "ada", loop).model == "metaclaw/ada@v1"
        assert pick_route(c, "ada", replace(loop, new_exchange=True)).model == "metaclaw/ada@v2"


def test_a_pinned_version_that_is_gone_is_left_visibly(engine: Engine) -> None:
    with engine.begin() as c:
        add_session(c)
        serve(c, 1)
        serve(c, 2)
        versions.set_state(c, "ada", 1, VersionState.RETIRED)
        route = pick_route(c, "ada", Turn(new_exchange=False, adapter_version=1))
        assert (route.adapter_version, route.left) == (2, 1)


def test_a_routed_version_that_is_gone_falls_to_the_newest_that_serves_then_to_the_base(engine: Engine) -> None:
    with engine.begin() as c:
        add_session(c)
        for number in (1, 2, 3):
            serve(c, number)
        versions.set_state(c, "ada", 3, VersionState.REJECTED)
        route = pick_route(c, "ada", Turn())
        assert (route.adapter_version, route.left) == (2, 3)
        for number in (1, 2):
            versions.set_state(c, "ada", number, VersionState.RETIRED)
        assert pick_route(c, "ada", Turn()).adapter_version == 0


@pytest.mark.law(4)
def test_law_4_routes_of_one_agent_never_reach_another(engine: Engine) -> None:
    with engine.begin() as c:
        serve(c, 1, "ada")
        serve(c, 7, "ada")
        serve(c, 3, "bob")
        assert pick_route(c, "bob", Turn()).model == "metaclaw/bob@v3"
        assert pick_route(c, "eve", Turn()).model == "metaclaw/metaclaw-base"


def test_side_requests_take_the_route_whatever_the_session_is_pinned_to(engine: Engine) -> None:
    with engine.begin() as c:
        serve(c, 1)
        serve(c, 2)
        assert pick_route(c, "ada", Turn(kind=Kind.SIDE, new_exchange=False, adapter_version=1)).adapter_version == 2


def test_only_a_serving_version_takes_the_route_and_only_legal_moves_are_made(engine: Engine) -> None:
    with engine.begin() as c:
        assert versions.record_candidate(c, version_body(1))
        assert not versions.record_candidate(c, version_body(1))
        with pytest.raises(VersionStateError, match="only a serving version"):
            versions.set_route(c, "ada", 1)
        with pytest.raises(UnknownVersionError, match="no adapter version 9"):
            versions.set_state(c, "ada", 9, VersionState.SERVING)
        versions.set_state(c, "ada", 1, VersionState.REJECTED, {"sentence": "worse"})
        with pytest.raises(VersionStateError, match="cannot become serving"):
            versions.set_state(c, "ada", 1, VersionState.SERVING)
        assert versions.get_version(c, "ada", 1).decision == {"sentence": "worse"}


def test_the_served_set_holds_serving_versions_and_only_candidates_in_question(engine: Engine) -> None:
    with engine.begin() as c:
        serve(c, 1)
        serve(c, 2)
        for number in (3, 4, 5):
            versions.record_candidate(c, version_body(number))
        versions.update_version(c, "ada", 3, wish=versions.WISH_SERVE)
        assert versions.served_set(c) == ["ada@v1", "ada@v2", "ada@v3", "ada@v5"]


def test_a_version_is_retired_only_when_off_route_idle_and_unpinned(engine: Engine) -> None:
    flights = InFlight(engine, "p1")
    with engine.begin() as c:
        add_session(c)
        serve(c, 1)
        pin(c, 1)
        ticket = flights.begin(c, "ada", 1)

    def retire(dead: tuple[str, ...] = (), since: float = 0.0) -> bool:
        with engine.begin() as c:
            return draining.retire_if_drained(c, "ada", 1, dead=dead, open_since=since)

    assert not retire(("p1",), time.time() + 1)  # on the route
    with engine.begin() as c:
        serve(c, 2)
    assert not retire(since=time.time() + 1)  # in flight
    flights.end(ticket)
    flights.flush()
    assert not retire()  # pinned by an exchange in progress
    with engine.begin() as c:
        pin(c, None)
    assert retire()
    with engine.begin() as c:
        assert versions.get_version(c, "ada", 1).version.state is VersionState.RETIRED


def test_what_a_dead_process_had_in_flight_holds_nothing(engine: Engine) -> None:
    with engine.begin() as c:
        serve(c, 1)
        InFlight(engine, "dead").begin(c, "ada", 1)
        serve(c, 2)
    with engine.begin() as c:
        assert not draining.retire_if_drained(c, "ada", 1, dead=(), open_since=0.0)
        assert draining.retire_if_drained(c, "ada", 1, dead=("dead",), open_since=0.0)


def test_a_rolled_back_transaction_leaves_the_row_to_the_next_request(engine: Engine) -> None:
    flights = InFlight(engine, "p1")
    with engine.connect() as c:
        flights.begin(c, "ada", 1)
        c.rollback()
    with engine.begin() as c:
        flights.begin(c, "ada", 1)
    with engine.begin() as c:
        assert c.scalar(sa.select(in_flight.c.requests)) == 2


def test_a_busy_process_writes_no_row_for_each_request(engine: Engine) -> None:
    flights = InFlight(engine, "p1")
    with engine.begin() as c:
        first = flights.begin(c, "ada", 1)
    flights.flush()
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with engine.begin() as c:
        tickets = [flights.begin(c, "ada", 1) for _ in range(50)]
    assert [line for line in statements if not line.startswith("BEGIN")] == []
    for ticket in [first, *tickets, *tickets]:
        flights.end(ticket)
    flights.flush()
    with engine.begin() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(in_flight)) == 0


@pytest.mark.law(6)
def test_law_6_no_request_begins_on_a_version_after_it_was_retired(engine: Engine) -> None:
    """Many requests against a publisher that flips and retires as fast as it can; each start checks what it got."""
    flights = InFlight(engine, "p1")
    stop = threading.Event()
    running: dict[int, int] = {}
    guard = threading.Lock()
    wrong: list[int] = []
    done = [0]
    with engine.begin() as c:
        serve(c, 1)

    def client(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            with engine.begin() as c:
                route = pick_route(c, "ada", Turn(kind=Kind.SIDE))
                ticket = flights.begin(c, "ada", route.adapter_version)
                with guard:
                    running[route.adapter_version] = running.get(route.adapter_version, 0) + 1
            time.sleep(dice.random() * 0.004)
            with guard:
                running[route.adapter_version] -= 1
                done[0] += 1
            flights.end(ticket)

    def beat() -> None:
        while not stop.is_set():
            flights.flush()
            time.sleep(0.002)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)] + [threading.Thread(target=beat)]
    for thread in threads:
        thread.start()
    retired: set[int] = set()
    try:
        for number in range(2, 22):
            with engine.begin() as c:
                serve(c, number)
            while number - 1 not in retired:
                with engine.begin() as c:
                    if draining.retire_if_drained(c, "ada", number - 1, dead=(), open_since=0.0):
                        retired.add(number - 1)
                        with guard:
                            wrong.extend([number - 1] * running.get(number - 1, 0))
                time.sleep(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(retired) == 20
    assert done[0] > 20
    with guard:
        assert not any(running.values())
