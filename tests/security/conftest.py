"""The whole house, started once for all tests here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # LiteLLM fetches it from the internet when imported

from tests.replay_upstream import ReplayUpstream, Script
from tests.security.house import House, running_house
from tests.security.tried import listing


@pytest.fixture(scope="session")
def house(tiny_model: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with ReplayUpstream() as upstream:
        upstream.scripts["fresh"] = Script.recorded("text-whole", fresh_ids=True)
        upstream.scripts["fresh-stream"] = Script.recorded("text-stream", fresh_ids=True)
        with running_house(tmp_path_factory.mktemp("house"), tiny_model, free_port, upstream) as running:
            yield running
            assert running.dead() == [], "a process died while it was attacked"


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    """LiteLLM's application with all that it loads when it is first asked for."""
    from litellm.proxy import proxy_server
    from litellm.proxy._lazy_features import register_all_features

    found = proxy_server.app
    routes, state = list(found.router.routes), dict(found.state._state)
    register_all_features(found)
    yield found
    found.router.routes[:] = routes
    found.state._state = state


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := listing():
        terminalreporter.section("security: what was tried")
        for line in lines:
            terminalreporter.write_line(line)
