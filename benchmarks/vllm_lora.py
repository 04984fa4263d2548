"""What an adapter costs in vLLM on a CPU: with vLLM's own LoRA operations, and with those that this package brings.

    python -m benchmarks.vllm_lora [--model smollm2-135m] [--rounds 3] [--json FILE]

Two vLLMs run side by side and are asked in turn; medians of the rounds. ``first token`` is the time to answer a prompt
of 128 tokens with one, ``tokens/s`` the pace of 16 tokens for one stream or sixteen, after prompts of 16.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.telltale import TelltaleMaker
from demo.models import model_path
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.vllm_command import BASE_NAME, vllm_command
from tests.vllm_server import pick_free_port, stop_group, wait_until_ready

SIDES = {"vLLM's own": {"VLLM_PLUGINS": ""}, "ours": {}}
ADAPTERS = 4
PROMPT, SHORT, SAID, STREAMS = 128, 16, 16, 16  # tokens, tokens, tokens, requests at once
CASES = {
    "base model": [BASE_NAME],
    "one adapter": ["telltale-0"],
    "four adapters": [f"telltale-{n}" for n in range(ADAPTERS)],
}


@contextmanager
def serving(model: Path, folder: Path, env: dict[str, str]) -> Iterator[str]:
    """The product's vLLM, with the adapters in ``folder`` loaded; yields its URL."""
    port = pick_free_port()
    settings = Settings.model_validate(
        {"base_model": str(model), "home": str(folder), "vllm": {"max_loras": ADAPTERS, "dtype": "float32"}}
    )
    launch = vllm_command(settings, port, cpu=True)
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv,
            env=launch.environment() | env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(f"{url}/health", process, log)
        for number in range(ADAPTERS):
            name = f"telltale-{number}"
            body = {"lora_name": name, "lora_path": str(folder / name)}
            httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
        yield url
    finally:
        stop_group(process)


async def seconds(url: str, models: list[str], streams: int, tokens: int, prompt: int = SHORT) -> float:
    """Until ``streams`` requests, spread over ``models``, have each been answered with ``tokens`` tokens."""

    async def ask(http: httpx.AsyncClient, model: str) -> None:
        ids = [random.randrange(1000, 40000) for _ in range(prompt)]  # none that vLLM has cached
        body = {"model": model, "prompt": ids, "max_tokens": tokens, "ignore_eos": True}
        (await http.post("/v1/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        began = time.perf_counter()
        await asyncio.gather(*(ask(http, models[n % len(models)]) for n in range(streams)))
        return time.perf_counter() - began


def measure(url: str, models: list[str]) -> dict[str, float]:
    """One round on one side."""
    first = asyncio.run(seconds(url, models, 1, 1, PROMPT))
    one_first = asyncio.run(seconds(url, models, 1, 1))
    one = asyncio.run(seconds(url, models, 1, 1 + SAID))
    many_first = asyncio.run(seconds(url, models, STREAMS, 1))
    many = asyncio.run(seconds(url, models, STREAMS, 1 + SAID))
    return {
        "first token, s": first,
        "tokens/s, 1 stream": SAID / max(one - one_first, 1e-6),
        f"tokens/s, {STREAMS} streams": STREAMS * SAID / max(many - many_first, 1e-6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="tiny or smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = model_path(options.model)
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {case: {side: [] for side in SIDES} for case in CASES}
    with tempfile.TemporaryDirectory(prefix="metaclaw-lora-") as folder, ExitStack() as stack:
        maker = TelltaleMaker(model, Path(folder), whole=True)
        for number in range(ADAPTERS):
            maker.make(f"telltale-{number}")
        urls = {side: stack.enter_context(serving(model, Path(folder), env)) for side, env in SIDES.items()}
        for url in urls.values():
            asyncio.run(seconds(url, [BASE_NAME, *CASES["four adapters"]], STREAMS, 4))  # warm
        for number in range(options.rounds):
            for case, models in CASES.items():
                for side, url in urls.items():
                    rounds[case][side].append(measure(url, models))
                    print(f"round {number + 1}, {case}, {side}: {rounds[case][side][-1]}", flush=True)
    found: dict[str, Any] = {
        case: {
            side: {key: round(statistics.median(r[key] for r in several), 3) for key in several[0]}
            for side, several in sides.items()
        }
        for case, sides in rounds.items()
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print_table(found)


def print_table(found: dict[str, Any]) -> None:
    keys = list(found["base model"]["ours"])
    print(f"| model | operations | {' | '.join(keys)} |")
    print("|---|---|" + "---|" * len(keys))
    for case, sides in found.items():
        for side, figures in sides.items():
            print(f"| {case} | {side} | {' | '.join(f'{figures[key]:.3g}' for key in keys)} |")


if __name__ == "__main__":
    main()
