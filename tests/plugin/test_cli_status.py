"""The status: read from a real store, from real HTTP, and right about why nothing is training."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Mode

from metaclaw_plugin.cli.status import columns, duration, render
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.settings import RlSettings, Settings
from metaclaw_plugin.status.activity import read_activity, sparkline
from metaclaw_plugin.status.collect import collect
from metaclaw_plugin.status.probes import Question, ask
from metaclaw_plugin.status.store_reader import StoredAgent, read_store
from metaclaw_plugin.status.why import TrainerView, why_not_training
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.facts import set_fact
from metaclaw_plugin.store.leases import this_worker

AGENT = StoredAgent(
    name="plain",
    mode=None,
    version=3,
    candidates=0,
    traces=20,
    unscored=0,
    without_reward=0,
    unforwarded=0,
    forwarded=4,
    trained=16,
    skipped=0,
    newest=20,
    trainable=20,
)
THERE = {"agent": "plain", "queued": 4, "batch_size": 8, "training": False, "idle_reason": "4 of 8 samples queued"}


def why(agent: StoredAgent = AGENT, mode: str = "rl", there: dict[str, Any] | None = THERE, **more: Any) -> str:
    agents = {} if there is None else {"plain": there}
    trainer = TrainerView(agents, more.pop("trainer_problem", None))
    return why_not_training(agent, mode, more.pop("rl", True), trainer, more.pop("worker", None))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (why, "4 of 8 samples queued"),
        (lambda: why(mode="off"), "mode off: passed through"),
        (lambda: why(mode="skills_only"), "mode skills_only: learns skills, not weights"),
        (lambda: why(rl=False), "metaclaw.rl.enabled is false: no trainer"),
        (lambda: why(replace(AGENT, traces=0)), "no request yet: point the agent at the gateway with its key"),
        (lambda: why(there={**THERE, "training": True, "step": 4}), "training now: step 5"),
        (
            lambda: why(replace(AGENT, unscored=2, unforwarded=1), there=None, trainer_problem="is not running"),
            "the trainer is not running; 3 traces wait here",
        ),
        (
            lambda: why(replace(AGENT, unforwarded=5), worker="does not run"),
            "the worker does not run; 5 traces wait for it",
        ),
        (
            lambda: why(replace(AGENT, trainable=0, reasons=(("greedy sampling", 20),)), there=None),
            "none of the newest 20 traces is trainable: greedy sampling",
        ),
        (
            lambda: why(replace(AGENT, unscored=3), there={**THERE, "queued": 0}),
            "3 traces wait for their reward (it often comes with the next message)",
        ),
        (
            lambda: why(replace(AGENT, without_reward=20), there={**THERE, "queued": 0}),
            "no reward plugin has an opinion on its 20 traces: see `metaclaw hooks`",
        ),
        (
            lambda: why(replace(AGENT, unforwarded=2), there=None),
            "the trainer has no sample of it yet; 2 traces are on their way",
        ),
    ],
)
def test_the_first_thing_in_the_way_is_named(line: Any, expected: str) -> None:
    assert line() == expected


def trace(number: int, agent: str = "plain", **columns_: Any) -> dict[str, Any]:
    row: dict[str, Any] = {column.name: None for column in schema.traces.columns if column.name != "seq"}
    given = {
        "id": f"t{number}",
        "request_id": f"r{number}",
        "agent": agent,
        "session": "s",
        "turn": number,
        "exchange": number,
        "kind": "main",
        "route": "chat",
        "model": "m",
        "adapter_version": 0,
        "skill_generation": 0,
        "started_at": 1.0,
        "finished_at": 2.0,
        "trainable": True,
        "size": 1,
        "body": b"x",
        "score": "waiting",
        "purpose": "unsettled",
        "forward": "waiting",
    }
    # Columns that later rooms add and that must be set get a zero of their type.
    for column in schema.traces.columns:
        if column.name in row and not column.nullable and column.name not in given and column.server_default is None:
            given[column.name] = column.type.python_type()
        elif column.name in row and column.server_default is not None and column.name not in given:
            row.pop(column.name)
    return {**row, **given, **columns_}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, rl=RlSettings(remote_url="http://127.0.0.1:9"))


@pytest.fixture
def filled(settings: Settings) -> Settings:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        for name, mode in (("plain", None), ("formal", Mode.SKILLS_ONLY.value)):
            c.execute(sa.insert(schema.agents).values(name=name, mode=mode, settings={}, created_at=1.0))
        c.execute(sa.insert(schema.routes).values(agent="plain", version=3, changed_at=1.0))
        rows = [trace(n, score="scored", forward="trained") for n in range(4)]
        rows += [trace(n, score="scored") for n in range(4, 7)]
        rows += [trace(7), trace(8, score="unscored", forward="skipped", trainable=False, reason="greedy")]
        c.execute(sa.insert(schema.traces), rows)
        c.execute(sa.insert(schema.counters).values(name="traces_lost", label="plain", value=2, at=1.0))
        set_fact(c, "worker_heartbeat", {"owner": this_worker(), "at": time.time()})
    engine.dispose()
    return settings


def test_counts_are_those_of_the_store(filled: Settings) -> None:
    view = read_store(filled.store_url)
    formal, plain = view.agents
    assert (formal.name, formal.mode, formal.traces) == ("formal", "skills_only", 0)
    assert (plain.version, plain.traces, plain.trained, plain.unforwarded, plain.unscored) == (3, 9, 4, 3, 1)
    assert (plain.newest, plain.trainable, plain.reasons) == (9, 8, (("greedy", 1),))
    assert view.counters == (("traces_lost", "plain", 2),)


def test_the_standard_library_and_sqlalchemy_read_the_same(filled: Settings) -> None:
    other = filled.store_url.replace("sqlite:///", "sqlite+pysqlite:///")
    assert read_store(other) == read_store(filled.store_url)


def test_the_counts_are_taken_from_an_index_and_not_from_the_traces_themselves(filled: Settings) -> None:
    from metaclaw_plugin.status import store_reader

    engine = open_store(filled.store_url)
    with engine.connect() as c:
        plan = " ".join(str(row) for row in c.execute(sa.text(f"EXPLAIN QUERY PLAN {store_reader._COUNTS}")))
    engine.dispose()
    assert "COVERING INDEX" in plan


def test_reading_changes_nothing(filled: Settings) -> None:
    database = filled.home / "metaclaw.db"
    before = database.read_bytes()
    read_store(filled.store_url)
    assert database.read_bytes() == before


def test_a_store_that_is_none_is_a_problem_and_not_a_crash(settings: Settings) -> None:
    (settings.home / "metaclaw.db").write_text("this is no database, and long enough to be seen as none")
    with pytest.raises(StoreError, match="cannot read the store"):
        read_store(settings.store_url)
    status = collect(settings)
    assert len(status.problems) == 1
    assert "cannot read the store" in render(status)


def test_status_with_everything_down_still_tells_who_waits(filled: Settings) -> None:
    status = collect(filled)
    by_name = {process.name: process for process in status.processes}
    assert (by_name["trainer"].state, by_name["trainer"].detail) == ("down", "not running")
    assert by_name["worker"].state == "ready"  # by its heartbeat
    plain = next(agent for agent in status.agents if agent.name == "plain")
    assert plain.why == "the trainer is not running; 4 traces wait here"
    text = render(status)
    assert "plain" in text
    assert "traces_lost" in text


def test_a_worker_that_has_just_ended_does_not_count_as_running(filled: Settings) -> None:
    host, pid, started = this_worker().rsplit(":", 2)
    engine = open_store(filled.store_url)
    with engine.begin() as c:
        set_fact(c, "worker_heartbeat", {"owner": f"{host}:{pid}:{int(started) - 100}", "at": time.time()})
    engine.dispose()
    worker = next(process for process in collect(filled).processes if process.name == "worker")
    assert worker.state == "down"


@pytest.fixture
def trainer() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers GET /v1/agents as it is told, and keeps the last key it was shown."""
    told: dict[str, Any] = {"status": 200, "body": {"agents": []}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told["key"] = self.headers.get("Authorization")
            self.send_response(told["status"])
            self.end_headers()
            self.wfile.write(json.dumps(told["body"]).encode())

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()


def test_what_the_trainer_says_is_put_beside_the_store(filled: Settings, trainer: tuple[str, dict[str, Any]]) -> None:
    url, told = trainer
    told["body"] = {"agents": [THERE]}
    status = collect(filled.model_copy(update={"rl": RlSettings(remote_url=url, remote_api_key="secret")}))
    plain = next(agent for agent in status.agents if agent.name == "plain")
    assert (plain.queued, plain.batch_size, plain.why) == (4, 8, "4 of 8 samples queued")
    assert told["key"] == "Bearer secret"
    assert "secret" not in render(status)


def test_a_refused_key_is_named(filled: Settings, trainer: tuple[str, dict[str, Any]]) -> None:
    url, told = trainer
    told["status"] = 401
    status = collect(filled.model_copy(update={"rl": RlSettings(remote_url=url)}))
    plain = next(agent for agent in status.agents if agent.name == "plain")
    assert plain.why.startswith("the trainer refuses our key: check metaclaw.rl.remote_api_key")


@pytest.mark.parametrize("body", ["not json", [], {"agents": 3}, {"agents": [None]}])
def test_a_trainer_that_talks_nonsense_is_not_believed(
    filled: Settings, trainer: tuple[str, dict[str, Any]], body: Any
) -> None:
    url, told = trainer
    told["body"] = body
    status = collect(filled.model_copy(update={"rl": RlSettings(remote_url=url)}))
    plain = next(agent for agent in status.agents if agent.name == "plain")
    assert plain.why.startswith("the trainer gave an answer that cannot be read")


def test_a_probe_never_raises() -> None:
    assert ask(Question("http://127.0.0.1:9", "/")).problem == "not running"
    assert ask(Question("http://no-such-host.invalid", "/")).problem


def test_columns_and_durations_are_readable() -> None:
    assert columns([("A", "LONG"), ("longer", "x")]) == ["A       LONG", "longer  x"]
    assert [duration(s) for s in (5, 119, 600, 7200, 200000)] == ["5 s", "119 s", "10 min", "2 h", "2 d"]


def test_a_postgresql_url_is_read_through_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"cannot read the store postgresql://user:\*\*\*@127.0.0.1:9/none"):
        read_store("postgresql://user:secret@127.0.0.1:9/none")


def test_top_shows_traffic_and_the_curve_of_rewards(filled: Settings) -> None:
    from typer.testing import CliRunner

    from metaclaw_plugin.cli.top import app

    engine = open_store(filled.store_url)
    with engine.begin() as c:
        rows = [
            trace(n, agent="plain", reward=n / 10 - 2, score="scored", finished_at=time.time()) for n in range(10, 31)
        ]
        c.execute(sa.insert(schema.traces), rows)
    engine.dispose()
    activity = read_activity(filled.store_url, time.time())["plain"]
    assert activity.last_minute == 21
    assert activity.mean is not None
    assert abs(activity.mean - 0.05) < 1e-9
    config = filled.home / "config.yaml"
    config.write_text(f"metaclaw: {{home: {filled.home}, rl: {{remote_url: 'http://127.0.0.1:9'}}}}\n")
    done = CliRunner().invoke(app, ["--once", "--config", str(config)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "+0.05" in done.output
    assert "▁▁▁▂▂▃▃▃▄▄" in done.output
    assert "plain" in done.output


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [((), ""), ((-1.0,), "▁"), ((1.0, -1.0), "█▁"), ((-1.0, -1.0, 1.0, 1.0), "▁▁██"), ((0.0,) * 40, "▅" * 20)],
)
def test_the_curve_goes_from_minus_one_to_one(rewards: tuple[float, ...], expected: str) -> None:
    assert sparkline(rewards) == expected
