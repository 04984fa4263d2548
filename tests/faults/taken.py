"""What the trainer took to train on: noted by the trainer under test as it takes it, and read by the auditor.

The queue forgets the tokens of a sample when it is trained, so they are written down when they are claimed. A trainer
that dies between claiming and noting has trained nothing of it, and claims it again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from metaclaw_hooks.types import Sample, SampleTurn, Trace
from metaclaw_trainer.sample_queue import StoredQueue

from tests.faults.findings import Findings
from tests.faults.stage import reward_of

FILE = "taken.jsonl"


def install(folder: Path) -> None:
    """Let the trainer in this process note every sample that it claims."""
    real: Callable[[StoredQueue, str, int], list[Sample]] = StoredQueue.claim

    @functools.wraps(real)
    def claim(queue: StoredQueue, agent: str, n: int) -> list[Sample]:
        taken = real(queue, agent, n)
        note(folder, taken)
        return taken

    StoredQueue.claim = claim  # type: ignore[method-assign]


def note(folder: Path, taken: list[Sample]) -> None:
    """Add ``taken`` to the file; each begins a line, so that one left unfinished by a kill spoils no other."""
    lines = "".join("\n" + json.dumps(_as_json(sample), separators=(",", ":")) for sample in taken)
    out = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(out, lines.encode("ascii"))
    finally:
        os.close(out)


def _as_json(sample: Sample) -> dict[str, object]:
    return {
        "id": sample.id,
        "agent": sample.agent,
        "session": sample.session,
        "version": sample.adapter_version,
        "tokens": sample.token_ids,
        "turns": [[turn.trace_id, turn.start, turn.logprobs, turn.reward] for turn in sample.turns],
    }


def read(folder: Path) -> Iterator[Sample]:
    """Every sample as often as it was claimed. A line that a killed trainer left unfinished was never trained on."""
    try:
        lines = (folder / FILE).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        turns = tuple(SampleTurn(name, start, tuple(values), reward) for name, start, values, reward in found["turns"])
        tokens = tuple(found["tokens"])
        yield Sample(found["id"], found["agent"], found["session"], tokens, turns, found["version"], 0)


def check_taken(folder: Path, traces: Mapping[str, Trace], trained: set[str], findings: Findings) -> None:
    """Each sample that was claimed is of the tokens, log-probabilities and rewards of its stored traces, and no others;
    ``trained``: ids of samples that a version learned from, each of which must have been noted."""
    seen: set[str] = set()
    for sample in read(folder):
        if sample.id not in seen:
            findings.seen["samples compared token by token"] += 1
        seen.add(sample.id)
        for place, turn in enumerate(sample.turns):
            if wrong := _wrong(sample, turn, traces.get(turn.trace_id), place == len(sample.turns) - 1):
                findings.blame("mixed", f"sample {sample.id}, {turn.trace_id}: {wrong}")
    for name in sorted(trained - seen):
        findings.blame("mixed", f"sample {name}: trained on, and nobody saw it taken")


def _wrong(sample: Sample, turn: SampleTurn, trace: Trace | None, last: bool) -> str:
    """What of a turn differs from its trace; empty: nothing."""
    if trace is None or trace.prompt_token_ids is None or trace.response_token_ids is None:
        return "there is no such trace with tokens"
    end = turn.start + len(turn.logprobs)
    differing = {
        "its agent": sample.agent == trace.agent,
        "its session": sample.session == trace.session,
        "the version that spoke": sample.adapter_version == trace.adapter_version,
        "the prompt": sample.token_ids[: turn.start] == trace.prompt_token_ids,
        "the sampled tokens": sample.token_ids[turn.start : end] == trace.response_token_ids,
        "the log-probabilities": turn.logprobs == trace.response_logprobs,
        "the end": not last or end == len(sample.token_ids),
        "the reward": turn.reward == reward_of(trace.response_token_ids),
    }
    return ", ".join(name for name, same in differing.items() if not same)
