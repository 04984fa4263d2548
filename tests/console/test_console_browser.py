"""The console in a real browser: what it looks like to people who use a keyboard, a screen reader or a telephone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from metaclaw_hooks.types import Reward
from playwright.sync_api import Browser, Page, expect

from metaclaw_plugin.console.app import create_app
from metaclaw_plugin.console.house import House
from metaclaw_plugin.settings import ConsoleSettings, RlSettings, Settings, SkillSettings
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.edits import Change
from metaclaw_plugin.skills.skill_file import SHARED, render_skill
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.adapters import get_route
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.rewards import put_rewards
from tests.chromium import PATIENCE, running_chromium, watched
from tests.console.conftest import KEY, SALT, store_traces
from tests.console.hostile import hostile_trace
from tests.console.visitors import claim
from tests.publishing_cases import serve
from tests.store_cases import a_trace

PAGES = ("/", "/agents/alpha", "/agents/alpha/conversations", "/sessions/ses-0", "/sessions/ses-h", "/skills")
MORE = ("/skills/_shared/be-brief", "/skills/alpha", "/health", "/nowhere")


@dataclass(frozen=True)
class Running:
    url: str
    house: House
    outside: int  # the port of the one page that may show it


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Running]:
    """A served console over a store with a bit of everything."""
    port, outside = free_port(), free_port()
    settings = Settings(
        home=tmp_path_factory.mktemp("console"),
        console=ConsoleSettings(key=KEY, port=port, salt_key=SALT, admin_ui=[f"http://localhost:{outside}"]),
        skills=SkillSettings(starter=False),
        rl=RlSettings(remote_url="http://127.0.0.1:9"),
    )
    app = create_app(settings)
    house: House = app.state.house
    with house.writing() as c:
        for name in ("alpha", "beta"):
            add_agent(c, name)
        serve(c, 1, "alpha")
        serve(c, 2, "alpha")
    now = time.time()
    traces = [
        a_trace(id=f"tr-{n}", session=f"ses-{n // 4}", turn=n % 4, response_id=None, finished_at=now - 600 + n)
        for n in range(40)
    ]
    store_traces(house, *traces, hostile_trace())
    with house.writing() as c:
        for n, trace in enumerate(traces):
            put_rewards(c, trace.id, [Reward("judge", n / 40, "because")], now)
            c.execute(
                schema.traces.update().where(schema.traces.c.id == trace.id).values(score="scored", reward=n / 40)
            )
    fill_library(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Running(f"http://127.0.0.1:{port}", house, outside)
    server.should_exit = True
    thread.join(10)


def fill_library(settings: Settings) -> None:
    text = render_skill("be-brief", "Use when asked for a summary.", "At most five lines.")
    for owner in (SHARED, "alpha"):
        SkillFolder(settings.skills_path, owner).put("be-brief", text)
    better = render_skill("be-brief", "Use when asked for a summary.", "At most three lines.")
    SkillFolder(settings.skills_path, "alpha").propose(Change("improve", "be-brief", better, (), "too long"), "round-1")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, running: Running) -> Iterator[Page]:
    """Signed in; nothing may have gone wrong on the page by the end of the test."""
    context = chromium.new_context(base_url=running.url, viewport={"width": 1200, "height": 900})
    page = context.new_page()
    wrong = watched(page)
    page.goto("/")
    page.get_by_label("Console key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Agents")).to_be_visible(timeout=PATIENCE)
    yield page
    assert wrong == []
    context.close()


def serious(page: Page, rules: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """What axe-core finds that is serious or worse (by these rules alone, if any are named): the rule, and where."""
    options = {"runOnly": list(rules)} if rules else None
    found: list[dict[str, Any]] = Axe().run(page, options=options).response["violations"]
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]


def test_axe_finds_nothing_serious_on_any_page(page: Page) -> None:
    for path in (*PAGES, *MORE):
        page.goto(path)
        assert serious(page) == [], path


def test_the_dark_colours_have_contrast_too(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    for path in (*PAGES, *MORE):
        page.goto(path)
        assert serious(page, ("color-contrast",)) == [], path


def test_axe_finds_nothing_serious_at_the_door(chromium: Browser, running: Running) -> None:
    page = chromium.new_page()
    page.goto(running.url)
    assert serious(page) == []
    page.close()


def test_at_360_pixels_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for path in (*PAGES, *MORE):
        page.goto(path)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, path


def test_the_curves_are_drawn_and_stand_in_a_table_too(page: Page) -> None:
    page.goto("/agents/alpha")
    page.wait_for_selector("html[data-drawn]")
    assert page.locator("[data-chart=learning] canvas").count() == 1
    assert page.locator("[data-table=learning] tbody tr").count() == 8  # of five rewards each


def test_all_can_be_done_by_keyboard(page: Page, running: Running) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.goto("/agents/alpha")
    button = page.get_by_role("button", name="Promote v1")
    for _ in range(200):
        if button.evaluate("button => button === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("alpha@v1 serves now")
    with running.house.reading() as c:
        assert get_route(c, "alpha").version == 1


def test_an_open_page_shows_what_comes_in(page: Page, running: Running) -> None:
    page.goto("/")
    expect(page.get_by_role("row", name="gamma")).to_have_count(0)
    with running.house.writing() as c:
        add_agent(c, "gamma")
    expect(page.get_by_role("row", name="gamma")).to_be_visible(timeout=PATIENCE)


def test_tokens_preview_and_search_come_without_a_new_page(page: Page, running: Running) -> None:
    page.goto("/sessions/ses-0")
    page.get_by_text("Tokens by how likely they were").first.click()
    expect(page.get_by_text("2 tokens, log-probability").first).to_be_visible(timeout=PATIENCE)
    page.goto("/skills/_shared/be-brief")
    page.get_by_label("What to do").fill("Be <b>brief</b>.")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview")).to_contain_text("Be <b>brief</b>.", timeout=PATIENCE)
    page.goto("/skills")
    page.get_by_label("Search").fill("nothing has these")
    expect(page.locator("#found")).to_contain_text("No skill has these words", timeout=PATIENCE)


def test_hostile_text_runs_nothing_and_hides_nothing(page: Page, running: Running) -> None:
    page.goto("/sessions/ses-h")
    expect(page.locator(".message pre").filter(has_text="<script>alert(1)</script>").first).to_be_visible()
    assert page.url.endswith("/sessions/ses-h")
    assert page.evaluate("document.querySelectorAll('main img, main iframe, main svg, main script').length") == 0


def test_a_megabyte_of_hostile_text_comes_whole_when_asked_for_and_runs_nothing(page: Page, running: Running) -> None:
    long = ("<img src=x onerror=alert(1)> " * 60 + "\u202etxt ") * 580 + "THE END"
    message = {"role": "user", "content": long}
    store_traces(running.house, a_trace(id="tr-l", session="ses-l", response_id=None, messages=(message,)))
    page.goto("/sessions/ses-l")
    expect(page.get_by_text("THE END")).to_have_count(0)
    page.get_by_role("link", name="characters that are left").click()
    expect(page.get_by_text("THE END")).to_have_count(1, timeout=PATIENCE)
    assert page.evaluate("document.querySelectorAll('main img').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_markup_that_got_onto_a_page_would_still_run_nothing(chromium: Browser, running: Running) -> None:
    page = chromium.new_page()
    page.goto(running.url)
    stopped = watched(page)
    page.evaluate(
        """() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='//evil.test/x' onerror='window.ran = 2'>");
        document.body.insertAdjacentHTML("beforeend", "<div style='position: fixed' id='cover'></div>");
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("getComputedStyle(document.getElementById('cover')).position") == "static"
    assert len(stopped) >= 3
    page.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_page_that_may_show_us_signs_in_by_a_claim_and_stays_signed_in(
    chromium: Browser, running: Running, host: str
) -> None:
    """The page does what LiteLLM's admin UI does; in test_console_admin_ui.py it is the admin UI itself."""
    ours = running.url.replace("127.0.0.1", host)
    text = claim(user_role="proxy_admin_viewer")
    script = (
        "const frame = document.querySelector('iframe');"
        f"frame.addEventListener('load', () => frame.contentWindow.postMessage("
        f"{{type: 'litellm-auth', session_claim: '{text}'}}, '{ours}'));"
    )
    html = f"<iframe src='{ours}/' width='900' height='700'></iframe><script>{script}</script>"
    with pages_at(running.outside, html):
        page = chromium.new_page()
        wrong = watched(page)
        page.goto(f"http://localhost:{running.outside}/")
        inside = page.frame_locator("iframe")
        expect(inside.get_by_text("ann (looks only)")).to_be_visible(timeout=PATIENCE)
        inside.get_by_role("link", name="alpha").first.click()
        expect(inside.get_by_role("heading", name="Learning curve")).to_be_visible(timeout=PATIENCE)
        expect(inside.get_by_role("button", name="Promote")).to_have_count(0)
        assert wrong == []
        page.close()


@contextmanager
def pages_at(port: int, html: str) -> Iterator[None]:
    """A server whose every page is ``html``."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_of_another_origin_may_not_show_us(chromium: Browser, running: Running) -> None:
    page = chromium.new_page()
    page.goto("data:text/html,<title>other</title>")
    with page.expect_event("requestfailed", lambda request: request.url == f"{running.url}/"):
        page.evaluate(f"document.body.innerHTML = '<iframe src=\"{running.url}/\"></iframe>'")
    frame = page.frames[-1]
    assert "Console key" not in frame.content()
    page.close()
