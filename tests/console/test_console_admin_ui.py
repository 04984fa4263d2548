"""The console inside LiteLLM's own admin UI, and our agents on LiteLLM's own pages.

All of it is real: LiteLLM on a PostgreSQL (litellm_db/database_mode.py), our gateway, worker and console as processes,
a headless Chromium. Only the model's answers are replayed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import VersionState
from playwright.sync_api import Browser, expect
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings, load_settings
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.edits import Change
from metaclaw_plugin.skills.skill_file import render_skill
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.adapters import get_route, record_candidate, set_route, set_state
from metaclaw_plugin.store.agents import add_agent, get_record, remove_agent
from metaclaw_plugin.store.engine import open_store
from tests.admin_ui import (
    MASTER_KEY,
    choose_metaclaw,
    database_config,
    leave_metaclaw,
    running_beside,
    running_litellm,
    sign_in,
    wait_until,
)
from tests.chromium import running_chromium, watched
from tests.litellm_db.database_mode import CannotBuildError, build
from tests.publishing_cases import version_body
from tests.replay_upstream import ReplayUpstream

pytestmark = pytest.mark.gateway

AGENT = "ann-notes"


@dataclass(frozen=True)
class Installation:
    """A LiteLLM that people use, with MetaClaw in it."""

    url: str  # of LiteLLM
    config: Path
    settings: Settings
    engine: Engine
    replay: ReplayUpstream
    key: str  # a virtual key of the agent

    def ask(self, method: str, path: str, key: str = MASTER_KEY, **body: Any) -> httpx.Response:
        """LiteLLM's answer to a call of its API."""
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, headers=headers, json=body or None, timeout=60, verify=False)

    def chat(self, model: str = f"metaclaw/{AGENT}", key: str | None = None) -> httpx.Response:
        messages = [{"role": "user", "content": "hello case:text-whole"}]
        return self.ask("POST", "/v1/chat/completions", key or self.key, model=model, messages=messages)

    def listed(self, agent: str) -> tuple[str, str] | None:
        """The agent's entry on LiteLLM's Models page, and what that serves; ``None``: it is not there."""
        reply = self.ask("GET", f"/v2/model/info?modelId=metaclaw-agent-{agent}").json()["data"]
        return (reply[0]["model_name"], reply[0]["litellm_params"]["model"]) if reply else None

    def until_listed(self, agent: str, version: int) -> None:
        served = f"{agent}@v{version}" if version else "metaclaw-base"
        wanted = (f"metaclaw/{agent}@v{version}", f"hosted_vllm/{served}")
        wait_until(lambda: self.listed(agent) == wanted, lambda: f"{self.listed(agent)} is listed, not {wanted}")

    def virtual_key(self, key: str | None = None) -> tuple[str, Any]:
        """Alias and metadata of a key, the agent's first, as the Virtual Keys page has them."""
        info = self.ask("GET", f"/key/info?key={key or self.key}").json()["info"]
        return info["key_alias"], info["metadata"]

    def session_of(self, trace: str) -> str:
        with self.engine.connect() as c:
            return str(c.scalar(sa.select(schema.traces.c.session).where(schema.traces.c.id == trace)))

    def count_of(self, trace: str) -> int:
        """How often an exchange like this one's is stored: a callback that is called twice would store two."""
        t = schema.traces.c
        with self.engine.connect() as c:
            session = c.scalar(sa.select(t.session).where(t.id == trace))
            return int(c.scalar(sa.select(sa.func.count()).where(t.session == session)) or 0)

    def rated(self) -> list[Any]:
        """Traces that have a reward, and the reward."""
        t = schema.traces.c
        with self.engine.connect() as c:
            return [tuple(row) for row in c.execute(sa.select(t.id, t.reward).where(t.reward.is_not(None)))]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def installed(
    chromium: Browser, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """One agent with two versions, skills and a proposal; its first answer is yet to come."""
    del chromium  # without one there is nothing to be seen
    try:
        build()
    except CannotBuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("admin-ui")
    # No trainer: what has served stays ready to serve.
    more: dict[str, Any] = {"rl": {"enabled": False}, "skills": {"starter": False}}
    with ReplayUpstream() as replay:
        config = database_config(folder, replay.url, free_port(), free_port(), **more)
        settings = load_settings(config)
        engine = open_store(settings.store_url)
        with running_litellm(config) as url:
            found = Installation(url, config, settings, engine, replay, "")
            made = found.ask("POST", "/key/generate", metadata={"agent_id": AGENT, "of": "ann"}, user_id="ann")
            fill(found)
            with running_beside(config):
                yield dataclasses.replace(found, key=made.json()["key"])
        engine.dispose()


def fill(at: Installation) -> None:
    with at.engine.begin() as c:
        add_agent(c, AGENT, owner="user:ann")
        for number in (1, 2):
            record_candidate(c, version_body(number, AGENT, parent=number - 1))
            decision = {"accepted": True, "sentence": f"v{number}: +0.12 on 40 prompts, serving"}
            set_state(c, AGENT, number, VersionState.SERVING, decision)
            set_route(c, AGENT, number)
    folder = SkillFolder(at.settings.skills_path, AGENT)
    folder.put("be-brief", render_skill("be-brief", "Use when asked for a summary.", "At most five lines."))
    better = render_skill("be-brief", "Use when asked for a summary.", "At most three lines.")
    folder.propose(Change("improve", "be-brief", better, (), "five was too much"), "round-1")


def test_an_agent_is_a_model_on_litellms_page_and_named_on_its_key(installed: Installation) -> None:
    installed.until_listed(AGENT, 2)
    wait_until(lambda: installed.virtual_key()[0] is not None, installed.virtual_key)
    alias, metadata = installed.virtual_key()
    assert alias == AGENT
    assert {"agent_id": AGENT, "of": "ann"}.items() <= metadata.items()


@pytest.mark.law(6)
def test_the_entry_changes_no_route(installed: Installation) -> None:
    installed.until_listed(AGENT, 2)
    for model in (f"metaclaw/{AGENT}", "any-name"):
        answer = installed.chat(model)
        assert answer.headers["x-metaclaw-adapter"] == f"{AGENT}@v2"
        assert installed.replay.requests[-1]["model"] == f"{AGENT}@v2"
    other = installed.ask("POST", "/key/generate", key_alias="eve", user_id="eve").json()["key"]
    assert installed.chat(key=other).status_code == 403
    assert installed.chat(f"metaclaw/{AGENT}@v2").status_code == 403
    assert [model["id"] for model in installed.ask("GET", "/v1/models", other).json()["data"]] == ["metaclaw/eve"]
    installed.until_listed("eve", 0)
    with installed.engine.begin() as c:
        remove_agent(c, "eve")
    wait_until(lambda: installed.listed("eve") is None, lambda: installed.listed("eve"))


def test_the_command_line_makes_keys_that_litellm_shows(installed: Installation) -> None:
    first = json.loads(metaclaw(installed, "agents", "add", "bob-code", "--json").stdout)
    second = json.loads(metaclaw(installed, "agents", "keys", "bob-code", "--new", "--json").stdout)
    for made, name in ((first, "bob-code"), (second, "bob-code-2")):
        alias, metadata = installed.virtual_key(made["key"])
        assert alias == name
        assert metadata["agent_id"] == "bob-code"
        assert installed.chat("metaclaw/bob-code", made["key"]).headers["x-metaclaw-adapter"] == "bob-code@v0"
    assert "Virtual Keys page" in metaclaw(installed, "agents", "keys", "bob-code").stdout


def test_a_wrong_master_key_is_said(installed: Installation) -> None:
    wrong = installed.config.with_name("wrong.yaml")
    wrong.write_text(installed.config.read_text().replace(MASTER_KEY, "sk-wrong"))
    refused = metaclaw(dataclasses.replace(installed, config=wrong), "agents", "keys", AGENT, "--new")
    assert refused.returncode != 0
    assert "admin_key is not LiteLLM's master key" in " ".join(refused.stderr.split())


def metaclaw(at: Installation, *command: str) -> subprocess.CompletedProcess[str]:
    """What the command line says."""
    run = [str(Path(sys.executable).with_name("metaclaw")), *command, "--config", str(at.config)]
    return subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)


def test_a_walk_through_metaclaw_in_litellms_admin_ui(chromium: Browser, installed: Installation) -> None:
    answer = installed.chat()
    trace = answer.headers["x-metaclaw-trace-id"]
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    wrong = watched(page)
    sign_in(page, installed.url)
    metaclaw = choose_metaclaw(page)
    expect(metaclaw.get_by_role("heading", name="Agents")).to_be_visible()
    expect(metaclaw.get_by_text("(looks only)")).to_have_count(0)

    metaclaw.get_by_role("link", name=AGENT).click()
    metaclaw.get_by_role("button", name="Roll back v2").press("Enter")
    expect(metaclaw.get_by_role("status")).to_contain_text(f"{AGENT}@v1 serves now")
    with installed.engine.connect() as c:
        assert get_route(c, AGENT).version == 1
    assert installed.chat().headers["x-metaclaw-adapter"] == f"{AGENT}@v1"

    metaclaw.get_by_role("link", name="All conversations").click()
    metaclaw.get_by_role("link", name=installed.session_of(trace)[:12]).click()
    metaclaw.get_by_role("button", name="Good answer, turn 0").press("Enter")
    expect(metaclaw.get_by_role("status")).to_contain_text("rated +1")
    wait_until(lambda: installed.rated() == [(trace, 1.0)], installed.rated)

    metaclaw.get_by_role("link", name="Skills").click()
    expect(metaclaw.get_by_text("+At most three lines.")).to_be_visible()
    metaclaw.get_by_role("button", name="Approve be-brief").press("Enter")
    expect(metaclaw.get_by_role("status")).to_contain_text("improve be-brief: done")
    skill = SkillFolder(installed.settings.skills_path, AGENT).read("be-brief")
    assert skill is not None
    assert skill.body == "At most three lines."
    with installed.engine.connect() as c:
        assert get_record(c, AGENT).skill_generation == 1

    metaclaw.get_by_role("link", name="be-brief").click()
    expect(metaclaw.get_by_label("What to do")).to_have_value("At most three lines.")
    metaclaw.get_by_role("link", name="Skills").click()
    metaclaw.get_by_role("link", name="shared by all").click()
    expect(metaclaw.get_by_role("heading", name="A new skill")).to_be_visible()
    metaclaw.get_by_role("link", name="Hooks and health").click()
    expect(metaclaw.get_by_role("heading", name="Plugins")).to_be_visible()
    assert wrong == []

    installed.until_listed(AGENT, 1)
    again = installed.chat()  # LiteLLM has put its router together anew
    assert (again.status_code, again.headers["x-metaclaw-adapter"]) == (200, f"{AGENT}@v1")
    assert installed.count_of(again.headers["x-metaclaw-trace-id"]) == 1
    leave_metaclaw(page)
    page.goto(f"{installed.url}/ui/models-and-endpoints")
    expect(page.get_by_text(f"metaclaw/{AGENT}@v1").first).to_be_visible()
    page.goto(f"{installed.url}/ui/api-keys")
    expect(page.get_by_text(AGENT, exact=True).first).to_be_visible()
    page.close()
