"""What the demo runs in: a fresh home under ``runs/demo`` with its own ports, keys, hooks and skills."""

from __future__ import annotations

import shutil
import socket
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml

from demo.models import ROOT

AGENTS = {"brief": "short_answers.py", "ample": "long_answers.py"}
BATCH_SIZE = 8  # interactions that make an adapter version


@dataclass(frozen=True)
class Stage:
    """Where one run of the demo happens."""

    folder: Path
    config: Path
    gateway: str  # root URL
    vllm: str  # root URL
    trainer: str  # root URL
    shuffled: bool  # the control: rewards that say nothing about the answers

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def reward_file(self, agent: str) -> Path:
        return ROOT / "demo" / "hooks" / agent / AGENTS[agent]


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def set_stage(folder: Path, model: Path, shuffled: bool) -> Stage:
    """Make a fresh home and config file in ``folder``; what an earlier run left there is removed.

    The config is the repository's own ``litellm_config.yaml`` with the demo's settings in its section ``metaclaw``.
    """
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)
    gateway, trainer, vllm = free_ports(3)
    stage = Stage(
        folder,
        folder / "config.yaml",
        gateway=f"http://127.0.0.1:{gateway}",
        vllm=f"http://127.0.0.1:{vllm}",
        trainer=f"http://127.0.0.1:{trainer}",
        shuffled=shuffled,
    )
    config = yaml.safe_load((ROOT / "litellm_config.yaml").read_text(encoding="utf-8"))
    config["metaclaw"] = _settings(stage, model, gateway)
    for deployment in config["model_list"]:
        if deployment["model_name"] == "metaclaw/*":
            deployment["litellm_params"]["api_base"] = f"{stage.vllm}/v1"
    stage.config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copytree(ROOT / "demo" / "skills", home / "skills")
    for agent in AGENTS:
        _place_reward(stage, agent)
    return stage


def _settings(stage: Stage, model: Path, gateway_port: int) -> dict[str, object]:
    return {
        "home": str(stage.home),
        "mode": "rl",
        "base_model": str(model),
        "gateway": {"port": gateway_port},
        "console": {"port": free_ports(1)[0]},
        # No replays: the demo has no gate, and measures on questions of its own.
        "sessions": {"held_out_one_in": 0},
        "publish": {"policy": "always"},
        "skills": {"starter": False},
        "vllm": {"url": stage.vllm, "dtype": "float32", "max_model_len": 1024, "max_lora_rank": 16, "cpu_cores": "0"},
        "rl": {"remote_url": stage.trainer},
        "trainer": {
            "rank": 16,
            "alpha": 32,
            "dtype": "float32",
            "torch_threads": 1,  # vLLM has the other core
            "batch_size": BATCH_SIZE,
            "learning_rate": 7e-4,
            "normalisation": "sequence",
            "kl_coefficient": 0.1,
        },
    }


def _place_reward(stage: Stage, agent: str) -> None:
    """Drop the agent's reward file into its folder of hooks; in the control, followed by what shuffles."""
    target = stage.home / "hooks" / agent
    target.mkdir(parents=True)
    text = stage.reward_file(agent).read_text(encoding="utf-8")
    if stage.shuffled:
        text = text.replace("def score_trace(", "def earned(") + textwrap.dedent(_SHUFFLE)
    (target / AGENTS[agent]).write_text(text, encoding="utf-8")


_SHUFFLE = """

# The control: an answer gets what any answer before it had earned, so rewards say nothing about answers. Not simply the
# one before: short answers are finished, and so scored, together.
import random

_earned = []
_dice = random.Random(0)


def score_trace(trace):
    _earned.append(earned(trace))
    return _dice.choice(_earned[:-1]) if len(_earned) > 1 else None
"""
