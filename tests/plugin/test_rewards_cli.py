"""`metaclaw hooks` and `metaclaw rewards` on a real store."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.rewards.judge import Judgement, Spent
from metaclaw_hooks.wire import HookFigures, HooksReply
from sqlalchemy.engine import Engine
from typer.testing import CliRunner

from metaclaw_plugin.cli.hooks import app as hooks
from metaclaw_plugin.cli.rewards import app as rewards
from metaclaw_plugin.errors import UnknownAgentError, UnknownTraceError
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.judge_book import StoreJudgeBook
from metaclaw_plugin.worker.scoring import Scorer, store_hook_counters
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path))
    monkeypatch.delenv("METACLAW_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def engine(home: Path) -> Engine:
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    fill(engine, make_trace(), make_trace(id="t2", agent="beta", session="s2"))
    return engine


def run(app: Any, *words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


async def work(home: Path) -> None:
    with worker_context(worker_settings(home)) as ctx:
        await Scorer(ctx).round()
        await feedback_round(ctx)
        store_hook_counters(ctx)


def test_ten_lines_in_the_folder_are_listed_with_what_they_did(home: Path, engine: Engine) -> None:
    write_hook(home, "alpha/brevity", "def score_trace(trace): return 1 if len(trace.response_text) < 9 else -1\n")
    write_hook(home, "broken", "def score_trace(trace:\n")
    asyncio.run(work(home))
    listed = json.loads(run(hooks, "list", "--json"))
    found = {row["plugin"]: row for row in listed["plugins"]}
    assert {"next_turn", "tool_outcome", "alpha/brevity"} == set(found)
    mine = found["alpha/brevity"]
    assert (mine["hook"], mine["agent"], mine["calls"], mine["failures"]) == ("score_trace", "alpha", 1, 0)
    assert mine["seconds"] > 0
    assert mine["scores_lone_reply"] is True
    [problem] = listed["problems"].values()
    assert "syntax error" in problem
    text = run(hooks, "list")
    assert "alpha/brevity" in text
    assert "not loaded: " in text


class _Trainer(BaseHTTPRequestHandler):
    """Answers `GET /v1/hooks` as a trainer with one plugin file more than this machine has."""

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        rows = [
            HookFigures(plugin=name, origin="x.py", agent=None, hook=hook, calls=calls, failures=1, seconds=0.5)
            for name, hook, calls in (("watch", "after_step", 3), ("theirs", "accept_sample", 7))
        ]
        assert self.path == "/v1/hooks"
        body = HooksReply(hooks=rows, problems={"/far/broken.py": "/far/broken.py cannot be read"}).model_dump_json()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())


def test_the_trainers_hooks_are_listed_with_what_they_did_there(home: Path, engine: Engine) -> None:
    write_hook(home, "watch", "def after_step(agent, metrics): pass\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Trainer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = home / "c.yaml"
    config.write_text(f"metaclaw: {{home: '{home}', rl: {{remote_url: 'http://127.0.0.1:{server.server_port}'}}}}\n")
    listed = json.loads(run(hooks, "list", "--json", "--config", str(config)))
    calls = {(row["plugin"], row["hook"]): (row["calls"], row["failures"]) for row in listed["plugins"]}
    assert calls["watch", "after_step"] == (3, 1)
    assert calls["theirs", "accept_sample"] == (7, 1)
    assert listed["problems"] == {"/far/broken.py": "/far/broken.py cannot be read"}
    assert listed["trainer_problem"] is None
    server.shutdown()
    server.server_close()
    text = run(hooks, "list", "--config", str(config))
    assert "what the trainer's hooks did is not known" in text


async def test_a_reward_is_shown_with_its_opinions(home: Path, engine: Engine) -> None:
    write_hook(home, "alpha/brevity", "def score_trace(trace): return 1.0\n")
    assert "No opinion yet" in run(rewards, "show", "t1")
    await work(home)
    shown = json.loads(run(rewards, "show", "t1", "--json"))
    assert (shown["reward"], shown["score"], shown["forward"]) == (1.0, "scored", "waiting")
    assert [(r["source"], r["value"]) for r in shown["rewards"]] == [("alpha/brevity", 1.0)]
    text = run(rewards, "show", "t1")
    assert "+1.000 (scored)" in text


async def test_added_feedback_takes_the_place_of_what_was_inferred(home: Path, engine: Engine) -> None:
    write_hook(home, "r", "def score_trace(trace): return 1.0\n")
    await work(home)
    assert "of alpha" in run(rewards, "add", "t1", "-0.5", "--comment", "use ISO dates")
    await work(home)
    assert rows(engine, "id", "reward") == [("t1", -0.5), ("t2", 1.0)]
    assert "use ISO dates" in run(rewards, "show", "t1")


def test_feedback_on_nothing_or_on_a_name_of_two_agents_is_refused(home: Path, engine: Engine) -> None:
    with pytest.raises(UnknownTraceError, match="--agent"):
        run(rewards, "add", "nothing", "1")
    with pytest.raises(UnknownTraceError, match="alpha, beta"):
        run(rewards, "add", "chatcmpl-1", "1")  # both agents have a response of that id
    assert "of beta" in run(rewards, "add", "chatcmpl-1", "1", "--agent", "beta")
    assert "of beta" in run(rewards, "add", "later", "1", "--agent", "beta")
    with pytest.raises(UnknownAgentError):
        run(rewards, "add", "t1", "1", "--agent", "gamma")
    assert CliRunner().invoke(rewards, ["add", "t1", "7"]).exit_code == 2


async def test_rescoring_is_for_one_agent_and_from_a_time_on(home: Path, engine: Engine) -> None:
    write_hook(home, "r", "def score_trace(trace): return 1.0\n")
    await work(home)
    assert run(rewards, "rescore", "--agent", "beta").startswith("1 trace(s)")
    assert rows(engine, "id", "score") == [("t1", "scored"), ("t2", "waiting")]
    assert run(rewards, "rescore", "--agent", "alpha", "--since", "1h").startswith("0 trace(s)")
    assert run(rewards, "rescore", "--agent", "alpha", "--since", "1970-01-01").startswith("1 trace(s)")


def test_rewards_can_be_tried_without_a_trace_of_it(home: Path, engine: Engine) -> None:
    write_hook(home, "r", "def score_trace(trace): return 0.5\n")
    write_hook(home, "silent", "def score_trace(trace): return None\n")
    write_hook(home, "bad", "def score_trace(trace): return 7\n")
    tried = json.loads(run(hooks, "try", "t1", "--json"))
    assert [(r["source"], r["value"]) for r in tried["rewards"]] == [("r", 0.5)]
    assert tried["silent"] == ["silent"]
    assert "outside [-1, 1]" in tried["failed"]["bad"]
    assert tried["combined"] == 0.5
    assert "+0.500" in run(hooks, "try", "t1")
    assert rows(engine, "score", "lease_owner") == [("waiting", None)] * 2
    with pytest.raises(UnknownTraceError):
        run(hooks, "try", "nothing")


def test_judgements_are_kept_as_long_as_their_trace_and_money_is_counted(engine: Engine) -> None:
    book = StoreJudgeBook(engine)
    for key, trace, value in (("k1", "t1", 1.0), ("k1", "t1", -1.0), ("k2", "deleted", 1.0)):
        book.enter("2001-01-01", Spent(), Judgement(key, trace, {"value": value}))
    assert book.find("k1", "1999-01-01") == ({"value": 1.0}, Spent())
    assert book.forget_old() == 1
    assert book.find("k2", "1999-01-01")[0] is None
    today = time.strftime("%Y-%m-%d")
    book.enter(today, Spent(2, 0.25), None)
    book.enter(today, Spent(1, 0.0), None)
    assert book.find("k1", today) == ({"value": 1.0}, Spent(3, 0.25))
