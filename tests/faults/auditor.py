"""Compares what clients received with what store, queue, checkpoints and vLLM hold."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import httpx
from metaclaw_hooks.types import Trace

from metaclaw_plugin.skills.injection import render_block
from metaclaw_plugin.skills.skill_file import parse_skill
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import iter_traces
from tests.faults.audit_training import (
    Version,
    check_leases,
    check_loaded,
    check_training,
    check_versions,
    listed_versions,
)
from tests.faults.clients import Asked
from tests.faults.excuses import Failures
from tests.faults.findings import Findings
from tests.faults.stage import AGENTS, GATED, SKILL, SKILL_NAME, Stage
from tests.faults.upstream import BASE, EOS, NONCE, ids_of, logprob_of, prompt_ids

_SKILL = parse_skill(SKILL.encode(), SKILL_NAME, GATED)


def stored_ids(stage: Stage) -> Counter[str]:
    """Trace id -> how often it is in the store."""
    with sqlite3.connect(f"file:{stage.store_file}?mode=ro", uri=True, timeout=20) as c:
        return Counter(row[0] for row in c.execute("SELECT id FROM traces"))


def audit_all(stage: Stage, asked: list[Asked], missing_allowed: set[str], findings: Findings) -> Mapping[str, Trace]:
    """Everything, on a system at rest; the traces that are stored. ``missing_allowed``: those that were counted as lost
    or died with a process that was killed."""
    versions = listed_versions(stage)
    traces = _traces(stage)
    for file in (stage.store_file, stage.trainer_home / "queue.db"):
        _check_file(file, findings)
    _check_answers(asked, traces, versions, missing_allowed, stage.real_vllm, findings)
    _check_origin(asked, traces, findings)
    check_training(stage, traces, versions, findings)
    check_versions(versions, traces, findings)
    check_leases(stage, findings)
    return traces


def check_unread(failures: Failures, traces: Mapping[str, Trace], findings: Findings) -> None:
    """Who is told to stop closes no connection whose request it has begun: nothing of such a one can be stored."""
    begun = {nonce for trace in traces.values() for nonce in NONCE.findall(str(trace.messages[-1].get("content")))}
    for failure in failures.each:
        if "told to stop" in failure["why"] and failure["nonce"] in begun:
            findings.blame("failed", f"{failure['nonce']}: {failure['why']}, which closed what it had begun")


def audit_vllm(stage: Stage, findings: Findings) -> None:
    """What vLLM holds at rest, and what the gate asked it."""
    _check_gate(stage, findings)
    try:
        loaded = loaded_adapters(stage)
    except httpx.HTTPError as error:
        findings.blame("not back", f"vLLM at port {stage.vllm_port} does not say what it holds: {error!r}")
    else:
        check_loaded(loaded, served_set(stage), listed_versions(stage), findings)


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
    _check_prompt(one, trace, findings)
    if not trace.trainable or trace.response_token_ids is None:
        findings.blame("damaged", f"{one.trace}: not trainable: {trace.reason}")
    elif len(trace.response_logprobs or ()) != len(trace.response_token_ids):
        findings.blame("damaged", f"{one.trace}: as many log-probabilities as tokens are missing")
    elif not real_vllm and list(trace.response_token_ids) != [*ids_of(one.text), EOS]:
        findings.blame("damaged", f"{one.trace}: other tokens than were sampled")
    elif not real_vllm and list(trace.response_logprobs or ()) != [logprob_of(t) for t in trace.response_token_ids]:
        findings.blame("damaged", f"{one.trace}: other log-probabilities than were told")
    elif not real_vllm and list(trace.prompt_token_ids or ()) != prompt_ids(trace.messages):
        findings.blame("damaged", f"{one.trace}: other prompt tokens than were read")


def _check_prompt(one: Asked, trace: Trace, findings: Findings) -> None:
    """The model was asked what the client asked, and nothing but a skill of this agent stood before it."""
    first, *rest = trace.messages
    with_skill = first["role"] == "system" and trace.skills
    if with_skill:
        findings.seen["answers with a skill"] += 1
        if one.agent != GATED or first.get("content") != render_block([_SKILL]):
            findings.blame("leaked", f"{one.trace} of {one.agent} was shown {first.get('content')!r}")
    if (rest if with_skill else list(trace.messages)) != one.messages:
        findings.blame("mixed", f"{one.trace}: the model was asked {trace.messages}, the client asked {one.messages}")


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


def at_rest(stage: Stage) -> str:
    """What still goes on; empty when nothing does."""
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        unscored = c.execute("SELECT COUNT(*) FROM traces WHERE score = 'waiting'").fetchone()[0]
        waiting = c.execute(
            "SELECT COUNT(*) FROM traces WHERE score = 'scored' AND trainable AND forward IN ('waiting', 'merged')"
        ).fetchone()[0]
        routes = dict(c.execute("SELECT agent, version FROM routes").fetchall())
        states = {(row[0], row[1]): row[2] for row in c.execute("SELECT agent, number, state FROM adapters")}
        forwarded = {row[0] for row in c.execute("SELECT id FROM traces WHERE forward = 'forwarded'")}
    with sqlite3.connect(stage.trainer_home / "queue.db", timeout=20) as c:
        queued = c.execute("SELECT COUNT(*) FROM samples WHERE state IN ('waiting', 'claimed')").fetchone()[0]
        newest = dict(c.execute("SELECT agent, MAX(number) FROM versions GROUP BY agent").fetchall())
        aside = "SELECT trace_id FROM sample_traces JOIN samples ON samples.id = sample_id WHERE state = 'set_aside'"
        forwarded -= {row[0] for row in c.execute(aside)}
    left = {"unscored": unscored, "to be forwarded": waiting, "in the queue": queued, "untracked": len(forwarded)}
    goes_on = [f"{n} {what}" for what, n in left.items() if n]
    for agent in AGENTS:
        serves, last = routes.get(agent, 0), newest.get(agent, 0)
        if serves != last and states.get((agent, last)) != "rejected":
            goes_on.append(f"{agent} serves v{serves} of v{last}")
    try:
        loaded, served = set(loaded_adapters(stage)), served_set(stage)
    except httpx.HTTPError as error:
        return ", ".join([*goes_on, f"vLLM does not answer: {error!r}"])
    if loaded != served:
        goes_on.append(f"vLLM holds {sorted(loaded)}, not {sorted(served)}")
    return ", ".join(goes_on)


def loaded_adapters(stage: Stage) -> dict[str, str]:
    """What vLLM says that it holds: name -> folder."""
    answer = httpx.get(f"http://127.0.0.1:{stage.vllm_port}/v1/models", timeout=10)
    return {model["id"]: model["root"] for model in answer.json()["data"] if model["parent"] is not None}


def served_set(stage: Stage) -> set[str]:
    """What the trainer was told that vLLM shall hold."""
    with sqlite3.connect(stage.trainer_home / "queue.db", timeout=20) as c:
        return {row[0] for row in c.execute("SELECT name FROM served")}


def _check_gate(stage: Stage, findings: Findings) -> None:
    """What the gate replayed and decided."""
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        rows = c.execute("SELECT decision FROM adapters WHERE agent = ? AND decision IS NOT NULL", (GATED,)).fetchall()
    judged = [decision for decision in (json.loads(row[0]) for row in rows) if "replies" in decision]
    replayed = sum(decision["difference"] is not None for decision in judged)
    findings.seen["candidates judged by replays"] = replayed
    findings.seen["candidates judged by sanity alone"] = len(judged) - replayed
    findings.seen["candidates rejected"] = sum(not decision["accepted"] for decision in judged)
