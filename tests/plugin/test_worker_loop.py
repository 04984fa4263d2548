"""The worker's tasks: apart from each other, backing off, ended cleanly, and taken over from the dead."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.store import leases, schema
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.loop import keep_doing, run_worker
from metaclaw_plugin.worker.tasks import Round, tasks_for
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook

NOWHERE = {"remote_url": "http://127.0.0.1:9"}


async def until_merged(engine: Engine) -> None:
    for _ in range(3000):
        if rows(engine, "forward") == [("merged",)]:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"the trace was not merged into a sample: {rows(engine, 'score', 'forward')}")


@pytest.mark.law(5)
async def test_a_task_that_fails_is_counted_and_tried_again_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    stop = asyncio.Event()

    async def fails() -> None:
        done.append("fails")
        raise RuntimeError("broken")

    async def works() -> bool:
        done.append("works")
        if done.count("works") >= 20 and done.count("fails") >= 2:
            stop.set()
        return False

    with worker_context(worker_settings(tmp_path, worker={"max_backoff": 0.05})) as ctx:
        await asyncio.gather(
            keep_doing(ctx, Round("broken", fails, 0.01), stop), keep_doing(ctx, Round("sound", works, 0.01), stop)
        )
        with ctx.engine.connect() as c:
            assert read_counters(c, "worker_failures")["worker_failures"]["broken"] >= 2
    assert "broken failed and is tried again" in caplog.text


async def test_an_absent_trainer_is_told_once_and_so_is_its_return(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()
    calls = 0

    async def forwards() -> bool:
        nonlocal calls
        calls += 1
        if calls <= 4:
            raise TrainerUnavailableError("no answer")
        stop.set()
        return False

    with caplog.at_level(logging.INFO), worker_context(worker_settings(tmp_path, worker={"max_backoff": 0.02})) as ctx:
        await keep_doing(ctx, Round("forwarding", forwards, 0.01), stop)
        with ctx.engine.connect() as c:
            assert read_counters(c, "worker_failures") == {}
    assert caplog.text.count("waits for the trainer, nothing is lost") == 1
    assert caplog.text.count("works again") == 1


async def test_it_scores_a_dropped_in_file_while_the_trainer_is_away_and_leaves_no_lease(tmp_path: Path) -> None:
    settings = worker_settings(tmp_path, rl=NOWHERE)
    engine = open_store(settings.store_url)
    stop = asyncio.Event()
    running = asyncio.create_task(run_worker(settings, stop))
    fill(engine, make_trace(finished_at=time.time()))
    write_hook(tmp_path, "alpha/r", "def score_trace(trace): return 0.5\n")
    await until_merged(engine)
    stop.set()
    await running
    assert rows(engine, "score", "reward", "lease_owner") == [("scored", 0.5, None)]
    with engine.connect() as c:
        assert leases.holders(c) == set()
    engine.dispose()


async def test_what_a_dead_worker_held_is_taken_over_at_once(tmp_path: Path) -> None:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    settings = worker_settings(tmp_path, rl=NOWHERE)
    engine = open_store(settings.store_url)
    fill(engine, make_trace())
    host = leases.this_worker().rsplit(":", 2)[0]
    with engine.begin() as c:
        far = time.time() + 1e6
        c.execute(sa.update(schema.traces).values(lease_owner=f"{host}:4194305:1", lease_until=far))
        leases.acquire(c, "forward:alpha", f"{host}:4194305:1", time.time(), 1e6)
    stop = asyncio.Event()
    running = asyncio.create_task(run_worker(settings, stop))
    await until_merged(engine)
    stop.set()
    await running
    engine.dispose()


def test_without_a_trainer_only_what_needs_none_is_done(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path, rl={"enabled": False})) as ctx:
        names = {task.name for task in tasks_for(ctx)}
    assert {"scoring", "feedback", "sessions"} <= names
    assert not names & {"forwarding", "tracking", "publishing", "modes"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_cleanly_on_a_signal_even_with_a_hook_that_hangs(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_hook(tmp_path, "hangs", "import time\ndef score_trace(trace): time.sleep(1000)\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"metaclaw:\n  home: {tmp_path}\n  rl: {{enabled: false}}\n", encoding="utf-8")
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    fill(engine, make_trace())
    environment = {**os.environ, "METACLAW_CONFIG": str(config), "METACLAW_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "metaclaw_plugin.worker"]
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while rows(engine, "lease_owner") == [(None,)]:
        assert worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(number)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0, said
    assert "the worker has ended" in said
    assert rows(engine, "score", "lease_owner") == [("waiting", None)]
    engine.dispose()


def test_a_config_that_is_wrong_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("metaclaw:\n  worker: {poll_intervall: 1}\n", encoding="utf-8")
    environment = {**os.environ, "METACLAW_CONFIG": str(config)}
    command = [sys.executable, "-m", "metaclaw_plugin.worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "poll_interval" in done.stderr
