"""How vLLM is started: every flag is one that the installed vLLM knows, and a folder without a model is refused."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from litellm.constants import AIOHTTP_KEEPALIVE_TIMEOUT
from metaclaw_trainer.process import KEEP_ALIVE

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.launch import check_model
from metaclaw_plugin.settings import RlSettings, Settings, VllmSettings
from metaclaw_plugin.supervisor.plan import gateway_launch
from metaclaw_plugin.vllm_adapters import FOLDER_ENV, KEY_ENV, URL_ENV
from metaclaw_plugin.vllm_command import vllm_command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def vllm_source(*parts: str) -> str:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts).read_text(encoding="utf-8")


def test_adapters_can_be_loaded_at_run_time_and_nothing_is_sent_home(model: Path) -> None:
    launch = vllm_command(Settings(base_model=str(model)), cpu=True)
    argv = " ".join(launch.argv)
    assert f"--model {model} --served-model-name metaclaw-base --host 127.0.0.1 --port 8000" in argv
    assert "--enable-lora --max-lora-rank 32 --max-loras 4 --max-cpu-loras 32" in argv
    assert "--generation-config vllm" in argv
    assert "--enforce-eager" in argv
    assert launch.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert launch.env["VLLM_NO_USAGE_STATS"] == launch.env["DO_NOT_TRACK"] == "1"
    assert launch.env["HF_HUB_OFFLINE"] == "1"
    assert launch.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert launch.env["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"


def test_an_adapted_output_layer_is_refused_where_vllm_would_die_of_it(model: Path) -> None:
    settings = Settings(base_model=str(model), vllm=VllmSettings(lora_targets=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="dies of an adapted lm_head; take it out"):
        vllm_command(settings, cpu=True)
    assert "lm_head" in vllm_command(settings, cpu=False).argv


@pytest.mark.parametrize(
    ("more", "trainer", "share"),
    [
        ({}, {}, "0.5"),
        ({"gpu_memory": 0.7}, {}, "0.7"),
        ({"devices": "0,1", "tensor_parallel": 2}, {"devices": "2"}, None),
        ({"devices": "0,1", "tensor_parallel": 2}, {"devices": "1"}, "0.5"),
        ({"devices": "1"}, {}, None),
        ({"tensor_parallel": 2}, {"devices": "1"}, "0.5"),
    ],
)
def test_vllm_leaves_room_for_a_trainer_on_the_same_gpu(
    model: Path, more: dict[str, Any], trainer: dict[str, Any], share: str | None
) -> None:
    argv = vllm_command(Settings(base_model=str(model), vllm=VllmSettings(**more), trainer=trainer), cpu=False).argv
    assert ("--gpu-memory-utilization" in argv) == (share is not None)
    if share is not None:
        assert argv[argv.index("--gpu-memory-utilization") + 1] == share


@pytest.mark.law(10)
def test_law_10_neither_gateway_nor_vllm_sends_anything_home(model: Path) -> None:
    launch = vllm_command(Settings(base_model=str(model)), cpu=True)
    assert launch.env["VLLM_NO_USAGE_STATS"] == launch.env["VLLM_DO_NOT_TRACK"] == launch.env["DO_NOT_TRACK"] == "1"
    assert launch.env["HF_HUB_OFFLINE"] == "1"
    gateway = gateway_launch(Settings(), Path("/config/litellm_config.yaml"))
    assert gateway.env["LITELLM_LOCAL_MODEL_COST_MAP"] == gateway.env["LITELLM_LOCAL_BLOG_POSTS"] == "True"
    assert gateway.argv[gateway.argv.index("--telemetry") + 1] == "False"


def test_idle_connections_are_closed_by_those_who_use_them_and_not_by_the_server(model: Path) -> None:
    served = vllm_command(Settings(base_model=str(model)), cpu=True).env
    assert int(served["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > AIOHTTP_KEEPALIVE_TIMEOUT
    argv = gateway_launch(Settings(), Path("/config/litellm_config.yaml")).argv
    kept_by_clients = httpx.Limits().keepalive_expiry
    assert kept_by_clients is not None
    assert float(argv[argv.index("--keepalive_timeout") + 1]) > kept_by_clients
    assert kept_by_clients < KEEP_ALIVE


def test_a_gpu_gets_its_devices_and_no_cpu_settings(model: Path) -> None:
    settings = Settings(base_model=str(model), vllm=VllmSettings(devices="0,1", tensor_parallel=2, cpu_cores="0"))
    launch = vllm_command(settings, port=9000, cpu=False)
    assert "--enforce-eager" not in launch.argv
    assert launch.argv[launch.argv.index("--tensor-parallel-size") + 1] == "2"
    assert launch.argv[launch.argv.index("--port") + 1] == "9000"
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not any(name.startswith("VLLM_CPU") for name in launch.env)


def test_a_model_of_the_hub_is_not_looked_for_offline() -> None:
    launch = vllm_command(Settings(base_model="some/model"), cpu=True)
    assert "HF_HUB_OFFLINE" not in launch.env
    assert launch.argv[launch.argv.index("--model") + 1] == "some/model"


def test_every_flag_and_variable_is_known_to_the_installed_vllm(model: Path) -> None:
    settings = Settings(
        base_model=str(model),
        vllm=VllmSettings(max_model_len=512, tensor_parallel=2, tool_call_parser="hermes", cpu_cores="0"),
    )
    launch = vllm_command(settings, cpu=True)
    parser = vllm_source("engine", "arg_utils.py") + vllm_source("entrypoints", "launchers", "cli_args.py")
    fields = set(re.findall(r'"(--[a-z-]+)"', parser))
    fields |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+):", parser, re.MULTILINE)}
    assert [flag for flag in launch.argv if flag.startswith("--") and flag not in fields] == []
    envs = vllm_source("envs.py")
    names = [name for name in launch.env if name not in ("HF_HUB_OFFLINE",)]
    assert [name for name in names if f'"{name}"' not in envs] == []


def test_the_served_rank_is_one_that_vllm_knows() -> None:
    ranks = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", vllm_source("config", "lora.py"))
    assert ranks is not None
    known = {int(rank) for rank in ranks[1].split(",")}
    annotation = VllmSettings.model_fields["max_lora_rank"].annotation
    assert set(getattr(annotation, "__args__", ())) <= known


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", r"holds no \*.safetensors weights"),
        ("tokenizer.json", "holds no tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(model: Path, spoil: str, reason: str) -> None:
    (model / spoil).unlink()
    with pytest.raises(ConfigError, match=reason):
        check_model(str(model))


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "~/nowhere-at-all", "model", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no folder here, and no hub name"):
        check_model(name)


def test_a_file_is_no_model(model: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        check_model(str(model / "config.json"))


def test_no_model_at_all_is_said() -> None:
    with pytest.raises(ConfigError, match=r"no model is set: give metaclaw\.base_model"):
        check_model(None)


def test_a_key_travels_in_the_environment_and_not_on_the_command_line(model: Path) -> None:
    launch = vllm_command(Settings(base_model=str(model), vllm=VllmSettings(api_key="s3cret")), cpu=True)
    assert launch.env["VLLM_API_KEY"] == "s3cret"
    assert "s3cret" not in " ".join(launch.argv)
    assert "VLLM_API_KEY" in vllm_source("entrypoints", "serve", "middleware", "register.py")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-box"])
def test_vllm_is_not_opened_to_the_network_without_a_key(model: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"set metaclaw\.vllm\.api_key"):
        vllm_command(Settings(base_model=str(model), vllm=VllmSettings(host=host)), cpu=True)
    open_with_key = Settings(base_model=str(model), vllm=VllmSettings(host=host, api_key="s3cret"))
    assert f"--host {host}" in " ".join(vllm_command(open_with_key, cpu=True).argv)


def test_a_vllm_without_the_trainers_disk_is_told_where_to_fetch_adapters(model: Path, tmp_path: Path) -> None:
    shared = vllm_command(Settings(base_model=str(model)), cpu=True)
    assert "--middleware" not in shared.argv
    rl = RlSettings(remote_url="http://gpu:4010", remote_api_key="k3y")
    settings = Settings(base_model=str(model), home=tmp_path, vllm=VllmSettings(adapters="fetched"), rl=rl)
    launch = vllm_command(settings, port=8123, cpu=True)
    (at,) = (i for i, word in enumerate(launch.argv) if word == "--middleware")
    module, name = launch.argv[at + 1].rsplit(".", 1)
    assert callable(getattr(import_module(module), name))
    assert (launch.env[URL_ENV], launch.env[KEY_ENV]) == ("http://gpu:4010", "k3y")
    assert launch.env[FOLDER_ENV] == str(tmp_path / "vllm" / "8123"), "two servers of one home keep apart"
