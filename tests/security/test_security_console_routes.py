"""Every route of the running console, with nobody, somebody who may only look, and an admin at the browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet
from fastapi.routing import APIRoute

from metaclaw_plugin.console.access import COOKIE
from metaclaw_plugin.console.app import create_app
from metaclaw_plugin.console.keys import derived
from tests.security.console_visits import ACTING, filled, session
from tests.security.house import House
from tests.security.tried import tried

OPEN = {
    "GET /healthz",
    "GET /api/plugin-manifest",
    "POST /api/plugin-auth",
    "POST /sign-in",
    "POST /sign-out",
    "POST /theme",
}
LOOKING = {
    "GET /", "GET /live/overview", "GET /agents/{name}", "GET /agents/{name}/curves",
    "GET /agents/{name}/conversations",
    "GET /sessions/{session}", "GET /traces/{trace_id}", "GET /traces/{trace_id}/messages",
    "GET /traces/{trace_id}/messages/{index}", "GET /traces/{trace_id}/tokens",
    "GET /skills", "GET /skills/{owner}/{name}", "GET /skills/{owner}", "GET /health",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=house.console, timeout=30, verify=False) as found:
        yield found


@pytest.fixture(scope="module")
def routes(house: House) -> set[str]:
    app = create_app(house.settings, house.config)
    found = [route for route in app.routes if isinstance(route, APIRoute)]
    return {f"{method} {route.path}" for route in found for method in route.methods}


def ask(client: httpx.Client, route: str, headers: dict[str, str], **more: Any) -> httpx.Response:
    method, path = filled(route)
    tried("routes of the console, each as every kind of visitor")
    answer = client.request(method, path, headers=headers, **more)
    client.cookies.clear()
    return answer


def test_every_route_of_the_console_has_an_expectation(routes: set[str]) -> None:
    assert routes == OPEN | LOOKING | ACTING


@pytest.mark.parametrize("route", sorted(LOOKING | ACTING))
def test_nobody_sees_or_does_anything_without_a_session(house: House, client: httpx.Client, route: str) -> None:
    forged = Fernet(derived("another key of some length", "metaclaw console session")).encrypt(b"{}").decode()
    for headers in (
        {}, {"cookie": f"{COOKIE}=rubbish"}, {"cookie": f"{COOKIE}={forged}"},
        {"cookie": f"token={house.keys['master']}"},
        {"authorization": f"Bearer {house.keys['own']}"}, {"authorization": f"Bearer {house.owners['console']}"},
    ):  # fmt: skip
        assert ask(client, route, headers).status_code == 401


@pytest.mark.parametrize("route", sorted(ACTING))
def test_who_may_look_may_not_act_and_an_admin_acts_from_our_pages_only(
    house: House, client: httpx.Client, route: str
) -> None:
    viewer, admin = session(client, house, "proxy_admin_viewer"), session(client, house, "proxy_admin")
    own = {"origin": house.console}
    for headers in (
        {**viewer, **own}, {**admin, **own},  # without the token of the page
        {**admin, **own, "x-csrf-token": "guessed"}, {**admin, "origin": "http://evil.example"},
        {**admin, "origin": "null"}, {**admin, "sec-fetch-site": "cross-site"},
    ):  # fmt: skip
        assert ask(client, route, headers).status_code == 403
    token = re.search(r'X-CSRF-Token": "([^"]+)"', client.get("/", headers=viewer).text.replace("&#34;", '"'))
    if token is not None:
        assert ask(client, route, {**viewer, **own, "x-csrf-token": token[1]}).status_code == 403


@pytest.mark.parametrize("route", sorted(LOOKING - {"GET /live/overview"}))  # that one has no end
def test_who_is_signed_in_gets_a_page_or_a_plain_no(house: House, client: httpx.Client, route: str) -> None:
    answer = ask(client, route, session(client, house, "proxy_admin"))
    assert answer.status_code in (200, 400, 404, 409), answer.text
    assert "Traceback" not in answer.text
    assert not [name for name, secret in house.secrets.items() if secret in answer.text]
