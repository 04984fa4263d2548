"""`metaclaw traces`: the commands on a real store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine
from typer.testing import CliRunner, Result

from metaclaw_plugin.cli.traces import app, parse_time
from metaclaw_plugin.errors import ConfigError, UnknownTraceError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.adapters import record_candidate
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces
from tests.publishing_cases import version_body
from tests.store_cases import TRACE, a_trace

DAY = 86_400.0


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    now = time.time()
    traces = [
        a_trace(id="tr-old", finished_at=now - 10 * DAY, response_id="resp-old"),
        a_trace(id="tr-new", finished_at=now - 60, response_id="resp-new"),
        a_trace(id="tr-b", agent="beta", session="ses-b", finished_at=now, trainable=False, reason="greedy"),
    ]
    with engine.begin() as c:
        insert_traces(c, traces)
    return engine


def run(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=answer)


def done(*words: str, answer: str | None = None) -> str:
    result = run(*words, answer=answer)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def listed(*words: str) -> list[str]:
    return [row["id"] for row in json.loads(done("list", "--json", *words))]


def test_list_narrows_and_shows_why_something_is_not_trainable(engine: Engine) -> None:
    assert listed() == ["tr-b", "tr-new", "tr-old"]
    assert listed("--agent", "alpha") == ["tr-new", "tr-old"]
    assert listed("--session", "ses-b") == ["tr-b"]
    assert listed("--since", "7d") == ["tr-b", "tr-new"]
    assert listed("--older-than", "7d") == ["tr-old"]
    assert listed("-n", "1") == ["tr-b"]
    assert "not trainable: greedy" in done("list", "--agent", "beta")


@pytest.mark.law(8)
def test_law_8_list_tells_support_and_query_apart(engine: Engine) -> None:
    settled = {
        "tr-b": {"purpose": "support"},
        "tr-new": {"purpose": "query", "forward": "skipped", "forward_reason": "of a skill generation before 3"},
        "tr-old": {"purpose": "held_out"},
    }
    with engine.begin() as c:
        for name, values in settled.items():
            c.execute(schema.traces.update().where(schema.traces.c.id == name).values(**values))
    support, query, held_out = done("list").splitlines()
    assert support.endswith("support: shown to the evolver, never trained on")
    assert query.endswith("not trained on: of a skill generation before 3")
    assert held_out.endswith("held out: replayed by the gate, never trained on")


@pytest.mark.parametrize("name", ["tr-new", "resp-new"])
def test_show_takes_either_id(engine: Engine, name: str) -> None:
    record = json.loads(done("show", name))
    assert record["id"] == "tr-new"
    assert record["response_logprobs"] == list(TRACE.response_logprobs or ())
    assert isinstance(run("show", "nosuch").exception, UnknownTraceError)


def test_export_writes_one_object_a_line(engine: Engine, tmp_path: Path) -> None:
    lines = done("export", "--agent", "alpha").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["tr-old", "tr-new"]
    done("export", "-o", str(tmp_path / "out.jsonl"))
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    found = json.loads(lines[0])
    for field in ("messages", "tools", "response", "prompt_token_ids", "sampling", "skills", "adapter_version"):
        assert field in found
    assert (found["reward"], found["rewards"], found["score"]) == (None, [], "waiting")


def test_export_into_a_pipe_that_closes_early_ends_quietly(engine: Engine) -> None:
    with engine.begin() as c:
        insert_traces(c, [a_trace(id=f"tr-{n}") for n in range(300)])
    command = [sys.executable, "-m", "metaclaw_plugin.cli.main", "traces", "export"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_delete_asks_reports_and_leaves_the_rest(engine: Engine) -> None:
    assert run("delete", "--agent", "alpha", answer="n\n").exit_code != 0
    assert len(listed()) == 3
    report = json.loads(done("delete", "--agent", "alpha", "--older-than", "7d", "--json", "--yes"))
    assert report["traces"] == 1
    assert listed() == ["tr-b", "tr-new"]
    assert "Delete 1 trace(s)" in done("delete", "--trace", "tr-b", answer="y\n")
    assert done("delete", "--all", "--yes").startswith("traces      1")
    assert listed() == []


def test_delete_names_the_versions_that_had_learned_from_what_went_and_no_others(engine: Engine) -> None:
    with engine.begin() as c:
        for agent in ("ada", "bob"):  # neither is listed: an agent that was removed leaves its versions behind
            for number in (1, 2):
                insert_traces(c, [a_trace(id=f"{agent}-{number}", agent=agent)])
                body = version_body(number, agent, parent=number - 1)
                record_candidate(c, body.model_copy(update={"trace_ids": [f"{agent}-{number}"]}))
        c.execute(schema.traces.update().values(forward="trained", sample_id="s"))
    first = json.loads(done("delete", "--trace", "ada-1", "--json", "--yes"))
    assert first["learned_by"] == ["ada@v1", "ada@v2"]
    assert "sent" not in first
    assert json.loads(done("delete", "--trace", "bob-2", "--json", "--yes"))["learned_by"] == ["bob@v2"]
    assert json.loads(done("delete", "--trace", "tr-new", "--json", "--yes"))["learned_by"] == []


@pytest.mark.law(9)
def test_law_9_delete_without_a_choice_deletes_nothing(engine: Engine) -> None:
    assert isinstance(run("delete", "--yes").exception, ConfigError)
    assert isinstance(run("delete", "--older-than", "soon", "--yes").exception, ConfigError)
    assert len(listed()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", 970.0),
        ("1m", 940.0),
        ("1970-01-01T00:00:10", 10.0),
        ("1970-01-02", DAY),
        ("1970-01-01T01:00:10+01:00", 10.0),
    ],
)
def test_times(text: str, expected: float) -> None:
    assert parse_time(text, 1000.0) == expected
