"""Compares what clients received with what store, queue, checkpoints and vLLM hold."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from metaclaw_hooks.types import Trace

from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import iter_traces
from tests.faults.audit_training import Version, check_leases, check_training, check_versions, listed_versions
from tests.faults.clients import Asked
from tests.faults.findings import Findings
from tests.faults.stage import AGENTS, Stage
from tests.faults.upstream import BASE, EOS, NONCE, ids_of, prompt_ids

REFUSED = ", nobody listened"  # after the name of a fault: requests that were asked while what answers was starting


def stored_ids(stage: Stage) -> Counter[str]:
    """Trace id -> how often it is in the store."""
    with sqlite3.connect(f"file:{stage.store_file}?mode=ro", uri=True, timeout=20) as c:
        return Counter(row[0] for row in c.execute("SELECT id FROM traces"))


def audit_all(stage: Stage, asked: list[Asked], missing_allowed: set[str], findings: Findings) -> None:
    """Everything, on a system at rest. ``missing_allowed``: traces that were counted as lost or late."""
    versions = listed_versions(stage)
    traces = _traces(stage)
    for file in (stage.store_file, stage.trainer_home / "queue.db"):
        _check_file(file, findings)
    _check_answers(asked, traces, versions, missing_allowed, stage.real_vllm, findings)
    _check_origin(asked, traces, findings)
    check_training(stage, traces, versions, findings)
    check_versions(versions, traces, findings)
    check_leases(stage, findings)


def _traces(stage: Stage) -> dict[str, Trace]:
    engine = open_store(stage.settings.store_url)
    try:
        with engine.connect() as c:
            return {trace.id: trace for trace in iter_traces(c)}
    finally:
        engine.dispose()


def _check_file(file: Path, findings: Findings) -> None:
    with sqlite3.connect(file, timeout=20) as c:
        said = c.execute("PRAGMA integrity_check").fetchone()[0]
    if said != "ok":
        findings.blame("damaged", f"{file.name}: {said}")


def _check_answers(
    asked: Iterable[Asked],
    traces: Mapping[str, Trace],
    versions: Mapping[tuple[str, int], Version],
    missing_allowed: set[str],
    real_vllm: bool,
    findings: Findings,
) -> None:
    """Every answer that a client received whole is in the store, as it was received, and of whom its header says."""
    for one in asked:
        if not one.whole or not one.trace:
            continue
        findings.seen["answers compared"] += 1
        trace = traces.get(one.trace)
        number = int(one.version.rpartition("@v")[2])
        if one.version != f"{one.agent}@v{number}":
            findings.blame("leaked", f"{one.nonce}: {one.agent} was answered by {one.version}")
        if not real_vllm:
            _check_words(one, number, versions, findings)
        if trace is not None:
            _check_trace(one, number, trace, real_vllm, findings)
        elif one.trace not in missing_allowed:
            findings.blame("lost", f"{one.nonce}: {one.trace} was received and is not in the store")


def _check_trace(one: Asked, number: int, trace: Trace, real_vllm: bool, findings: Findings) -> None:
    """The trace is of this agent, version and text, and has the tokens that were sampled."""
    if trace.agent != one.agent:
        findings.blame("leaked", f"{one.nonce}: {one.trace} of {one.agent} is stored for {trace.agent}")
    if trace.adapter_version != number:
        findings.blame("mixed", f"{one.trace}: stored as v{trace.adapter_version}, answered by {one.version}")
    if trace.response.get("content") != one.text:
        findings.blame("mixed", f"{one.trace}: stored {trace.response.get('content')!r}, received {one.text!r}")
    if not trace.trainable or trace.response_token_ids is None:
        findings.blame("damaged", f"{one.trace}: not trainable: {trace.reason}")
    elif len(trace.response_logprobs or ()) != len(trace.response_token_ids):
        findings.blame("damaged", f"{one.trace}: as many log-probabilities as tokens are missing")
    elif not real_vllm and list(trace.response_token_ids) != [*ids_of(one.text), EOS]:
        findings.blame("damaged", f"{one.trace}: other tokens than were sampled")
    elif not real_vllm and list(trace.prompt_token_ids or ()) != prompt_ids(one.messages):
        findings.blame("damaged", f"{one.trace}: other prompt tokens than were read")


def _check_words(one: Asked, number: int, versions: Mapping[tuple[str, int], Version], findings: Findings) -> None:
    """The answer itself says whose question it answers and which weights spoke."""
    nonce, model, digest, *_ = [*one.text.split(), "", "", ""]
    if nonce != one.nonce:
        findings.blame("leaked", f"{one.nonce}: received the answer to {nonce}")
        return
    expected = BASE if number == 0 else f"{one.agent}@v{number}"
    if model != expected:
        findings.blame("leaked" if not model.startswith((one.agent, BASE)) else "mixed",
                       f"{one.nonce}: the header says {one.version}, {model} spoke")  # fmt: skip
    version = versions.get((one.agent, number))
    weights = "0" * 12 if number == 0 else version.sha256[:12] if version else "unlisted"
    if digest != weights:
        findings.blame("mixed", f"{one.nonce}: {one.version} is {weights}, and spoke with {digest}")


def _check_origin(asked: Iterable[Asked], traces: Mapping[str, Trace], findings: Findings) -> None:
    """Every trace is of one request that was made, by its agent; no request has two; sessions are not mixed."""
    of_nonce = {one.nonce: one for one in asked}
    stored: Counter[str] = Counter()
    sessions: dict[str, set[tuple[str, str]]] = {}
    for trace in traces.values():
        nonces = NONCE.findall(str(trace.messages[-1].get("content")))
        one = of_nonce.get(nonces[-1]) if nonces else None
        if one is None:
            findings.blame("mixed", f"{trace.id}: nobody asked this")
            continue
        stored[one.nonce] += 1
        if one.agent != trace.agent:
            findings.blame("leaked", f"{trace.id}: {one.agent} asked, and {trace.agent} has the trace")
        sessions.setdefault(trace.session, set()).add((one.agent, one.session))
    for nonce, times in stored.items():
        if times > 1:
            findings.blame("doubled", f"{nonce}: {times} traces of one request")
    for session, members in sessions.items():
        if len(members) > 1:
            findings.blame("leaked", f"session {session} holds the conversations {sorted(members)}")
    findings.seen["traces"] = len(traces)


def check_failures(
    asked: Iterable[Asked], excuses: Iterable[tuple[float, float, str]], findings: Findings
) -> Counter[str]:
    """Requests that failed without a fault that fails requests; how many each such fault has failed."""
    windows = list(excuses)
    excused: Counter[str] = Counter()
    for one in asked:
        findings.seen["requests"] += 1
        if one.whole:
            continue
        reasons = [why for begin, end, why in windows if one.began <= end and one.ended >= begin]
        if reasons:
            refused = one.error.startswith("ClientConnectorError")
            excused[reasons[-1] + (REFUSED if refused else "")] += 1
        else:
            findings.blame("failed", f"{one.nonce} after {one.ended - one.began:.2f} s: {one.status} {one.error}")
    return excused


def at_rest(stage: Stage) -> str:
    """What still goes on; empty when nothing does."""
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        unscored = c.execute("SELECT COUNT(*) FROM traces WHERE score = 'waiting'").fetchone()[0]
        waiting = c.execute(
            "SELECT COUNT(*) FROM traces WHERE score = 'scored' AND trainable AND forward IN ('waiting', 'merged')"
        ).fetchone()[0]
        routes = dict(c.execute("SELECT agent, version FROM routes").fetchall())
        forwarded = {row[0] for row in c.execute("SELECT id FROM traces WHERE forward = 'forwarded'")}
    with sqlite3.connect(stage.trainer_home / "queue.db", timeout=20) as c:
        queued = c.execute("SELECT COUNT(*) FROM samples WHERE state IN ('waiting', 'claimed')").fetchone()[0]
        newest = dict(c.execute("SELECT agent, MAX(number) FROM versions GROUP BY agent").fetchall())
        aside = "SELECT trace_id FROM sample_traces JOIN samples ON samples.id = sample_id WHERE state = 'set_aside'"
        forwarded -= {row[0] for row in c.execute(aside)}
    left = {"unscored": unscored, "to be forwarded": waiting, "in the queue": queued, "untracked": len(forwarded)}
    goes_on = [f"{n} {what}" for what, n in left.items() if n]
    goes_on += [f"{a} serves v{routes.get(a, 0)} of v{newest[a]}" for a in AGENTS
                if newest.get(a, 0) != routes.get(a, 0)]  # fmt: skip
    return ", ".join(goes_on)
