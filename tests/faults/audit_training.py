"""What was learned, compared with what was captured: samples, versions, checkpoints, leases."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Trace
from metaclaw_trainer import schema as trainer_schema
from metaclaw_trainer.checkpoints import WEIGHTS, read_manifest
from metaclaw_trainer.errors import TrainerError

from tests.faults.findings import Findings
from tests.faults.stage import Stage
from tests.faults.taken import check_taken


@dataclass(frozen=True)
class Version:
    """What the trainer says that it made."""

    agent: str
    number: int
    sha256: str
    path: Path
    trace_ids: tuple[str, ...]
    removed: bool


def listed_versions(stage: Stage) -> dict[tuple[str, int], Version]:
    engine = sa.create_engine(f"sqlite:///{stage.trainer_home / 'queue.db'}")
    with engine.connect() as c:
        rows = c.execute(sa.select(trainer_schema.versions)).all()
    engine.dispose()
    return {
        (row.agent, row.number): Version(
            row.agent,
            row.number,
            row.manifest["sha256"],
            Path(row.path),
            tuple(row.manifest["trace_ids"]),
            row.removed_at is not None,
        )
        for row in rows
    }


def check_training(
    stage: Stage,
    traces: Mapping[str, Trace],
    versions: Mapping[tuple[str, int], Version],
    findings: Findings,
) -> None:
    """Every trainable trace is in one sample, and was trained in one version; nothing else was. What was trained on is
    what was captured."""
    members, scores, held_out = _samples(stage, findings)
    in_samples, state = Counter(row.trace_id for row in members), {row.trace_id: row.state for row in members}
    for row in members:
        trace = traces.get(row.trace_id)
        if trace is None:
            findings.blame("mixed", f"sample {row.id} is of {row.trace_id}, which is not in the store")
        elif trace.agent != row.agent:
            findings.blame("leaked", f"sample {row.id} of {row.agent} holds a trace of {trace.agent}")
    trained: Counter[str] = Counter()
    for version in versions.values():
        trained.update(version.trace_ids)
        if foreign := [t for t in version.trace_ids if t in traces and traces[t].agent != version.agent]:
            findings.blame("leaked", f"{version.agent}@v{version.number} learned from {foreign}")
    for name, times in trained.items():
        if times > 1:
            findings.blame("trained twice", f"{name}: in {times} versions")
    check_taken(stage.folder, traces, {row.id for row in members if row.state == "trained"}, findings)
    _check_fates(traces, in_samples, state, scores, held_out, trained, findings)


def _check_fates(
    traces: Mapping[str, Trace],
    in_samples: Counter[str],
    state: Mapping[str, str],
    scores: Mapping[str, str],
    held_out: Mapping[str, bool],
    trained: Counter[str],
    findings: Findings,
) -> None:
    for trace in traces.values():
        found = in_samples[trace.id]
        if not trace.trainable or scores[trace.id] == "unscored":
            # Of an answer that broke off, or that no reward had an opinion on since the reward was made to fail.
            findings.seen["traces not trainable" if not trace.trainable else "traces without an opinion"] += 1
            if found:
                findings.blame("mixed", f"{trace.id} is not trainable ({trace.reason}) and in a sample")
        elif held_out[trace.id]:
            findings.seen["traces held out"] += 1
            if found:
                findings.blame("mixed", f"{trace.id} is held out and in a sample")
        elif found == 1 and state[trace.id] == "set_aside":
            findings.seen["traces set aside with a reason"] += 1
        elif found == 1 and trained[trace.id] == 1:
            findings.seen["traces trained once"] += 1
        else:
            text = f"{trace.id}: in {found} samples ({state.get(trace.id)}) and {trained[trace.id]} versions"
            findings.blame("doubled" if found > 1 else "not trained", text)


def _samples(stage: Stage, findings: Findings) -> tuple[Sequence[sa.Row[Any]], dict[str, str], dict[str, bool]]:
    """Which trace is in which sample of which agent in which state; trace id -> score state, and whether held out."""
    s, of = trainer_schema.samples.c, trainer_schema.sample_traces.c
    engine = sa.create_engine(f"sqlite:///{stage.trainer_home / 'queue.db'}")
    with engine.connect() as c:
        members = c.execute(sa.select(of.trace_id, s.id, s.agent, s.state).where(of.sample_id == s.id)).all()
        findings.seen["samples"] = c.scalar(sa.select(sa.func.count()).select_from(trainer_schema.samples)) or 0
    engine.dispose()
    with sqlite3.connect(stage.store_file, timeout=20) as store:
        scores = dict(store.execute("SELECT id, score FROM traces").fetchall())
        query = "SELECT traces.id, sessions.held_out FROM traces JOIN sessions ON sessions.id = traces.session"
        return members, scores, dict(store.execute(query).fetchall())


def check_versions(
    versions: Mapping[tuple[str, int], Version], traces: Mapping[str, Trace], findings: Findings
) -> None:
    """Every listed version lies where it should with the bytes that were listed, and its lineage is the list's."""
    findings.seen["versions"] = len(versions)
    samples: Counter[str] = Counter()
    for (agent, number), version in versions.items():
        if version.removed:
            continue
        try:
            lineage = read_manifest(version.path)["lineage"]
            digest = hashlib.sha256((version.path / WEIGHTS).read_bytes()).hexdigest()
        except (OSError, KeyError, TrainerError) as error:
            findings.blame("damaged", f"{agent}@v{number}: {error}")
            continue
        if digest != version.sha256:
            findings.blame("damaged", f"{agent}@v{number}: its weights are not those that were listed")
        if tuple(lineage["trace_ids"]) != version.trace_ids or (lineage["agent"], lineage["number"]) != (agent, number):
            findings.blame("mixed", f"{agent}@v{number}: its manifest is another version's")
        samples.update(lineage["sample_ids"])
    for sample, times in samples.items():
        if times > 1:
            findings.blame("trained twice", f"sample {sample}: in {times} checkpoints")


def check_leases(stage: Stage, findings: Findings) -> None:
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        held = c.execute("SELECT COUNT(*) FROM traces WHERE lease_owner IS NOT NULL").fetchone()[0]
    if held:
        findings.blame("not back", f"{held} traces are still leased")


def check_loaded(
    loaded: Mapping[str, str], served: set[str], versions: Mapping[tuple[str, int], Version], findings: Findings
) -> None:
    """At rest vLLM holds what shall be served, each from its own folder, and nothing else.

    ``loaded``: name -> folder.
    """
    findings.seen["adapters that vLLM holds"] = len(loaded)
    for name in served - loaded.keys():
        findings.blame("not back", f"{name} shall be served, and vLLM does not hold it")
    for name, folder in loaded.items():
        agent, _, number = name.partition("@v")
        version = versions.get((agent, int(number)))
        if name not in served:
            findings.blame("not back", f"vLLM holds {name}, which shall not be served")
        if version is None or Path(folder) != version.path:
            findings.blame("mixed", f"vLLM holds {name} from {folder}; its folder is {version and version.path}")
