"""The whole loop on real parts: talk, capture, reward, train, publish, and talk to the new version."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.vllm_server import VllmProcess, pick_free_port

ROOT = Path(__file__).resolve().parents[2]
METACLAW = [sys.executable, "-m", "metaclaw_plugin.cli.main"]
BATCH = 4
REWARD = """
def score_trace(trace):
    return {sign} * (1.0 if len(trace.response_text) % 2 else -1.0)
"""


@dataclass(frozen=True)
class System:
    """A started system with two agents."""

    config: Path
    gateway: str
    keys: dict[str, str]

    def metaclaw(self, *arguments: str) -> str:
        done = subprocess.run(
            [*METACLAW, *arguments, "--config", str(self.config)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def client(self, agent: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.gateway}/v1", api_key=self.keys[agent], max_retries=0, timeout=120)

    def status(self, agent: str) -> dict[str, Any]:
        agents = json.loads(self.metaclaw("status", "--json"))["agents"]
        return next(one for one in agents if one["agent"] == agent)

    def traces(self, agent: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metaclaw("traces", "export", "--agent", agent).splitlines()]


def write_config(folder: Path, vllm: VllmProcess) -> tuple[Path, str]:
    gateway, trainer = pick_free_port(), pick_free_port()
    config = yaml.safe_load((ROOT / "litellm_config.yaml").read_text(encoding="utf-8"))
    config["model_list"][0]["litellm_params"]["api_base"] = f"{vllm.url}/v1"
    config["metaclaw"] = {
        "home": str(folder / "home"),
        "base_model": str(vllm.model),
        "gateway": {"port": gateway},
        "console": {"port": pick_free_port()},
        "sessions": {"held_out_one_in": 0},
        "publish": {"policy": "always"},
        "skills": {"starter": False},
        "vllm": {"url": vllm.url, "managed": False},
        "rl": {"remote_url": f"http://127.0.0.1:{trainer}"},
        "trainer": {"batch_size": BATCH, "rank": 8, "learning_rate": 1e-3, "dtype": "float32"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path, f"http://127.0.0.1:{gateway}"


@pytest.fixture(scope="module")
def system(tiny_vllm: VllmProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("loop")
    config, gateway = write_config(folder, tiny_vllm)
    for agent, sign in (("even", -1), ("odd", 1)):
        hooks = folder / "home" / "hooks" / agent
        hooks.mkdir(parents=True)
        (hooks / "parity.py").write_text(REWARD.format(sign=sign), encoding="utf-8")
    skill = folder / "home" / "skills" / "odd" / "count-letters"
    skill.mkdir(parents=True)
    text = "---\nname: count-letters\ndescription: How to count the letters of words.\n---\nCount letters twice.\n"
    (skill / "SKILL.md").write_text(text, encoding="utf-8")
    started = System(config, gateway, {})
    for agent in ("even", "odd"):
        started.keys[agent] = json.loads(started.metaclaw("agents", "add", agent, "--json"))["key"]
    process = subprocess.Popen([*METACLAW, "start", "--config", str(config)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any(line.startswith("Ready") for line in process.stdout):
            logs = "\n".join(log.read_text()[-2000:] for log in (folder / "home" / "logs").glob("*.log"))
            pytest.fail(f"metaclaw start ended with {process.wait()}:\n{logs}")
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def talk(client: openai.OpenAI, agent: str, text: str) -> tuple[str, httpx.Headers]:
    raw = client.chat.completions.with_raw_response.create(
        model=f"metaclaw/{agent}", messages=[{"role": "user", "content": text}], max_tokens=12, stream=True
    )
    pieces = [choice.delta.content or "" for chunk in raw.parse() for choice in chunk.choices]
    return "".join(pieces), raw.headers


@pytest.mark.vllm
@pytest.mark.gateway
def test_two_agents_learn_from_talk_and_answer_by_their_own_new_versions(system: System) -> None:
    clients = {agent: system.client(agent) for agent in system.keys}
    replies: dict[str, list[str]] = {agent: [] for agent in system.keys}
    deadline = time.monotonic() + 240
    asked = 0
    # Adapters are trained and swapped while this goes on; no request may fail meanwhile.
    while time.monotonic() < deadline:
        for agent, client in clients.items():
            text, headers = talk(client, agent, f"Count the letters of the word number {asked}.")
            assert headers["x-metaclaw-trace-id"]
            replies[agent].append(text)
        asked += 1
        versions = {agent: talk_version(client, agent) for agent, client in clients.items() if asked % 4 == 0}
        if versions and all(versions.values()):
            break
    else:
        pytest.fail(f"no version of each agent served in time: {system.metaclaw('status')}")

    for agent in system.keys:
        traces = system.traces(agent)
        assert [trace["response"]["content"] for trace in traces][: len(replies[agent])] != []
        assert {trace["agent"] for trace in traces} == {agent}
        assert {trace["adapter_version"] for trace in traces} >= {0, 1}
        for trace in traces:
            assert trace["trainable"], trace["reason"]
            assert len(trace["response_token_ids"]) == len(trace["response_logprobs"]) > 0
        injected = {skill["name"] for trace in traces for skill in trace["skills"]}
        assert injected == ({"count-letters"} if agent == "odd" else set())


def talk_version(client: openai.OpenAI, agent: str) -> int:
    _, headers = talk(client, agent, "Hello there.")
    name = headers["x-metaclaw-adapter"]
    return int(name.rpartition("@v")[2]) if name.startswith(f"{agent}@v") else 0


@pytest.mark.gateway
def test_each_key_lists_its_own_model_and_an_unknown_key_is_refused(system: System) -> None:
    for agent in system.keys:
        names = [model.id for model in system.client(agent).models.list()]
        assert f"metaclaw/{agent}" in names
        assert not {f"metaclaw/{other}" for other in system.keys if other != agent} & set(names)
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{system.gateway}/v1", api_key="mc-nobody", max_retries=0).models.list()
    assert refused.value.status_code == 401
    assert refused.value.body is not None
    assert os.environ.get("OPENAI_API_KEY", "mc-nobody") not in str(refused.value.body)
