"""What `metaclaw status` says of windows and of versions that cannot be put in place."""

from __future__ import annotations

from pathlib import Path

from metaclaw_hooks.types import Mode

from metaclaw_plugin.status.store_reader import read_store
from metaclaw_plugin.status.why import TrainerView, why_not_training
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.facts import set_fact
from metaclaw_plugin.store.traces import insert_traces
from metaclaw_plugin.worker.modes import WINDOWS_FACT
from tests.publishing_cases import version_body
from tests.store_cases import a_trace


def test_a_version_that_cannot_be_loaded_and_a_window_that_is_shut_are_told(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'metaclaw.db'}"
    with open_store(url).begin() as c:
        add_agent(c, "alpha", Mode.AUTO)
        insert_traces(c, [a_trace()])
        store.record_candidate(c, version_body(1, "alpha"))
        store.update_version(c, "alpha", 1, problem="no such folder")
        set_fact(c, WINDOWS_FACT, {"alpha": {"open": False, "reason": "outside the windows of mode auto"}})
    view = read_store(url)
    assert view.problems == ("alpha@v1: no such folder",)
    (agent,) = view.agents
    there = TrainerView({"alpha": {"queued": 9, "batch_size": 8, "allowed": False}})
    assert why_not_training(agent, "auto", True, there, None) == "outside the windows of mode auto"
    assert why_not_training(agent, "rl", True, there, None) == "9 of 8 samples are queued"
