"""Where benchmarks.publish happens: a home with all processes of the house, and agents with keys."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from metaclaw_hooks.types import Mode

from demo.models import ROOT
from demo.stage import free_ports
from metaclaw_plugin.store.agents import add_agent, new_key
from metaclaw_plugin.store.engine import open_store

PARTS = {"vllm": "vllm", "VLLM": "vllm", "litellm": "gateway", "metaclaw_trainer": "trainer", "worker": "worker"}


@dataclass
class Stage:
    """One home with its processes' addresses."""

    home: Path
    config: Path
    gateway: str
    vllm: str
    keys: dict[str, str]

    @property
    def trainer_home(self) -> Path:
        return self.home / "trainer"


def set_stage(folder: Path, model: Path, agents: int, kv_blocks: int | None = None) -> Stage:
    """Write the configuration, and add the agents with a key each.

    ``kv_blocks``: of vLLM's cache; a small one is soon used whole, and then vLLM's memory says what else grows.
    """
    gateway, trainer, vllm = free_ports(3)
    home = folder / "home"
    config = yaml.safe_load((ROOT / "litellm_config.yaml").read_text(encoding="utf-8"))
    config["metaclaw"] = {
        "home": str(home),
        "mode": "rl",
        "base_model": str(model),
        "gateway": {"port": gateway},
        "publish": {"policy": "always"},
        "skills": {"starter": False},
        "console": {"enabled": False},
        "vllm": {
            "url": f"http://127.0.0.1:{vllm}",
            "dtype": "float32",
            "max_model_len": 1024,
            "cpu_cores": "0-1",
            "extra_args": [] if kv_blocks is None else ["--num-gpu-blocks-override", str(kv_blocks)],
        },
        "rl": {"remote_url": f"http://127.0.0.1:{trainer}"},
        "trainer": {"dtype": "float32"},
    }
    for deployment in config["model_list"]:
        if deployment["model_name"] == "metaclaw/*":
            deployment["litellm_params"]["api_base"] = f"http://127.0.0.1:{vllm}/v1"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    keys = {}
    with engine.begin() as c:
        for number in range(agents):
            name = f"agent-{number}"
            add_agent(c, name, Mode.SKILLS_ONLY)  # nothing is trained: the versions come from here
            keys[name] = new_key(c, [name]).secret
    engine.dispose()
    return Stage(home, path, f"http://127.0.0.1:{gateway}", f"http://127.0.0.1:{vllm}", keys)


@contextmanager
def running(stage: Stage, logs: Path | None = None) -> Iterator[None]:
    """``metaclaw start`` until the block ends; its logs are copied to ``logs``."""
    command = [sys.executable, "-m", "metaclaw_plugin.cli.main", "start", "--config", str(stage.config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Ready"):
                break
        else:
            raise SystemExit(f"metaclaw start ended with {process.wait()}; its logs are in {stage.home / 'logs'}")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        if logs is not None:
            shutil.copytree(stage.home / "logs", logs, dirs_exist_ok=True)


def memory(stage: Stage) -> dict[str, float]:
    """Resident MiB of our processes, by a word of their command lines, and of the two stores on disk."""
    found: dict[str, float] = {}
    for child in psutil.Process().children(recursive=True):
        try:
            line, size = " ".join(child.cmdline()), child.memory_info().rss / 2**20
        except psutil.Error:
            continue
        if part := next((part for word, part in PARTS.items() if word in line), None):
            found[part] = found.get(part, 0.0) + size
    for part, path in (("store", stage.home / "metaclaw.db"), ("queue", stage.trainer_home / "queue.db")):
        found[part] = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20
    return found
