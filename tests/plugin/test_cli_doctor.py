"""The doctor finds what is wrong, and says nothing of what is not."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from metaclaw_plugin.cli.doctor import app
from metaclaw_plugin.doctor import machine
from metaclaw_plugin.doctor.agreement import look_at_agreement
from metaclaw_plugin.doctor.configuration import look_at_configuration
from metaclaw_plugin.doctor.finding import Finding, Level
from metaclaw_plugin.doctor.machine import look_at_machine
from metaclaw_plugin.doctor.services import look_at_services
from metaclaw_plugin.first_config import Answers, config_text
from metaclaw_plugin.settings import RlSettings, Settings, VllmSettings, parse_settings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(config_text(Answers("local", tmp_path / "home", base_model=str(model))))
    path.chmod(0o600)
    return path


def examine(path: Path) -> dict[str, Finding]:
    data = yaml.safe_load(path.read_text())
    settings = parse_settings(data["metaclaw"], str(path))
    return {finding.about: finding for finding in look_at_configuration(settings, path)}


def changed(path: Path, change: Any) -> dict[str, Finding]:
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))
    return examine(path)


def test_a_config_of_the_wizard_is_well(config: Path) -> None:
    findings = examine(config)
    assert {finding.level for finding in findings.values()} == {Level.OK}
    assert {"callback", "keys", "model_list", "base model", "adapter rank"} <= set(findings)


@pytest.mark.parametrize(
    ("change", "about", "seen"),
    [
        (lambda data: data["litellm_settings"].pop("callbacks"), "callback", "nothing is captured"),
        (
            lambda data: data["litellm_settings"].update(callbacks=["metaclaw_plugin.callback.handler"] * 2),
            "callback",
            "2 times",
        ),
        (lambda data: data["general_settings"].clear(), "keys", "would answer anybody"),
        (lambda data: data["model_list"].clear(), "model_list", "no deployment"),
        (
            lambda data: data["model_list"][0]["litellm_params"].update(api_base="http://x/v1"),
            "model_list",
            "goes to http://x/v1",
        ),
        (
            lambda data: data["model_list"][0]["litellm_params"].update(model="openai/gpt"),
            "model_list",
            "serves no adapters",
        ),
        (lambda data: data["metaclaw"].update(base_model="/no/where"), "base model", "/no/where"),
        (lambda data: data["metaclaw"].update(trainer={"rank": 64}), "adapter rank", "rank 64, vLLM serves up to 32"),
    ],
)
def test_each_thing_that_is_wrong_is_a_failure_with_a_remedy(config: Path, change: Any, about: str, seen: str) -> None:
    finding = changed(config, change)[about]
    assert finding.level is Level.FAILURE
    assert seen in finding.seen
    assert finding.remedy


def test_a_model_without_a_chat_template_is_found(config: Path, model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    assert examine(config)["chat template"].level is Level.FAILURE


def test_packages_that_cannot_work_without_cuda_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: "2.13.0+cpu" if name == "torch" else None)
    monkeypatch.setattr(machine, "installed", lambda name: name == "torchvision")
    assert machine.broken_by_cuda() == ["torchvision"]


def test_a_version_that_we_do_not_ask_for_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: "1.82.7" if name == "litellm" else real(name))
    findings = {f.about: f for f in look_at_machine(Settings(home=tmp_path, mode="skills_only"), None)}
    assert findings["litellm"].level is Level.FAILURE
    assert "1.106.2 is needed" in findings["litellm"].seen


def test_an_open_home_and_a_readable_key_are_warned_of(tmp_path: Path) -> None:
    home, config = tmp_path / "home", tmp_path / "config.yaml"
    home.mkdir(mode=0o755)
    config.write_text("metaclaw:\n  rl:\n    remote_api_key: a-secret\n")
    config.chmod(0o644)
    findings = {f.about: f for f in look_at_machine(Settings(home=home), config)}
    assert findings["METACLAW_HOME"].level is Level.WARNING
    assert findings["config file"].level is Level.WARNING
    assert "a-secret" not in str(findings)


@pytest.fixture
def server() -> Iterator[tuple[str, dict[tuple[str, str], tuple[int, Any]]]]:
    """Answers by (method, path); 404 for everything else."""
    answers: dict[tuple[str, str], tuple[int, Any]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            status, body = answers.get((self.command, self.path), (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", answers
    httpd.shutdown()
    httpd.server_close()


SERVED = {"data": [{"id": "metaclaw-base"}, {"id": "plain@v2"}]}
TOKENS = {"prompt_token_ids": [1], "choices": [{"token_ids": [2]}]}


def services(url: str, **more: Any) -> dict[str, Finding]:
    settings = Settings(vllm=VllmSettings(url=url), rl=RlSettings(remote_url=url), **more)
    return {finding.about: finding for finding in look_at_services(settings)}


def test_services_that_are_well(server: tuple[str, dict[tuple[str, str], tuple[int, Any]]]) -> None:
    url, answers = server
    answers["GET", "/v1/models"] = (200, SERVED)
    answers["POST", "/v1/load_lora_adapter"] = (400, {})
    answers["POST", "/v1/chat/completions"] = (200, TOKENS)
    answers["GET", "/v1/health"] = (200, {"device": "cpu", "base_model": "m"})
    answers["GET", "/v1/agents"] = (200, {"agents": []})
    findings = services(url)
    for about in ("vLLM", "vLLM adapters", "vLLM tokens", "trainer", "clock"):
        assert findings[about].level is Level.OK, findings[about]
    assert findings["gateway"].level is Level.WARNING  # none at its port


@pytest.mark.parametrize(
    ("path", "answer", "about", "seen"),
    [
        (("GET", "/v1/models"), (200, {"data": [{"id": "other"}]}), "vLLM", "serves other, but not metaclaw-base"),
        (("POST", "/v1/load_lora_adapter"), (404, {}), "vLLM adapters", "cannot be loaded at run time"),
        (("POST", "/v1/chat/completions"), (200, {"choices": [{}]}), "vLLM tokens", "no token ids"),
        (("GET", "/v1/agents"), (401, {}), "trainer", "refuses our key"),
        (("GET", "/v1/health"), (200, {"base_model": "/a/other"}), "models", "the trainer adapts /a/other"),
    ],
)
def test_services_that_are_not(
    server: tuple[str, dict[tuple[str, str], tuple[int, Any]]],
    path: tuple[str, str],
    answer: tuple[int, Any],
    about: str,
    seen: str,
) -> None:
    url, answers = server
    answers["GET", "/v1/models"] = (200, SERVED)
    answers["POST", "/v1/load_lora_adapter"] = (400, {})
    answers["POST", "/v1/chat/completions"] = (200, TOKENS)
    answers["GET", "/v1/health"] = (200, {"device": "cpu", "base_model": "/a/model"})
    answers["GET", "/v1/agents"] = (200, {"agents": []})
    answers[path] = answer
    finding = services(url, base_model="/a/model")[about]
    assert finding.level is Level.FAILURE
    assert seen in finding.seen
    assert finding.remedy


@pytest.mark.parametrize(("loss", "level"), [(1.5, Level.OK), (1.9, Level.WARNING), (9.0, Level.FAILURE), (None, None)])
def test_vllm_and_trainer_are_compared_by_the_log_probabilities_of_one_answer(
    server: tuple[str, dict[tuple[str, str], tuple[int, Any]]], loss: float | None, level: Level | None
) -> None:
    url, answers = server
    choice = {"token_ids": [3, 4], "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -0.5}]}}
    answers["POST", "/v1/chat/completions"] = (200, {"prompt_token_ids": [1, 2], "choices": [choice]})
    answers["POST", "/v1/lora/create"] = (200, {"session_id": "run1"})
    answers["DELETE", "/v1/lora/run1"] = (200, {"status": "ok"})
    if loss is not None:
        answers["POST", "/v1/train/forward_backward"] = (200, {"loss": loss, "total_tokens": 2, "num_datums": 1})
    settings = Settings(vllm=VllmSettings(url=url), rl=RlSettings(remote_url=url))
    assert [finding.level for finding in look_at_agreement(settings)] == ([level] if level else [])


def test_the_exit_code_tells_whether_something_failed(config: Path) -> None:
    well = CliRunner().invoke(app, ["--config", str(config), "--json"])
    assert well.exit_code == 0, well.output
    levels = {item["level"] for item in json.loads(well.output)}
    assert "failure" not in levels
    text = config.read_text().replace("metaclaw_plugin.callback.handler", "other.handler")
    config.write_text(text)
    assert CliRunner().invoke(app, ["--config", str(config)]).exit_code == 1
