"""The collector of the gateway: it runs when it is told to, and nothing is left lying."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest

from metaclaw_plugin.gateway.collecting import Collector


@pytest.fixture(autouse=True)
def collected_as_before() -> Iterator[None]:
    yield
    gc.enable()


class Knot:
    """Refers to itself, so that only a collector frees it."""

    def __init__(self) -> None:
        self.itself = self


async def test_garbage_goes_though_the_interpreter_collects_none() -> None:
    task = asyncio.get_running_loop().create_task(Collector().run(every=0.005))
    await asyncio.sleep(0.02)
    assert not gc.isenabled()
    knot = weakref.ref(Knot())
    many = [[] for _ in range(2000)]  # past the threshold of the youngest generation
    assert knot() is not None
    while knot() is not None:
        await asyncio.sleep(0.005)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert gc.isenabled()
    assert len(many) == 2000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    held = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: held[0])
    return held


@pytest.mark.parametrize(
    ("counts", "since_full", "generation"),
    [
        ((700, 50, 50), 100.0, None),  # nothing young to speak of
        ((701, 10, 50), 0.9, 0),
        ((701, 11, 0), 0.9, 1),
        ((701, 0, 0), 1.1, 2),
    ],
)
def test_the_oldest_generation_that_is_due_is_collected(
    monkeypatch: pytest.MonkeyPatch,
    clock: list[float],
    counts: tuple[int, int, int],
    since_full: float,
    generation: int | None,
) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "get_count", lambda: (701, 0, 0))
    monkeypatch.setattr(gc, "get_threshold", lambda: (700, 10, 10))
    monkeypatch.setattr(gc, "collect", collected.append)
    collector = Collector()
    assert collector.collect_if_due() == 2
    monkeypatch.setattr(gc, "get_count", lambda: counts)
    clock[0] += since_full
    assert collector.collect_if_due() == generation
    assert collected == ([2] if generation is None else [2, generation])


@pytest.mark.parametrize(("took", "pause"), [(0.01, 1.0), (0.1, 2.0), (0.3, 6.0), (3.0, 10.0)])
def test_rounds_through_everything_take_a_twentieth_of_the_time_unless_garbage_would_heap_up(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], took: float, pause: float
) -> None:
    def collect(generation: int) -> None:
        clock[0] += took if generation == 2 else 0.0

    monkeypatch.setattr(gc, "get_count", lambda: (701, 0, 0))
    monkeypatch.setattr(gc, "collect", collect)
    collector = Collector()
    assert collector.collect_if_due() == 2
    clock[0] += pause - 0.01
    assert collector.collect_if_due() == 0
    clock[0] += 0.02
    assert collector.collect_if_due() == 2


LOST = """
import asyncio, contextvars, gc, sys
from metaclaw_plugin.gateway.collecting import Collector

theirs = contextvars.ContextVar("theirs", default=None)
ours = contextvars.ContextVar("ours", default=None)
more = [contextvars.ContextVar(f"more {n}") for n in range(40)]

class Stream:  # as LiteLLM's: set free, it sets a variable
    def __init__(self):
        self.itself = self
    def __del__(self):
        theirs.set(object())

async def request():
    for variable in more:
        variable.set(object())
    for _ in range(300):
        mark = object()
        Stream()
        ours.set(mark)
        assert ours.get() is mark

async def main():
    taken_over = asyncio.get_running_loop().create_task(Collector().run(every=0.001))
    await asyncio.sleep(0.01)
    for _ in range(200):
        await asyncio.gather(*(request() for _ in range(4)))
        await asyncio.sleep(0.001)
    print("whole")

gc.set_threshold(int(sys.argv[1]), 10, 10)
asyncio.run(main())
"""


@pytest.mark.law(4)
@pytest.mark.parametrize("threshold", ["71", "97"])  # by the interpreter's own collector, two in five die
def test_what_finalisers_set_takes_nothing_from_a_request(threshold: str) -> None:
    ended = subprocess.run([sys.executable, "-c", LOST, threshold], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "whole\n"), ended.stderr[-2000:]
