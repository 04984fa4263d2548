"""The whole system in one folder: gateway with its workers, worker, trainer, upstream, and the wires between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil

from metaclaw_plugin.gateway.command import METRICS_ENV, gateway_command
from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.settings import Settings, load_settings
from metaclaw_plugin.store.agents import add_agent, new_key, set_settings
from metaclaw_plugin.store.engine import open_store
from tests.faults import points
from tests.faults.disk import Disk
from tests.faults.link import Link
from tests.gateway_server import write_config
from tests.vllm_server import pick_free_port, start_vllm

ROOT = Path(__file__).resolve().parents[2]
AGENTS = ("alpha", "beta", "gamma")
GATED = "gamma"  # the agent that has a skill, and whose candidates are replayed on held-out sessions, if any has
SKILL_NAME = "speak-as-gamma"
SKILL = f"""---
name: {SKILL_NAME}
description: When gamma is asked, gamma answers.
---
Say who you are.
"""
BATCH = 3  # samples to a training step
START_TIMEOUT = 240.0  # seconds
REWARD = "def score_trace(trace): return 1.0 if sum(trace.response_token_ids) % 2 else -1.0\n"


def reward_of(token_ids: Sequence[int]) -> float:
    """What REWARD gives to an answer."""
    return 1.0 if sum(token_ids) % 2 else -1.0


TRAINER = {
    "device": "cpu",
    "dtype": "float32",
    "rank": 4,
    "nice": 0,
    "torch_threads": 1,
    "targets": ["q_proj"],
    "batch_size": BATCH,
    "poll_interval": 0.1,
    "learning_rate": 1e-3,
    "max_staleness": 100_000,
}


@dataclass
class Stage:
    """A running system, and what can be done to it."""

    folder: Path
    config: Path
    settings: Settings
    keys: dict[str, str]  # agent -> its key
    model: Path
    real_vllm: bool
    links: dict[str, Link]  # gateway-vllm, worker-vllm, worker-trainer, trainer-vllm
    store_disk: Disk
    trainer_disk: Disk
    vllm_port: int
    trainer_port: int
    breakable: bool  # the gateway has the named points in it
    pause: float  # seconds between two pieces of the wire-true upstream
    gateway: subprocess.Popen[bytes] = field(init=False)
    vllm: subprocess.Popen[bytes] = field(init=False)
    nursery: subprocess.Popen[bytes] = field(init=False)
    metrics_folder: Path = field(init=False)  # where the gateway's workers count; of one that has several

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.gateway.port}"

    @property
    def store_file(self) -> Path:
        return self.settings.home / "metaclaw.db"

    @property
    def trainer_home(self) -> Path:
        return Path(self.settings.trainer["home"]) / "trainer"

    def pid(self, name: str) -> int:
        """Process id of ``worker``, ``worker-2`` or ``trainer``; 0 while it does not run."""
        try:
            return int(json.loads((self.folder / "pids.json").read_text(encoding="ascii"))[name])
        except FileNotFoundError:
            return 0

    def gateway_workers(self) -> list[int]:
        """Process ids of the gateway's workers; of one without workers, its own."""
        if self.settings.gateway.workers == 1:
            return [self.gateway.pid]
        try:
            children = psutil.Process(self.gateway.pid).children()
            return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def order(self, words: str) -> None:
        """Tell the nursery; see there."""
        assert self.nursery.stdin is not None
        self.nursery.stdin.write(f"{words}\n".encode("ascii"))
        self.nursery.stdin.flush()

    def start_vllm(self) -> None:
        if self.real_vllm:
            self.vllm = start_vllm(self.model, self.vllm_port, self.folder / "vllm.log", self.trainer_port)
            return
        argv = [sys.executable, "-m", "tests.faults.upstream", str(self.vllm_port), str(self.model), f"{self.pause}"]
        with (self.folder / "vllm.log").open("ab") as log:
            self.vllm = subprocess.Popen(argv, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    def start_gateway(self) -> None:
        argv, env = gateway_command(self.settings, self.config)
        if self.breakable:
            argv[argv.index("litellm.proxy.proxy_cli")] = "tests.faults.at_point"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**env, points.FOLDER_ENV: str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}
        if METRICS_ENV in env:
            self.metrics_folder = Path(env[METRICS_ENV])
        with (self.folder / "gateway.log").open("ab") as log:
            self.gateway = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    def start_nursery(self) -> None:
        argv = [sys.executable, "-m", "tests.faults.nursery", str(self.config), str(self.folder)]
        argv.append(str(self.trainer_port))
        with (self.folder / "nursery.log").open("ab") as log:
            self.nursery = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    async def answers(self, url: str, timeout: float = START_TIMEOUT) -> float:
        """Wait until ``url`` answers 200; the seconds that it took.

        Raises:
            TimeoutError: if it does not.
        """
        began = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            while time.monotonic() < began + timeout:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(url) as answer:
                        if answer.status == 200:
                            return time.monotonic() - began
                await asyncio.sleep(0.1)
        raise TimeoutError(f"{url} did not answer within {timeout:.0f} s; the logs are in {self.folder}")

    async def all_answer(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until every process answers."""
        await self.answers(f"http://127.0.0.1:{self.vllm_port}/health", timeout)
        await self.answers(f"http://127.0.0.1:{self.trainer_port}/v1/health", timeout)
        await self.answers(f"{self.url}/health/liveliness", timeout)

    async def counted(self) -> dict[str, int]:
        """What the gateway has counted: name -> how many, of all agents."""
        headers = {"authorization": f"Bearer {internal_key(self.settings.home)}"}
        timeout = aiohttp.ClientTimeout(total=90)  # both workers may be starting
        text, deadline = "", time.monotonic() + START_TIMEOUT
        while not text:
            try:
                async with (
                    aiohttp.ClientSession(timeout=timeout) as http,
                    http.get(f"{self.url}/metaclaw/metrics", headers=headers) as answer,
                ):
                    text = await answer.text()
            except (aiohttp.ClientError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)  # the worker that had the question was killed
        found: dict[str, int] = {}
        for line in text.splitlines():
            if line.startswith("metaclaw_events_total{"):
                name = line.partition('name="')[2].partition('"')[0]
                found[name] = found.get(name, 0) + int(float(line.rpartition(" ")[2]))
        return found

    @contextmanager
    def locked(self, file: Path) -> Iterator[None]:
        """Hold the write lock of a database, as a backup that hangs would."""
        connection = sqlite3.connect(file, timeout=10, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield
        finally:
            connection.close()

    def is_locked(self, file: Path) -> bool:
        """Whether somebody holds the write lock of a database now."""
        with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as c:
            try:
                c.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            c.execute("ROLLBACK")
            return False


def _settings(
    folder: Path, model: Path, trainer_home: Path, ports: dict[str, int], workers: int, gated: bool
) -> dict[str, Any]:
    return {
        "mode": "rl",
        "base_model": str(model),
        "gateway": {"workers": workers, "port": pick_free_port()},
        "sessions": {"held_out_one_in": 6 if gated else 0},
        "hooks": {"timeout": 2},
        "skills": {"starter": False, "max_skills": int(gated), "min_relevance": 0.0},
        "rewards": {"weights": {"next_turn": 0, "tool_outcome": 0}},
        "worker": {"merge_wait": 1.0, "poll_interval": 0.2, "max_backoff": 1.0, "lease": 5, "evidence_timeout": 1},
        "publish": {"policy": "always", "retry_interval": 0.5, "refresh_interval": 2.0, "dead_after": 5, "replays": 4},
        "vllm": {"url": f"http://127.0.0.1:{ports['worker-vllm']}", "managed": False},
        "rl": {"remote_url": f"http://127.0.0.1:{ports['worker-trainer']}"},
        "console": {"enabled": False},
        "trainer": {
            **TRAINER,
            "home": str(trainer_home),
            "hooks_path": str(folder / "no-hooks"),
            "vllm_urls": [f"http://127.0.0.1:{ports['trainer-vllm']}"],
        },
    }


@asynccontextmanager
async def standing(
    folder: Path,
    model: Path,
    *,
    real_vllm: bool = False,
    workers: int = 2,
    breakable: bool = True,
    gated: bool = False,
    pause: float = 0.02,
) -> AsyncIterator[Stage]:
    """The whole system, ready; ended when the block ends.

    ``breakable``: with the named points in the gateway, and small disks; ``gated``: one session in six is held out,
    and one agent has a skill, and has its candidates judged by those sessions; ``pause``: seconds between two pieces
    of an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vllm_port, trainer_port = pick_free_port(), pick_free_port()
    targets = {"gateway-vllm": vllm_port, "worker-vllm": vllm_port, "trainer-vllm": vllm_port}
    links = {name: Link(target) for name, target in {**targets, "worker-trainer": trainer_port}.items()}
    for link in links.values():
        await link.start()
    ports = {name: link.port for name, link in links.items()}
    store_disk, trainer_disk = Disk(folder / "home"), Disk(folder / "trainer-home")
    made = _settings(folder, model, folder / "trainer-home", ports, workers, gated)
    if not real_vllm:
        made["trainer"]["gap_threshold"] = 1e9  # what the upstream says of log-probabilities is made up
    upstream = f"http://127.0.0.1:{ports['gateway-vllm']}"
    config = write_config(folder, upstream, made["gateway"]["port"], ours=True, **made)
    settings = load_settings(config)
    with contextlib.ExitStack() as ended:
        ended.enter_context(store_disk.mounted(small=breakable))
        ended.enter_context(trainer_disk.mounted(small=breakable))
        (settings.home / "hooks").mkdir(parents=True)
        (settings.home / "hooks" / "parity.py").write_text(REWARD, encoding="utf-8")
        if gated:
            skill = settings.skills_path / GATED / SKILL_NAME
            skill.mkdir(parents=True)
            (skill / "SKILL.md").write_text(SKILL, encoding="utf-8")
        keys = _agents(settings, gated)
        stage = Stage(folder, config, settings, keys, model, real_vllm, links, store_disk, trainer_disk,
                      vllm_port, trainer_port, breakable, pause)  # fmt: skip
        stage.start_vllm()
        ended.callback(lambda: _end(stage.vllm))
        stage.start_nursery()
        ended.callback(lambda: _end(stage.nursery))
        stage.start_gateway()
        ended.callback(lambda: _end(stage.gateway))
        try:
            await stage.all_answer()
            yield stage
        finally:
            for link in links.values():
                await link.stop()


def _agents(settings: Settings, gated: bool) -> dict[str, str]:
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        for name in AGENTS:
            add_agent(c, name)
        if gated:
            set_settings(c, GATED, {"publish": {"policy": "not_worse"}})
        keys = {name: new_key(c, [name]).secret for name in AGENTS}
    engine.dispose()
    return keys


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and its session."""
    stdin: IO[bytes] | None = process.stdin
    if stdin is not None:
        stdin.close()  # the nursery takes its children with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
