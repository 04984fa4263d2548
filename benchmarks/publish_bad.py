"""The bad adapter of benchmarks.publish: noise that the gate holds back, and that its owner forces in and takes back.

The owner's part is done with the commands that a user has.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from benchmarks.publish_stage import Stage
from benchmarks.publish_streams import Streams
from benchmarks.publish_versions import Publishing

NOISE = 1.0  # standard deviation of what it adds to every layer, times that of its input
VERDICT_TIMEOUT = 600.0  # seconds; the gate comes after traffic


async def show_bad_adapter(stage: Stage, publishing: Publishing, streams: Streams) -> dict[str, Any]:
    """What happened, in sentences and seconds."""
    agent = next(iter(stage.keys))
    await command(stage, "agents", "set", agent, "publish.policy=not_worse")
    before = (await listed(stage, agent))[-1]["name"]
    name, committed = await publishing.commit(agent, noise=NOISE)
    version: dict[str, Any] = {}
    while version.get("decision") is None:
        if time.perf_counter() > committed + VERDICT_TIMEOUT:
            raise SystemExit(f"the gate gave no verdict on {name} within {VERDICT_TIMEOUT:.0f} s: {version}")
        await asyncio.sleep(2)
        version = next((one for one in await listed(stage, agent) if one["name"] == name), {})
    story: dict[str, Any] = {"before": before, "noise": name, "verdict": version["decision"]["sentence"]}
    story["heard_before_promote"] = name in streams.seen
    for word, about, expected in (("promote", name, name), ("rollback", agent, before)):
        started = time.perf_counter()
        story[word] = await command(stage, "adapters", word, about)
        said = time.perf_counter()
        heard = await publishing.first_word(agent, expected, streams)
        story[f"{word}_seconds"] = {"command": round(said - started, 2), "first_word": round(heard - said, 2)}
    print(json.dumps(story, indent=2), flush=True)
    return story


async def listed(stage: Stage, agent: str) -> list[dict[str, Any]]:
    """What `metaclaw adapters list` says."""
    found: list[dict[str, Any]] = json.loads(await command(stage, "adapters", "list", agent, "--json"))
    return found


async def command(stage: Stage, *words: str) -> str:
    """Run `metaclaw WORDS` on the stage; what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "metaclaw_plugin.cli.main", *words, "--config", str(stage.config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"metaclaw {' '.join(words)} ended with {process.returncode}: {said.decode()}")
    return said.decode().strip()
