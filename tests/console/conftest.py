"""A console over a store with two agents, and browsers' requests to it without a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from metaclaw_hooks.types import Trace

from metaclaw_plugin.console.access import COOKIE
from metaclaw_plugin.console.app import create_app
from metaclaw_plugin.console.house import House
from metaclaw_plugin.settings import ConsoleSettings, RlSettings, Settings, SkillSettings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import insert_or_ignore, open_store
from metaclaw_plugin.store.traces import insert_traces
from tests.store_cases import a_trace

KEY = "console-key-of-the-tests"
SALT = "sk-salt-of-the-tests"
ORIGIN = "http://console.test"


class Browser:
    """Someone at a browser: keeps the session, and takes the CSRF token off the pages as a form does."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.session = ""
        self.csrf = ""

    def headers(self, **more: str) -> dict[str, str]:
        return {"cookie": f"token=of-litellm; {COOKIE}={self.session}", **more}

    def get(self, path: str, status: int = 200, **more: str) -> str:
        answer = self.client.get(path, headers=self.headers(**more), follow_redirects=True)
        assert answer.status_code == status, answer.text
        if found := re.search(r'X-CSRF-Token": "([^"]+)"', answer.text):
            self.csrf = found[1]
        return answer.text

    def post(self, path: str, status: int = 303, **fields: str) -> str:
        """Send a form; what the next page says, if it leads to one."""
        data = {"csrf": self.csrf, **fields}
        answer = self.client.post(path, data=data, headers=self.headers(origin=ORIGIN), follow_redirects=False)
        assert answer.status_code == status, answer.text
        return self.get(answer.headers["location"]) if status == 303 else answer.text

    def sign_in(self, key: str = KEY) -> None:
        answer = self.client.post("/sign-in", data={"key": key}, follow_redirects=False)
        assert answer.status_code == 303
        self.take_session(answer.headers.get_list("set-cookie"))

    def take_session(self, cookies: list[str]) -> None:
        (self.session,) = {found[1] for line in cookies if (found := re.match(rf"{COOKIE}=([^;]+);", line))}
        self.get("/")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: to copy it takes less than to make one."""
    path = tmp_path_factory.mktemp("empty") / "metaclaw.db"
    engine = open_store(f"sqlite:///{path}")
    with engine.connect() as c:
        c.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return path


@pytest.fixture
def settings(tmp_path: Path, empty_store: Path) -> Settings:
    shutil.copy(empty_store, tmp_path / "metaclaw.db")
    return Settings(
        home=tmp_path,
        console=ConsoleSettings(key=KEY, salt_key=SALT),
        skills=SkillSettings(starter=False),
        rl=RlSettings(remote_url="http://127.0.0.1:9"),
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url=ORIGIN) as found:
        found.cookies.clear()
        yield found


@pytest.fixture
def house(client: TestClient) -> House:
    found: House = client.app.state.house  # type: ignore[attr-defined]
    return found


def store_traces(house: House, *traces: Trace) -> None:
    """Traces, and the sessions that they are of."""
    sessions = {trace.session: trace for trace in traces}
    rows = [
        {
            "id": name,
            "agent": trace.agent,
            "evidence": "x-session-id",
            "evidence_key": name,
            "started_at": trace.started_at,
            "last_at": trace.finished_at,
            "held_out": False,
            "without_skills": [],
        }
        for name, trace in sessions.items()
    ]
    with house.writing() as c:
        insert_or_ignore(c, schema.sessions, rows)
        insert_traces(c, traces)


@pytest.fixture
def filled(house: House) -> House:
    """Agents alpha and beta; alpha has one conversation of one turn."""
    with house.writing() as c:
        for name in ("alpha", "beta"):
            add_agent(c, name)
    store_traces(house, a_trace())
    return house


@pytest.fixture
def admin(client: TestClient) -> Browser:
    browser = Browser(client)
    browser.sign_in()
    return browser
