"""Skill retrieval, measured: which method finds the right skills, and how fast.

    python -m benchmarks.skills [--embedder SPEC ...] [--json FILE] [--tune]

Quality is measured on skills_queries.yaml against the starter set; thresholds are tuned on the even half of the queries
("dev") and all figures are of the odd half ("test"). Speed is measured on a library of 1,000 skills on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.embedding import load_embedder
from metaclaw_plugin.skills.install import STARTER, install_starter
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.query import Query
from metaclaw_plugin.skills.retrieval import Retriever, Scored, relevant
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, parse_skill, render_skill, write_atomic

QUERIES = Path(__file__).with_name("skills_queries.yaml")
Ranker = Callable[[str], list[Scored]]  # best first
MOST = 3  # skills injected

# The ancestor's way: words of a category in the text choose the category, and its skills come in file order.
KEYWORDS = {
    "coding": "code bug function class python javascript error debug compile test refactor api git sql query script",
    "research": "research paper study source compare find explain citation evidence literature",
    "data-analysis": "data csv dataset chart plot analysis statistics excel spreadsheet average table dataframe",
    "security": "security password secret attack vulnerability encrypt permission phishing token auth",
    "communication": "email mail write message reply letter meeting translate summary summarise report customer",
    "automation": "automate schedule cron script deploy pipeline backup monitor batch job workflow",
    "agentic": "agent tool step plan task multi run execute",
    "productivity": "todo calendar plan schedule trip week prioritise organise time meeting learn",
}


@dataclass(frozen=True)
class Case:
    text: str
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One method's figures on the test half; shares in [0, 1]."""

    method: str
    threshold: float
    recall_at_3: float  # the best skill is among the first three injected
    injected_wrongly: float  # of queries that need none: something was injected
    injected_mean: float  # skills injected on queries that need one
    precision: float  # of all injected skills: wanted
    p50_ms: float
    p95_ms: float


def cases() -> tuple[list[Case], list[Case]]:
    """The dev half and the test half."""
    rows = [Case(row["q"], tuple(row["skills"])) for row in yaml.safe_load(QUERIES.read_text())]
    return rows[0::2], rows[1::2]


def keyword_ranker(root: Path) -> Ranker:
    by_category: dict[str, list[Scored]] = {}
    for folder in sorted((root / SHARED).iterdir()):
        skill = parse_skill((folder / FILE_NAME).read_bytes(), folder.name, SHARED)
        by_category.setdefault(skill.category or "general", []).append(Scored(skill, 1.0))

    def rank(text: str) -> list[Scored]:
        words = text.lower()
        hits = {name: sum(word in words for word in keys.split()) for name, keys in KEYWORDS.items()}
        best = max(hits, key=lambda name: hits[name])
        return by_category["common-mistakes" if not hits[best] else best]

    return rank


def retriever_ranker(library: Library, settings: SkillSettings) -> Ranker:
    retriever = Retriever(library, settings, load_embedder(settings))
    retriever.embed_new()
    return lambda text: retriever.rank("bench", Query(text))


def score(rank: Ranker, threshold: float, rows: Sequence[Case]) -> dict[str, float]:
    found = wrong = none = some = injected = right = total = 0
    for case in rows:
        names = [item.skill.name for item in relevant(rank(case.text), threshold)[:MOST]]
        total += len(names)
        if case.wanted:
            some += 1
            injected += len(names)
            found += case.wanted[0] in names
            right += sum(name in case.wanted for name in names)
        else:
            none += 1
            wrong += bool(names)
    return {
        "recall_at_3": found / some,
        "injected_wrongly": wrong / none,
        "injected_mean": injected / some,
        "precision": right / max(total, 1),
    }


def tune(rank: Ranker, rows: Sequence[Case]) -> float:
    """The threshold with the best recall minus wrong injections on ``rows``."""
    seen = {case.text: rank(case.text) for case in rows}
    grid = sorted({round(item.relevance, 3) for ranked in seen.values() for item in ranked[:3]})

    def gain(threshold: float) -> float:
        figures = score(lambda text: seen[text], threshold, rows)
        return figures["recall_at_3"] - figures["injected_wrongly"]

    return max(grid, key=gain, default=0.0)


def timed(rank: Ranker, texts: Sequence[str], seconds: float) -> tuple[float, float]:
    """Median and 95th percentile of one selection, in milliseconds."""
    for text in texts[:5]:
        rank(text)
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 20:
        text = texts[len(taken) % len(texts)]
        start = time.perf_counter()
        rank(f"{text} {len(taken)}")
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken), statistics.quantiles(taken, n=20)[-1]


def big_library(root: Path, size: int = 1000) -> Library:
    """``size`` skills made of the starter set's own sentences, each with words of its own."""
    originals = [parse_skill((d / FILE_NAME).read_bytes(), d.name, SHARED) for d in sorted(STARTER.iterdir())]
    for number in range(size):
        one, two = originals[number % len(originals)], originals[(number * 7 + 3) % len(originals)]
        name = f"{one.name}-{number}"[:63]
        words = f"Case {number}, variant v{number * 31 % 997}."
        data = render_skill(name, f"{one.description} {words}", f"{one.body}\n\n{two.body}", one.category)
        write_atomic(root / SHARED / name / FILE_NAME, data)
    return Library(root)


def reload_ms(root: Path, library: Library, rank: Ranker, rounds: int = 15) -> float:
    """Median time from a changed file on disk to the first selection that knows it."""
    taken = []
    folders = sorted((root / SHARED).iterdir())
    for number in range(rounds):
        folder = folders[number * 37 % len(folders)]
        skill = parse_skill((folder / FILE_NAME).read_bytes(), folder.name, SHARED)
        write_atomic(
            folder / FILE_NAME, render_skill(skill.name, skill.description, f"{skill.body}\n\nRound {number}.")
        )
        start = time.perf_counter()
        library.refresh()
        rank("reload")
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--embedder", action="append", default=[], metavar="KIND:MODEL", help="as onnx:FOLDER")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time for each method")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    methods: list[tuple[str, SkillSettings | None]] = [("keyword category", None)]
    methods.append(("BM25", SkillSettings(retrieval="lexical")))
    for spec in options.embedder:
        kind, _, model = spec.partition(":")
        for retrieval in ("embeddings", "fused"):
            wanted = {"retrieval": retrieval, "embedder": kind, "embedder_model": model}
            methods.append((f"{retrieval}, {kind} {Path(model).name}", SkillSettings.model_validate(wanted)))
    dev, test = cases()
    rows: list[Row] = []
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        small, big = Path(temporary) / "small", Path(temporary) / "big"
        install_starter(small)
        starter = Library(small)
        large = big_library(big)
        for method, settings in methods:
            if settings is None:
                rank, fast = keyword_ranker(starter.root), keyword_ranker(big)
            else:
                rank, fast = retriever_ranker(starter, settings), retriever_ranker(large, settings)
            threshold = tune(rank, dev)
            p50, p95 = timed(fast, [case.text for case in test], options.seconds)
            rows.append(Row(method, threshold, **score(rank, threshold, test), p50_ms=p50, p95_ms=p95))
            if settings is not None:
                extra[f"reload_ms {method}"] = reload_ms(big, large, fast)
    report(rows, extra)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], **extra}, indent=1))


def report(rows: Sequence[Row], extra: dict[str, Any]) -> None:
    head = ("method", "threshold", "recall@3", "wrongly injected", "skills injected", "precision", "p50 ms", "p95 ms")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        method, *figures = asdict(row).values()
        print(f"| {method} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    for name, value in extra.items():
        print(f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()
