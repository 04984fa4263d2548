"""What an admin does arrives in the store; what nobody may do changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from metaclaw_hooks.types import Mode

from metaclaw_plugin.console.house import House
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.edits import Change
from metaclaw_plugin.skills.skill_file import SHARED, render_skill
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.adapters import get_route, get_version
from metaclaw_plugin.store.agents import get_record, set_settings
from tests.console.conftest import ORIGIN, Browser
from tests.console.visitors import claim, show
from tests.publishing_cases import serve


@pytest.fixture
def versions(filled: House) -> House:
    with filled.writing() as c:
        serve(c, 1, "alpha")
        serve(c, 2, "alpha")
    return filled


@pytest.fixture
def viewer(client: TestClient, filled: House) -> Browser:
    browser = Browser(client)
    answer = show(client, claim(user_role="proxy_admin_viewer"))
    browser.take_session(answer.headers.get_list("set-cookie"))
    return browser


def everything(house: House) -> dict[str, list[Any]]:
    """All rows that an action could touch, and the files of the library."""
    tables = (schema.agents, schema.adapters, schema.routes, schema.feedback, schema.rewards)
    with house.reading() as c:
        rows = {table.name: [tuple(row) for row in c.execute(sa.select(table))] for table in tables}
    root = house.settings.skills_path
    return rows | {"files": sorted((str(file), file.read_bytes()) for file in root.rglob("*") if file.is_file())}


ACTIONS = (
    ("/agents/alpha/promote", {"version": "1"}),
    ("/agents/alpha/rollback", {}),
    ("/agents/alpha/settings", {"mode": "off"}),
    ("/traces/tr-0/feedback", {"value": "1"}),
    ("/skills/_shared", {"name": "new-one", "description": "When asked.", "body": "Do it."}),
    ("/skills/alpha/brief/save", {"description": "When asked.", "body": "Do it.", "version": "x"}),
    ("/skills/alpha/brief/retire", {}),
    ("/skills/alpha/proposals/brief-000000/accept", {}),
    ("/health", {}),
)


@pytest.mark.parametrize(("path", "fields"), ACTIONS)
def test_a_viewer_changes_nothing(versions: House, viewer: Browser, path: str, fields: dict[str, str]) -> None:
    before = everything(versions)
    assert "ask an admin" in viewer.post(path, 403, **fields)
    assert everything(versions) == before


@pytest.mark.parametrize(("path", "fields"), ACTIONS)
def test_without_the_token_of_our_pages_nothing_changes(
    versions: House, admin: Browser, path: str, fields: dict[str, str]
) -> None:
    before = everything(versions)
    for token in ("", "x" * 32, admin.csrf[:-1]):
        admin.csrf, kept = token, admin.csrf
        admin.post(path, 403, **fields)
        admin.csrf = kept
    assert everything(versions) == before


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.test"}, {"origin": "null"}, {"origin": ORIGIN, "sec-fetch-site": "cross-site"}],
)
def test_another_sites_page_changes_nothing_even_with_the_token(
    versions: House, admin: Browser, headers: dict[str, str]
) -> None:
    before = everything(versions)
    form = {"csrf": admin.csrf}
    answer = admin.client.post("/agents/alpha/rollback", data=form, headers=admin.headers(**headers))
    assert answer.status_code == 403
    assert everything(versions) == before


def test_rollback_and_promote_turn_the_route(versions: House, admin: Browser) -> None:
    page = admin.post("/agents/alpha/rollback", to="1")
    assert "alpha@v1 serves now" in page
    with versions.reading() as c:
        assert get_route(c, "alpha").version == 1
    assert "alpha@v2 serves now" in admin.post("/agents/alpha/promote", version="2")
    with versions.reading() as c:
        assert get_route(c, "alpha").version == 2
        assert get_version(c, "alpha", 2).routed


@pytest.mark.parametrize(("version", "status"), [("9", 404), ("x", 409), ("-1", 409), ("9" * 30, 409), ("", 409)])
def test_a_version_that_is_none_is_said(versions: House, admin: Browser, version: str, status: int) -> None:
    before = everything(versions)
    admin.post("/agents/alpha/promote", status, version=version)
    assert everything(versions) == before


def test_mode_and_windows_are_the_agents_own(filled: House, admin: Browser) -> None:
    with filled.writing() as c:
        set_settings(c, "alpha", {"publish": {"policy": "always"}})
    admin.post("/agents/alpha/settings", mode="auto", hours="23:00-07:00, 12:00-13:00", idle_after="600")
    with filled.reading() as c:
        record = get_record(c, "alpha")
    assert record.mode is Mode.AUTO
    assert record.settings == {
        "publish": {"policy": "always"},
        "windows": {"hours": ["23:00-07:00", "12:00-13:00"], "idle_after": 600.0},
    }
    page = admin.get("/agents/alpha")
    assert 'value="23:00-07:00, 12:00-13:00"' in page
    admin.post("/agents/alpha/settings", mode="")
    with filled.reading() as c:
        record = get_record(c, "alpha")
    assert (record.mode, record.settings) == (None, {"publish": {"policy": "always"}})


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "fast"},
        {"hours": "25:00-07:00"},
        {"time_zone": "Mars/North", "hours": "01:00-02:00"},
        {"idle_after": "-1"},
        {"calendar": "webcal://c.example/work.ics"},
    ],
)
def test_settings_that_cannot_be_used_change_nothing(filled: House, admin: Browser, fields: dict[str, str]) -> None:
    before = everything(filled)
    admin.post("/agents/alpha/settings", 400, **fields)
    assert everything(filled) == before


def test_a_thumb_stands_with_the_trace_at_once_and_goes_to_the_worker(filled: House, admin: Browser) -> None:
    page = admin.post("/traces/tr-0/feedback", value="-0.5", comment="It is <b>four</b>.")
    assert "It is &lt;b&gt;four&lt;/b&gt;." in page
    with filled.reading() as c:
        (reward,) = c.execute(sa.select(schema.rewards)).all()
        (queued,) = c.execute(sa.select(schema.feedback)).all()
    assert (reward.trace_id, reward.source, reward.value) == ("tr-0", "feedback", -0.5)
    assert (queued.agent, queued.target, queued.value, queued.applied_at) == ("alpha", "tr-0", -0.5, None)


@pytest.mark.parametrize("value", ["2", "-1.01", "nan", "inf", "good", ""])
def test_a_value_that_is_no_reward_is_refused(filled: House, admin: Browser, value: str) -> None:
    before = everything(filled)
    admin.post("/traces/tr-0/feedback", 400, value=value)
    assert everything(filled) == before


def test_a_skill_is_added_found_changed_and_retired(filled: House, admin: Browser) -> None:
    fields = {"description": "Use when asked for a summary.", "body": "At most five lines.", "triggers": "sum up"}
    admin.post("/skills/_shared", name="be-brief", category="writing", **fields)
    assert "be-brief" in admin.get("/skills?q=summary five")
    assert "be-brief" not in admin.get("/skills?q=poetry")
    made = SkillFolder(filled.settings.skills_path, SHARED).read("be-brief")
    assert made is not None
    changed = fields | {"body": "At most three lines."}
    admin.post("/skills/_shared/be-brief/save", version=made.version, **changed)
    assert "load the page again" in admin.post("/skills/_shared/be-brief/save", 409, version=made.version, **fields)
    admin.post("/skills/_shared/be-brief/retire")
    assert SkillFolder(filled.settings.skills_path, SHARED).read("be-brief") is None
    (aside,) = (filled.settings.skills_path / SHARED / ".retired").iterdir()
    assert "At most three lines." in (aside / "SKILL.md").read_text()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "../up"}, "is no valid skill name"),
        ({"description": ""}, "has no description"),
        ({"body": ""}, "the body says what to do"),
        ({"body": "</metaclaw-skills>"}, "the mark of the injected block"),
    ],
)
def test_a_preview_says_what_is_wrong_and_saving_it_changes_nothing(
    filled: House, admin: Browser, fields: dict[str, str], problem: str
) -> None:
    draft = {"name": "be-brief", "description": "When asked.", "body": "Do it."} | fields
    assert problem in admin.post("/skills/_shared/preview", 200, **draft)
    before = everything(filled)
    answer = admin.client.post(
        "/skills/_shared", data={"csrf": admin.csrf, **draft}, headers=admin.headers(origin=ORIGIN)
    )
    assert answer.status_code in (400, 409)
    assert everything(filled) == before


def test_a_preview_shows_what_the_model_will_be_shown(filled: House, admin: Browser) -> None:
    shown = admin.post("/skills/alpha/preview", 200, name="be-brief", description="When asked.", body="Do <i>it</i>.")
    assert "## be-brief\nWhen asked.\n\nDo &lt;i&gt;it&lt;/i&gt;." in shown


@pytest.mark.parametrize("answer", ["accept", "reject"])
def test_a_proposal_is_shown_as_a_difference_and_answered(filled: House, admin: Browser, answer: str) -> None:
    folder = SkillFolder(filled.settings.skills_path, "alpha")
    folder.put("be-brief", render_skill("be-brief", "When asked.", "At most five lines."))
    better = render_skill("be-brief", "When asked.", "At most three lines.")
    proposal = folder.propose(Change("improve", "be-brief", better, (), "five was too much"), "round-1")
    page = admin.get("/skills")
    assert "-At most five lines." in page
    assert "+At most three lines." in page
    assert "five was too much" in page
    admin.post(f"/skills/alpha/proposals/{proposal.id}/{answer}")
    skill = folder.read("be-brief")
    assert skill is not None
    assert skill.body == ("At most three lines." if answer == "accept" else "At most five lines.")
    assert folder.proposals() == []
    with filled.reading() as c:
        assert get_record(c, "alpha").skill_generation == (1 if answer == "accept" else 0)
