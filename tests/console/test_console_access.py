"""Who gets in: by key, by LiteLLM's claim, and nobody by anything else."""

from __future__ import annotations

import base64
import json
import logging
import stat
import time
from typing import Any

import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient

from metaclaw_plugin.console.house import House
from metaclaw_plugin.console.keys import console_key, derived
from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import leases
from tests.console.conftest import KEY, ORIGIN, SALT, Browser
from tests.console.visitors import claim, show

PAGES = ("/", "/agents/alpha", "/agents/alpha/curves", "/agents/alpha/conversations", "/sessions/ses-0", "/skills")
MORE = (
    "/skills/_shared",
    "/health",
    "/live/overview",
    "/traces/tr-0",
    "/traces/tr-0/tokens",
    "/traces/tr-0/messages/0",
)


@pytest.mark.parametrize("path", [*PAGES, *MORE])
def test_without_a_session_every_page_asks_to_sign_in(client: TestClient, filled: House, path: str) -> None:
    answer = client.get(path, headers={"cookie": "token=of-litellm; metaclaw_console=rubbish"})
    assert answer.status_code == 401
    assert "Console key" in answer.text
    assert "alpha" not in answer.text


def test_the_key_opens_and_a_wrong_one_does_not(client: TestClient, filled: House) -> None:
    browser = Browser(client)
    answer = client.post("/sign-in", data={"key": KEY[:-1] + "x"})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers
    browser.sign_in()
    assert "alpha" in browser.get("/")


def test_the_key_is_made_once_for_its_owners_eyes(settings: Settings) -> None:
    plain = settings.model_copy(update={"console": settings.console.model_copy(update={"key": None})})
    key = console_key(plain)
    assert key == console_key(plain)
    assert stat.S_IMODE((settings.home / "console.key").stat().st_mode) == 0o600
    (settings.home / "console.key").write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        console_key(plain)


@pytest.mark.parametrize(("role", "may_act"), [("proxy_admin", True), ("proxy_admin_viewer", False)])
def test_litellms_claim_signs_in_with_its_role(client: TestClient, filled: House, role: str, may_act: bool) -> None:
    answer = show(client, claim(user_role=role))
    assert answer.status_code == 204
    browser = Browser(client)
    browser.take_session(answer.headers.get_list("set-cookie"))
    page = browser.get("/agents/alpha")
    assert "ann" in page
    assert ("(looks only)" in page) is not may_act


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"age": 31}, "older than 30 seconds"),
        ({"age": -120}, "forged"),
        ({"exp": 0}, "expired"),
        ({"exp": None}, "expired"),
        ({"exp": True}, "expired"),
        ({"salt": "sk-another"}, "forged"),
        ({"salt": ""}, "forged"),
        ({"plugin": "other"}, "of another plugin"),
        ({"user_role": "internal_user"}, "for admins"),
        ({"user_role": None}, "for admins"),
    ],
)
def test_no_other_claim_does(client: TestClient, changes: dict[str, Any], reason: str) -> None:
    answer = show(client, claim(**changes))
    assert answer.status_code == 403
    assert reason in answer.json()["error"]
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("text", ["gAAAA-no-token", "\N{OTTER}", "x" * 4096])
def test_what_is_no_claim_at_all_is_refused(client: TestClient, text: str) -> None:
    assert "forged" in show(client, text).json()["error"]


def test_a_claim_with_more_in_it_is_a_claim(client: TestClient) -> None:
    assert show(client, claim(team="blue")).status_code == 204


def test_a_claim_for_another_plugin_under_our_key_is_refused(client: TestClient) -> None:
    told = {"plugin": "other", "user_id": "ann", "user_role": "proxy_admin", "exp": time.time() + 30}
    text = Fernet(derived(SALT, "metaclaw")).encrypt(json.dumps(told).encode()).decode()
    assert "another plugin" in show(client, text).json()["error"]


def test_a_claim_is_taken_once_however_it_is_written(client: TestClient) -> None:
    text = claim()
    assert show(client, text).status_code == 204
    raw = base64.urlsafe_b64decode(text)
    for again in (text, text + "\n", "." + text, base64.urlsafe_b64encode(raw).decode().rstrip("=") + "===="):
        answer = show(client, again)
        assert answer.status_code == 403, again
        assert "set-cookie" not in answer.headers


def test_a_restarted_console_still_knows_the_claims_it_took(client: TestClient, settings: Settings) -> None:
    from metaclaw_plugin.console.app import create_app

    text = claim()
    assert show(client, text).status_code == 204
    with TestClient(create_app(settings), base_url=ORIGIN) as another:
        assert show(another, text).status_code == 403


def test_a_worker_that_starts_does_not_free_the_claims_that_were_taken(client: TestClient, house: House) -> None:
    """It frees what dead workers held, and once fell over an owner that is no worker."""
    assert show(client, claim()).status_code == 204
    with house.reading() as c:
        assert leases.holders(c) == {"console"}
        assert not leases.is_dead("console")


def test_without_a_salt_key_no_claim_counts_not_even_one_under_an_empty_key(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaclaw_plugin.console.app import create_app

    monkeypatch.setenv("LITELLM_SALT_KEY", "")
    plain = settings.model_copy(update={"console": settings.console.model_copy(update={"salt_key": None})})
    with TestClient(create_app(plain), base_url=ORIGIN) as client:
        answer = show(client, claim(salt=""))
    assert answer.status_code == 403
    assert "does not know LiteLLM's salt key" in answer.json()["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"session_claim": 1}', b'{"session_claim": "x", "y": 1}', b"\xff"]
)
def test_a_body_that_is_no_claim_is_a_bad_request(client: TestClient, body: bytes) -> None:
    assert client.post("/api/plugin-auth", content=body).status_code == 400


def test_sessions_end_with_the_key_that_they_were_made_from(
    client: TestClient, settings: Settings, admin: Browser, filled: House
) -> None:
    from metaclaw_plugin.console.app import create_app

    changed = settings.model_copy(
        update={"console": settings.console.model_copy(update={"key": "another-long-key-123"})}
    )
    with TestClient(create_app(changed), base_url=ORIGIN) as another:
        assert another.get("/", headers=admin.headers()).status_code == 401
    assert client.get("/", headers=admin.headers()).status_code == 200


def test_cookies_are_ours_alone_and_none_is_logged(
    client: TestClient, filled: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    text = claim()
    answer = show(client, text, cookie="token=sk-litellm-admin-key")
    for line in answer.headers.get_list("set-cookie"):
        assert line.startswith(("metaclaw_console=", "metaclaw_console_framed="))
        assert "HttpOnly" in line
        assert "SameSite=Strict" in line or "Secure; SameSite=None; Partitioned" in line
    browser = Browser(client)
    browser.take_session(answer.headers.get_list("set-cookie"))
    show(client, "forged", cookie="token=sk-litellm-admin-key")
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "sk-litellm-admin-key" not in logged
    assert browser.session not in logged
    assert text not in logged
    assert KEY not in logged
