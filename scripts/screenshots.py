"""The pictures in docs/images, taken of a home that a real run left: ``python -m scripts.screenshots [HOME]``.

``make demo`` leaves one in runs/demo/home. It is copied first, so nothing in it changes. A Chromium must be installed,
and Node for those of LiteLLM's admin UI (tests/litellm_db); ``--without-litellm`` leaves these out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.recent import newest_traces
from tests import admin_ui
from tests.litellm_db.database_mode import build
from tests.vllm_server import pick_free_port

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, TALLEST = 1100, 1500  # pixels
KEY = "console-key-for-pictures"


def start_console(home: Path, model: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A console over ``home``, and its URL, once it answers."""
    port = pick_free_port()
    config = home / "console.yaml"
    section = {"home": str(home), "base_model": str(model), "console": {"port": port, "key": KEY}}
    config.write_text(yaml.safe_dump({"metaclaw": section}))
    env = os.environ | {"METACLAW_CONFIG": str(config)}
    process = subprocess.Popen([sys.executable, "-m", "metaclaw_plugin.console"], env=env, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
            return process, url
        except httpx.ConnectError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the console did not start within a minute")


def best_agent(home: Path) -> tuple[str, str]:
    """The agent that has answered last, and the session of that answer."""
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    with engine.connect() as c:
        names = [record.name for record in list_agents(c)]
        found = [(name, trace) for name in names for trace in newest_traces(c, name, 1)]
    engine.dispose()
    if not found:
        raise SystemExit(f"{home} holds no trace: nothing to take a picture of")
    agent, trace = max(found, key=lambda pair: pair[1].finished_at)
    return agent, trace.session


def take(page: Page, url: str, agent: str, session: str) -> None:
    """Sign in, and one picture of each page."""
    page.goto(url)
    page.get_by_label("Console key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("table.agents")
    page.wait_for_timeout(5_000)  # for the processes to be asked
    paths = {
        "agents": "/",
        "agent": f"/agents/{agent}",
        "conversation": f"/sessions/{session}",
        "skills": "/skills",
        "health": "/health",
    }
    for name, path in paths.items():
        page.goto(url + path)
        if name == "agent":
            page.wait_for_selector("html[data-drawn]")
        if name == "conversation":
            page.get_by_text("Tokens by how likely they were").first.click()
            page.wait_for_selector(".stream")
        page.wait_for_timeout(1_000)
        height = page.evaluate("Math.ceil(document.body.getBoundingClientRect().height)")
        page.set_viewport_size({"width": WIDTH, "height": min(height, TALLEST)})
        page.screenshot(path=TARGET / f"console-{name}.png")
        page.set_viewport_size({"width": WIDTH, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.goto(f"{url}/agents/{agent}")
    page.wait_for_selector("html[data-drawn]")
    page.screenshot(path=TARGET / "console-agent-dark.png")


def take_in_litellm(browser: Browser, folder: Path, agent: str) -> None:
    """MetaClaw in LiteLLM's admin UI, and the agents on LiteLLM's own pages; ``folder`` holds ``home``."""
    build()
    config = admin_ui.database_config(
        folder, "http://127.0.0.1:9", pick_free_port(), pick_free_port(), rl={"enabled": False}
    )
    with admin_ui.running_litellm(config) as url:
        key = {"metadata": {"agent_id": agent}, "user_id": "ann"}
        bearer = {"authorization": f"Bearer {admin_ui.MASTER_KEY}"}
        httpx.post(f"{url}/key/generate", json=key, headers=bearer, timeout=60).raise_for_status()
        with admin_ui.running_beside(config):
            walk(browser.new_page(viewport={"width": 1300, "height": 950}), url, agent)


def walk(page: Page, url: str, agent: str) -> None:
    """The pictures of LiteLLM's admin UI."""
    page.set_default_timeout(60_000)
    admin_ui.sign_in(page, url)
    about_the_password = page.get_by_text("Environment-credential login is enabled")
    about_the_password.locator("xpath=ancestor::*[.//button][1]").get_by_role("button").click()
    metaclaw = admin_ui.choose_metaclaw(page)
    metaclaw.get_by_role("link", name=agent).click()
    metaclaw.locator("html[data-drawn]").wait_for()
    page.wait_for_timeout(1_000)
    page.screenshot(path=TARGET / "litellm-metaclaw.png")
    admin_ui.leave_metaclaw(page)
    for name, path, text in (
        ("models", "models-and-endpoints", rf"metaclaw/{agent}@v\d+"),
        ("keys", "api-keys", agent),
    ):
        page.goto(f"{url}/ui/{path}")
        page.get_by_text(re.compile(f"^{text}$")).first.wait_for()
        page.wait_for_timeout(1_500)
        page.screenshot(path=TARGET / f"litellm-{name}.png")
    page.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the console's pictures.")
    parser.add_argument("--without-litellm", action="store_true", help="Only the console by itself.")
    parser.add_argument("home", nargs="?", type=Path, default=ROOT / "runs" / "demo" / "home")
    given = parser.parse_args()
    browser_path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser_path is None:
        raise SystemExit("no Chromium on this machine (Debian: apt-get install chromium)")
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "home"
        shutil.copytree(given.home, home)
        agent, session = best_agent(home)
        process, url = start_console(home, ROOT / ".cache" / "models" / "smollm2-135m")
        try:
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(viewport={"width": WIDTH, "height": 800})
                page.set_default_timeout(60_000)
                take(page, url, agent, session)
                if not given.without_litellm:
                    take_in_litellm(browser, Path(temporary), agent)
                browser.close()
        finally:
            process.terminate()
            process.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
