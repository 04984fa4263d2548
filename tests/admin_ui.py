"""LiteLLM's admin UI with MetaClaw in it: LiteLLM on a PostgreSQL, our gateway, worker and console as processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from playwright.sync_api import FrameLocator, Page

from metaclaw_plugin.settings import load_settings
from tests.gateway_server import PLAIN_KEY, start_gateway, stop, write_config
from tests.litellm_db.database_mode import running_database

MASTER_KEY = PLAIN_KEY
SALT = "sk-salt-of-the-admin-ui-0123456789"
USER, PASSWORD = "admin-of-the-tests", "password-of-the-tests"


def database_config(folder: Path, upstream: str, port: int, console: int, **metaclaw: Any) -> Path:
    """A config as docs/operations.md has it for LiteLLM's database mode; the home is ``folder/home``."""
    ours = {"gateway": {"admin_key": MASTER_KEY}, "console": {"port": console}, **metaclaw}
    path = write_config(folder, upstream, port, ours=True, **ours)
    config = yaml.safe_load(path.read_text())
    del config["general_settings"]["custom_auth"]
    entry = {"name": "metaclaw", "display_name": "MetaClaw", "url": f"http://localhost:{console}"}
    config["general_settings"]["plugins"] = [entry]
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running_litellm(config: Path) -> Iterator[str]:
    """LiteLLM with an empty database; yields its URL. ``database_mode.build()`` says whether that can be had."""
    secrets = {"LITELLM_MASTER_KEY": MASTER_KEY, "LITELLM_SALT_KEY": SALT, "UI_USERNAME": USER, "UI_PASSWORD": PASSWORD}
    settings = load_settings(config)
    with running_database() as database:
        gateway = start_gateway(config.parent, config, settings, {**database, **secrets})
        try:
            yield f"http://localhost:{settings.gateway.port}"
        finally:
            stop(gateway)


@contextmanager
def running_beside(config: Path) -> Iterator[None]:
    """Worker and console."""
    env = os.environ | {"METACLAW_CONFIG": str(config), "LITELLM_SALT_KEY": SALT}
    console = f"http://localhost:{load_settings(config).console.port}"
    running = []
    try:
        for name in ("worker", "console"):
            with (config.parent / f"{name}.log").open("wb") as log:
                command = [sys.executable, "-m", f"metaclaw_plugin.{name}"]
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        wait_until(lambda: _answers(console), (config.parent / "console.log").read_text)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(30)


def wait_until(done: Callable[[], object], otherwise: Callable[[], object]) -> None:
    """Wait a minute for ``done``; after that ``otherwise`` says what there is instead."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", verify=False, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def sign_in(page: Page, litellm: str) -> None:
    page.goto(f"{litellm}/ui/")
    page.get_by_placeholder("Enter your username").fill(USER)
    page.get_by_placeholder("Enter your password").fill(PASSWORD)
    page.keyboard.press("Enter")


def choose_metaclaw(page: Page) -> FrameLocator:
    """By keyboard, at the top left."""
    page.get_by_role("button", name="AI Gateway").press("Enter")
    page.get_by_role("menuitem", name="MetaClaw").press("Enter")
    return page.frame_locator("iframe")


def leave_metaclaw(page: Page) -> None:
    """Back to LiteLLM's own pages."""
    page.get_by_role("button", name="MetaClaw").press("Enter")
    page.get_by_role("menuitem", name="AI Gateway").press("Enter")
