"""Publishing under load: real gateway, worker, trainer and vLLM, and adapters that betray which version spoke.

    python -m benchmarks.publish [--publishes 200] [--agents 8] [--streams 16] [--json FILE]

Versions are committed to the trainer's list as its training loop commits them, each with a text that the trainer's side
has scored under its weights; everything after that is the product. Streams ask without a pause, at temperature 0, and
every reply is held against the version that its header names. The phases:

    without      every agent has an adapter, nothing is published: what gaps between chunks are normal here
    bare_loads   adapters that nobody asks for are loaded into vLLM directly: what loading alone costs the streams
    publishing   agents get new versions, several at once, each as soon as the one before has answered
    bad_adapter  noise is held back by the gate, forced in with ``promote``, taken back with ``rollback``
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.publish_bad import show_bad_adapter
from benchmarks.publish_report import print_table, report
from benchmarks.publish_stage import Stage, memory, running, set_stage
from benchmarks.publish_streams import Streams, talking
from benchmarks.publish_versions import Publishing
from benchmarks.telltale import Telltale, TelltaleMaker
from demo.models import model_path

QUIET_SECONDS = 30.0
BARE_LOADS = 20


async def load_directly(stage: Stage, model: Path) -> list[float]:
    """Load spare adapters into vLLM one by one; the seconds that each took, and nothing is left of them."""
    seconds: list[float] = []
    maker = TelltaleMaker(model, stage.home / "spare", whole=True)  # not the trainer's folder: it leaves them alone
    async with httpx.AsyncClient(base_url=stage.vllm, timeout=60, trust_env=False) as http:
        for number in range(BARE_LOADS):
            name = f"spare-{number}"
            body = {"lora_name": name, "lora_path": str(maker.make(name).path)}
            started = time.perf_counter()
            (await http.post("/v1/load_lora_adapter", json=body)).raise_for_status()
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.5)
            (await http.post("/v1/unload_lora_adapter", json={"lora_name": name})).raise_for_status()
    return seconds


async def publish_all(
    stage: Stage, publishing: Publishing, streams: Streams, count: int, at_once: int
) -> tuple[list[float], list[dict[str, float]]]:
    """All publishes, those of several agents at once; seconds of each, and memory along the way."""
    seconds: list[float] = []
    sizes = [memory(stage)]
    shares = [[agent for place, agent in enumerate(stage.keys) if place % at_once == share] for share in range(at_once)]
    left = iter(range(count))

    async def publish(agents: list[str]) -> None:
        for agent in itertools.cycle(agents):
            if next(left, None) is None:
                return
            seconds.append(await publishing.publish(agent, streams))
            if len(seconds) % max(1, count // 20) == 0:
                sizes.append(memory(stage))
                print(
                    f"{len(seconds)} published, {streams.tally.replies} replies, {len(streams.tally.failed)} failed, "
                    f"{len(streams.tally.wrong)} wrong, last in {seconds[-1]:.2f} s",
                    flush=True,
                )

    async with asyncio.TaskGroup() as group:
        for share in shares:
            group.create_task(publish(share))
    return seconds, sizes


async def measure(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """All phases; the report."""
    maker = TelltaleMaker(options.model, stage.trainer_home / "telltale", whole=True)
    spoken: dict[str, Telltale] = {}
    publishing = Publishing(stage, maker, spoken)
    async with talking(stage, spoken, 0) as nobody:
        alone = [await publishing.publish(agent, nobody) for _ in range(options.alone) for agent in stage.keys]
    async with talking(stage, spoken, options.streams) as quiet:
        await asyncio.sleep(options.quiet)
    print(f"without publishing: {quiet.tally.replies} replies, {len(quiet.tally.failed)} failed", flush=True)
    async with talking(stage, spoken, options.streams) as loading:
        loads = await load_directly(stage, options.model)
    started = time.perf_counter()
    async with talking(stage, spoken, options.streams) as busy:
        seconds, sizes = await publish_all(stage, publishing, busy, options.publishes, options.at_once)
    wall = time.perf_counter() - started
    tallies = {"without": quiet.tally, "bare_loads": loading.tally, "publishing": busy.tally}
    extra: dict[str, Any] = {"seconds": round(wall, 1)}
    if not options.skip_bad:
        async with talking(stage, spoken, options.streams) as bad:
            extra["bad_adapter"] = await show_bad_adapter(stage, publishing, bad)
        tallies["bad_adapter"] = bad.tally
    async with httpx.AsyncClient(trust_env=False) as http:
        loaded = len((await http.get(f"{stage.vllm}/v1/models")).json()["data"]) - 1
    waits = {"publish_alone": alone, "publish": seconds, "vllm_load": loads}
    extra["loaded_at_the_end"] = loaded
    return report(tallies, waits, sizes) | extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=200)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=4, help="agents that publish at the same time")
    parser.add_argument("--alone", type=int, default=1, help="versions of each agent published before anybody asks")
    parser.add_argument("--quiet", type=float, default=QUIET_SECONDS, help="seconds of the phase without publishing")
    parser.add_argument("--model", default="tiny", help="tiny or smollm2-135m")
    parser.add_argument("--kv-blocks", type=int, help="blocks of vLLM's cache; unset: vLLM decides")
    parser.add_argument("--skip-bad", action="store_true", help="leave out the last phase")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--logs", type=Path, help="keep the logs of all processes there")
    options = parser.parse_args()
    options.model = model_path(options.model)
    with tempfile.TemporaryDirectory(prefix="metaclaw-publish-") as folder:
        stage = set_stage(Path(folder), options.model, options.agents, options.kv_blocks)
        with running(stage, options.logs):
            found = asyncio.run(measure(stage, options))
            if options.json:
                options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
            print_table(found)
    if found["failed_count"] or found["wrong_count"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
