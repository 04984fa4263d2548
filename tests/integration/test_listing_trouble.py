"""A LiteLLM that cannot show the agents is said and counted, and holds nothing else up. The way it works is in
``tests/console/test_console_admin_ui.py``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from metaclaw_plugin.cli.main import app
from metaclaw_plugin.errors import ForbiddenAgentError, LitellmAdminError
from metaclaw_plugin.store.agents import add_agent, list_keys, set_owner
from metaclaw_plugin.store.counters import read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.listing import Lister
from metaclaw_plugin.worker.tasks import tasks_for
from tests.gateway_server import PLAIN_KEY
from tests.worker_stage import worker_context, worker_settings

pytestmark = pytest.mark.law(5)


@pytest.mark.gateway
@pytest.mark.parametrize("key", [PLAIN_KEY, "sk-wrong"])
async def test_a_litellm_without_a_database_is_said_once_and_counted(
    tmp_path: Path, plain_litellm: str, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    await tell(tmp_path, urlsplit(plain_litellm).port or 0, key, caplog, "it has no database")


async def test_a_litellm_that_is_away_is_said_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await tell(tmp_path, 9, PLAIN_KEY, caplog, "did not answer")


def test_a_key_that_litellm_does_not_make_is_said(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    section = {"home": str(tmp_path / "home"), "gateway": {"port": 9, "admin_key": PLAIN_KEY}}
    config.write_text(yaml.safe_dump({"metaclaw": section}))
    result = CliRunner().invoke(app, ["agents", "add", "alpha", "--config", str(config)])
    assert isinstance(result.exception, LitellmAdminError)
    assert "did not answer" in str(result.exception)
    assert "metaclaw agents keys alpha --new" in str(result.exception)
    engine = open_store(f"sqlite:///{tmp_path / 'home' / 'metaclaw.db'}")
    with engine.begin() as c:
        assert list_keys(c) == []  # none of ours either: LiteLLM would not know it
        set_owner(c, "alpha", "key:abc")
    again = CliRunner().invoke(app, ["agents", "keys", "alpha", "--new", "--config", str(config)])
    assert isinstance(again.exception, ForbiddenAgentError)
    engine.dispose()


async def tell(home: Path, port: int, key: str, caplog: pytest.LogCaptureFixture, said: str) -> None:
    caplog.set_level(logging.WARNING)
    with worker_context(worker_settings(home, gateway={"port": port, "admin_key": key})) as ctx:
        with ctx.engine.begin() as c:
            add_agent(c, "alpha")
        lister = Lister(ctx)
        for _ in range(2):
            assert not await lister.round()
        with ctx.engine.connect() as c:
            assert read_counters(c, "worker_failures") == {"worker_failures": {"listing": 2}}
        (warning,) = caplog.records
        assert said in warning.getMessage()
        assert key not in caplog.text


async def test_without_the_key_litellm_is_left_alone(tmp_path: Path) -> None:
    with worker_context(worker_settings(tmp_path)) as ctx:
        assert "listing" not in [task.name for task in tasks_for(ctx)]
