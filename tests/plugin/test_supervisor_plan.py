"""What `metaclaw start` runs for which configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Mode

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import ConsoleSettings, GatewaySettings, RlSettings, Settings, VllmSettings
from metaclaw_plugin.supervisor.plan import plan, reachable, trainer_launch, trainer_port


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return str(folder)


CONFIG = Path("/config/litellm_config.yaml")


def names(settings: Settings) -> list[str]:
    return [service.name for service in plan(settings, CONFIG)]


def test_each_configuration_starts_what_it_needs(model: str) -> None:
    assert names(Settings(base_model=model)) == ["vllm", "trainer", "gateway", "worker", "console"]
    assert names(Settings(base_model=model, mode=Mode.AUTO)) == ["vllm", "trainer", "gateway", "worker", "console"]
    unmanaged = Settings(base_model=model, vllm=VllmSettings(managed=False))
    assert names(unmanaged) == ["trainer", "gateway", "worker", "console"]
    assert names(Settings(mode=Mode.SKILLS_ONLY)) == ["gateway", "worker", "console"]
    assert names(Settings(rl=RlSettings(enabled=False))) == ["gateway", "worker", "console"]
    remote = RlSettings(backend="remote", remote_url="http://gpu:4010")
    assert names(Settings(rl=remote, console=ConsoleSettings(enabled=False))) == ["gateway", "worker"]


def test_a_part_can_be_started_alone_as_on_a_gpu_server(model: str) -> None:
    settings = Settings(base_model=model)
    assert [service.name for service in plan(settings, CONFIG, ["trainer", "vllm"])] == ["vllm", "trainer"]
    with pytest.raises(ConfigError, match="--only vllm: with this configuration there are gateway, worker, console"):
        plan(Settings(mode=Mode.SKILLS_ONLY), CONFIG, ["vllm"])


def test_every_process_is_told_where_config_and_data_are(model: str, tmp_path: Path) -> None:
    for service in plan(Settings(base_model=model, home=tmp_path), CONFIG):
        if service.name != "vllm":  # which is configured by its arguments alone
            assert service.launch.env["METACLAW_CONFIG"] == str(CONFIG)
            assert service.launch.env["METACLAW_HOME"] == str(tmp_path)


def test_ports_and_addresses_are_those_of_the_settings(model: str) -> None:
    settings = Settings(
        base_model=model,
        gateway=GatewaySettings(host="0.0.0.0", port=4444),
        vllm=VllmSettings(url="http://127.0.0.1:8888"),
        rl=RlSettings(remote_url="http://127.0.0.1:4111"),
        console=ConsoleSettings(port=4222),
    )
    services = {service.name: service for service in plan(settings, CONFIG)}
    assert {name: service.port for name, service in services.items()} == {
        "vllm": 8888,
        "trainer": 4111,
        "gateway": 4444,
        "worker": None,
        "console": 4222,
    }
    assert services["gateway"].url == "http://127.0.0.1:4444"
    assert "4111" in services["trainer"].launch.argv
    assert reachable("::") == "127.0.0.1"


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({"base_model": None}, CONFIG, "no model is set"),
        ({"mode": Mode.SKILLS_ONLY}, None, "no config file: name one with --config"),
        ({"trainer": {"port": 9999}}, CONFIG, r"metaclaw\.trainer\.port is 9999, but the worker looks .* port 4010"),
    ],
)
def test_what_cannot_be_started_is_said_before_anything_is(
    model: str, more: dict[str, Any], config: Path | None, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(Settings(**{"base_model": model, **more}), config)


def test_the_trainer_gets_its_devices_and_on_a_server_its_own_port(model: str) -> None:
    settings = Settings(base_model=model, trainer={"devices": "2,3", "port": 9999}, rl=RlSettings(backend="remote"))
    launch = trainer_launch(settings, CONFIG)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "--port" not in launch.argv
    assert trainer_port(settings) == 4010
