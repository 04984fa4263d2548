"""Faults of each wire: refused, slow, silent, cut in an answer or a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from tests.faults.excuses import UPSTREAM_AWAY
from tests.faults.fault_list import MEET, fault, until
from tests.faults.siege import Siege, Work


def _on_link(link: str, mode: str, seconds: float, allows: Mapping[str, str] | None = None, **values: float) -> Work:
    """``seconds``, or longer if nobody uses the wire meanwhile; ``allows``: how requests may fail by it."""

    async def work(siege: Siege) -> int:
        if mode == "refuse":
            await siege.stage.links[link].used(MEET)
        began = time.monotonic()
        async with siege.link(link, mode, **values) as wire:
            await asyncio.sleep(seconds)
            await until(lambda: wire.touched)
            touched = wire.touched
        if allows is not None:
            siege.excuse(f"{link}: {mode}", began, allows)
        return touched

    return work


# wire -> bytes after which a request is cut, and an answer
WIRES = {"worker-trainer": (700, 150), "trainer-vllm": (100, 150), "worker-vllm": (300, 150)}
for _wire, (_up, _down) in WIRES.items():
    fault(f"{_wire}: refused")(_on_link(_wire, "refuse", 4.0))
    fault(f"{_wire}: slow")(_on_link(_wire, "slow", 5.0, delay=0.4))
    fault(f"{_wire}: cut in the answer")(_on_link(_wire, "cut", 5.0, after=_down))
    fault(f"{_wire}: cut in the request")(_on_link(_wire, "cut-up", 5.0, after=_up))
    fault(f"{_wire}: silent")(_on_link(_wire, "silent", 5.0))
fault("gateway-vllm: refused", "requests")(_on_link("gateway-vllm", "refuse", 3.0, UPSTREAM_AWAY))
fault("gateway-vllm: slow")(_on_link("gateway-vllm", "slow", 5.0, delay=0.2))
fault("gateway-vllm: cut in the answer", "requests")(_on_link("gateway-vllm", "cut", 4.0, UPSTREAM_AWAY, after=900))
fault("gateway-vllm: cut in the request", "requests")(_on_link("gateway-vllm", "cut-up", 3.0, UPSTREAM_AWAY, after=200))
fault("gateway-vllm: silent")(_on_link("gateway-vllm", "silent", 4.0))
