"""How fast the worker scores and forwards, how much memory it takes, and whether judge calls overlap.

    python -m benchmarks.worker [--traces 10000] [--runs 3] [--json FILE]

Throughput: traces of a store on disk, waiting; the built-in rewards without a model and one plain file; scored, merged
and forwarded over HTTP to a receiver in another process. The worker has one core to itself (its threads share it), the
receiver another; so this says what one core does. A third of the sessions have three turns that merge.
Judge: calls to a model that takes a fixed time, at several concurrencies, against the time that perfect overlap takes.
Writes runs/benchmarks/worker.json unless --json names another file.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from metaclaw_hooks.types import Message, Trace

from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook

REPORT = Path(__file__).resolve().parents[1] / "runs" / "benchmarks" / "worker.json"
PROMPT, RESPONSE = 400, 80  # tokens of a first turn
JUDGE_SECONDS = 0.2
ROUNDS = 12  # of judge calls, one after the other at perfect overlap
OWN_REWARD = "def score_trace(trace): return 1.0 if len(trace.response_text) < 400 else -1.0\n"
WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=REPORT)
    given = parser.parse_args()
    found = {
        "machine": f"{os.cpu_count()}-core {os.uname().machine}, no GPU",
        "throughput": [_child(throughput, given.traces) for _ in range(given.runs)],
        "judge": [_child(judged, concurrency) for concurrency in (1, 4, 8, 16)],
    }
    _print(found)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _child(work: Any, argument: int) -> dict[str, Any]:
    """Each measurement in a process of its own, so that memory and threads of one are not the next one's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, argument, theirs))
    process.start()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def _report(work: Any, argument: int, pipe: Any) -> None:
    pipe.send(work(argument))


def throughput(count: int) -> dict[str, Any]:
    """Seconds, traces a second and memory of scoring and forwarding ``count`` waiting traces."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    receiver = context.Process(target=_receive, args=(port, cores[-1]), daemon=True)
    receiver.start()
    with tempfile.TemporaryDirectory() as folder:
        write_hook(Path(folder), "brief", OWN_REWARD)
        settings = worker_settings(
            Path(folder),
            rl={"remote_url": f"http://127.0.0.1:{port.get()}"},
            rewards={"weights": {"next_turn": 1, "tool_outcome": 1}, "length": {"max_tokens": 100}},
        )
        with worker_context(settings) as ctx:
            _fill(ctx.engine, count)
            os.sched_setaffinity(0, {cores[0]})
            memory = _Memory()
            before = time.process_time()
            started = time.perf_counter()
            asyncio.run(_score_and_forward(ctx))
            seconds = time.perf_counter() - started
            cpu_seconds = time.process_time() - before
            tenths = memory.stop()
            states = rows(ctx.engine, "score", "forward")
    receiver.terminate()
    done = sum(state == ("scored", "forwarded") for state in states)
    return {
        "traces": count,
        "done": done,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "traces_per_second": count / seconds,
        "rss_start_mib": memory.start,
        "rss_tenths_mib": tenths,
    }


async def _score_and_forward(ctx: Any) -> None:
    scored = asyncio.create_task(Scorer(ctx).round())
    forwarder = Forwarder(ctx)
    while not scored.done():
        await forwarder.round()
        await asyncio.sleep(0.05)
    await scored
    await forwarder.round()


def _fill(engine: Any, count: int) -> None:
    chance = random.Random(5)
    batch: list[Trace] = []
    made = 0
    while made < count:
        turns = min(3 if chance.random() < 1 / 3 else 1, count - made)
        batch += _conversation(f"s{made}", turns, chance)
        made += turns
        if len(batch) >= 500 or made >= count:
            fill(engine, *batch, closed=True)
            batch = []


def _conversation(session: str, turns: int, chance: random.Random) -> list[Trace]:
    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(chance.choices(range(49_152), k=number))

    messages: tuple[Message, ...] = (
        {"role": "system", "content": text(200)},
        {"role": "user", "content": text(60)},
    )
    prompt = tokens(PROMPT)
    made = []
    for turn in range(turns):
        response: Message = {"role": "assistant", "content": text(60)}
        ids = tokens(RESPONSE)
        made.append(
            make_trace(
                id=f"{session}-{turn}",
                session=session,
                turn=turn,
                exchange=turn,
                messages=messages,
                response=response,
                prompt_token_ids=prompt,
                response_token_ids=ids,
                response_logprobs=tuple(-chance.random() for _ in ids),
            )
        )
        messages = (*messages, response, {"role": "user", "content": text(20)})
        prompt = (*prompt, *ids, *tokens(30))
    return made


class _Memory:
    """Resident memory, looked at ten times a second, in MiB."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.start = self._now()
        self._seen = [self.start]
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> float:
        return float(self._process.memory_info().rss) / 2**20

    def _watch(self) -> None:
        while self._running:
            self._seen.append(self._now())
            time.sleep(0.1)

    def stop(self) -> list[float]:
        """The peak of each tenth of the time: if the last are no higher than those before, memory is flat."""
        self._running = False
        self._thread.join()
        seen = self._seen
        edges = [len(seen) * tenth // 10 for tenth in range(11)]
        return [max(seen[first : max(last, first + 1)]) for first, last in itertools.pairwise(edges)]


def judged(concurrency: int) -> dict[str, Any]:
    """Seconds that judge calls take at this concurrency, and that perfect overlap would take."""
    calls = ROUNDS * concurrency
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {"model": "m", "url": f"http://127.0.0.1:{server.server_port}/v1", "votes": 1, "concurrency": concurrency}
    with tempfile.TemporaryDirectory() as folder:
        weights = {"next_turn": 0, "tool_outcome": 0}
        settings = worker_settings(Path(folder), rewards={"weights": weights, "judge": judge})
        with worker_context(settings) as ctx:
            scorer = Scorer(ctx)
            fill(ctx.engine, make_trace(id="warm", session="warm"))
            asyncio.run(scorer.round())
            fill(ctx.engine, *(make_trace(id=f"t{n}", session=f"s{n}", text=f"reply {n}") for n in range(calls)))
            started = time.perf_counter()
            scored = asyncio.run(scorer.round())
            seconds = time.perf_counter() - started
    server.shutdown()
    ideal = calls * JUDGE_SECONDS / concurrency
    return {"concurrency": concurrency, "calls": scored, "seconds": seconds, "ideal": ideal, "ratio": seconds / ideal}


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # head and body in one packet: else Nagle's algorithm adds 40 ms to each answer

    def log_message(self, *_: object) -> None:
        return

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def _answer(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


class _Judge(_Quiet):
    def do_POST(self) -> None:
        self._body()
        time.sleep(JUDGE_SECONDS)
        verdict = json.dumps({"rationale": "good", "score": 1, "hint": ""})
        self._answer({"choices": [{"message": {"role": "assistant", "content": verdict}}], "usage": {}})


class _Receiver(_Quiet):
    def do_POST(self) -> None:
        ids = [sample["id"] for sample in self._body()["samples"]]
        self._answer({"accepted": ids, "duplicate": [], "refused": []})


def _receive(port: Any, core: int) -> None:
    os.sched_setaffinity(0, {core})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    port.put(server.server_port)
    server.serve_forever()


def _print(found: dict[str, Any]) -> None:
    runs = found["throughput"]

    def middle(name: str) -> float:
        return statistics.median(run[name] for run in runs)

    print(f"{runs[0]['traces']} waiting traces, {len(runs)} runs, medians")
    print(f"  scored and forwarded  {min(run['done'] for run in runs)}")
    print(f"  seconds               {middle('seconds'):.1f} (CPU {middle('cpu_seconds'):.1f})")
    print(f"  traces a second       {middle('traces_per_second'):.0f}")
    tenths = [statistics.median(run["rss_tenths_mib"][tenth] for run in runs) for tenth in range(10)]
    print(
        f"  memory, MiB           {middle('rss_start_mib'):.0f}; peak of each tenth: "
        + " ".join(f"{m:.0f}" for m in tenths)
    )
    print("judge calls of 0.2 s   concurrency  seconds  perfect overlap  ratio")
    for row in found["judge"]:
        print(f"{row['concurrency']:>35}  {row['seconds']:>7.2f}  {row['ideal']:>15.2f}  {row['ratio']:>5.2f}")


if __name__ == "__main__":
    main()
