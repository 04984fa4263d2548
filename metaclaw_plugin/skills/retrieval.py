"""Which skills fit what the human just asked: few, relevant, within a budget; nothing when nothing fits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.embedding import Embedder, Vectors
from metaclaw_plugin.skills.lexical import LexicalIndex, Vocabulary, skill_terms, terms
from metaclaw_plugin.skills.library import Library, View
from metaclaw_plugin.skills.query import Query, awaits_answer, build_query
from metaclaw_plugin.skills.skill_file import Skill

log = logging.getLogger(__name__)

CONTEXT_WEIGHT = 0.25  # of a term that only the conversation before has
LENGTH_SHARE = 0.3  # how far a long query lowers the lexical relevance: 0 not at all, 1 in proportion
SEMANTIC_SHARE = 0.7  # of the embeddings in the fused relevance
SHARE_OF_BEST = 0.6  # a skill less relevant than this share of the best one is not injected beside it
LEXICAL_THRESHOLD = 0.30
# Where benchmarks/skills.py found them best. Static vectors lie much nearer to one another than those of a transformer,
# which is what an endpoint is taken for.
THRESHOLDS = {
    ("embeddings", "onnx"): 0.20,
    ("embeddings", "endpoint"): 0.20,
    ("embeddings", "model2vec"): 0.49,
    ("fused", "onnx"): 0.20,
    ("fused", "endpoint"): 0.20,
    ("fused", "model2vec"): 0.39,
}
EMBED_BATCH = 32  # texts
EMBED_PAUSE = 30.0  # seconds until an embedder that failed is asked for vectors of skills again

Scores = NDArray[np.float64]  # (D,), one for each skill of a view


@dataclass(frozen=True, slots=True)
class Scored:
    """A skill and how relevant it is: 0 is not at all; the threshold is `skills.min_relevance`."""

    skill: Skill
    relevance: float


@dataclass(frozen=True, slots=True)
class _Indexed:
    view: View
    skills: tuple[Skill, ...]
    lexical: LexicalIndex
    vectors: Vectors | None  # (D, width), rows of zeros for skills that have none yet
    complete: bool  # every skill has its vector, or none is wanted


class Retriever:
    """Selects from a library. Safe to call from several threads; never from an event loop."""

    def __init__(self, library: Library, settings: SkillSettings, embedder: Embedder | None = None) -> None:
        self._library = library
        self._settings = settings
        self._embedder = embedder
        self._lock = threading.Lock()
        self._vocabulary = Vocabulary()
        self._encoded: dict[tuple[str, str], tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        self._pause_until = 0.0
        self._vectors: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._indexes: dict[str, _Indexed] = {}

    def select(self, agent: str, messages: Sequence[Mapping[str, Any]]) -> tuple[Skill, ...]:
        """The skills to inject for the newest human message, best first."""
        ranked, by_words = self._ranked(agent, build_query(messages))
        threshold = self.threshold
        if by_words and self._settings.min_relevance is None:
            threshold = LEXICAL_THRESHOLD
        return within_budget(relevant(ranked, threshold), self._settings.max_skills, self._settings.max_tokens)

    def select_for_new(self, agent: str, messages: Sequence[Mapping[str, Any]]) -> tuple[Skill, ...]:
        """As ``select``; nothing for a request that goes on with a tool loop, which has its skills already."""
        return self.select(agent, messages) if awaits_answer(messages) else ()

    @property
    def takes_long(self) -> bool:
        """Whether a selection asks a model or an endpoint: too much for every request of a tool loop."""
        return self._embedder is not None

    @property
    def threshold(self) -> float:
        """The relevance from which on a skill is injected."""
        settings = self._settings
        if settings.min_relevance is not None:
            return settings.min_relevance
        return THRESHOLDS.get((settings.retrieval, settings.embedder or ""), LEXICAL_THRESHOLD)

    def search(self, agent: str, text: str, limit: int = 10) -> list[Scored]:
        """The skills nearest to ``text``, best first, whether or not they reach the threshold."""
        return self.rank(agent, Query(text))[:limit]

    def rank(self, agent: str, query: Query) -> list[Scored]:
        """All skills that share anything with the query, best first."""
        return self._ranked(agent, query)[0]

    def _ranked(self, agent: str, query: Query) -> tuple[list[Scored], bool]:
        """As ``rank``, and whether words alone decided, which have a threshold of their own."""
        index = self._index(agent)
        relevance, by_words = self._relevance(index, query)
        best = np.argsort(-relevance, kind="stable")
        return [Scored(index.skills[i], float(relevance[i])) for i in best if relevance[i] > 0], by_words

    def embed_new(self) -> int:
        """Make the vectors of skills that have none, away from any request; returns how many were made.

        Until then such skills are found by their words alone.
        """
        if self._embedder is None:
            return 0
        owners = (self._library.skills_of(owner) for owner in self._library.owners())
        skills = {_key(skill): skill for owner in owners for skill in owner.values()}
        missing = [key for key in skills if key not in self._vectors]
        if not missing or time.monotonic() < self._pause_until:
            return 0
        for start in range(0, len(missing), EMBED_BATCH):
            keys = missing[start : start + EMBED_BATCH]
            try:
                made = self._embedder.embed([_embedded(skills[key]) for key in keys])
            except SkillError as error:
                log.warning("%d skills have no vector yet: %s", len(missing) - start, error)
                self._pause_until = time.monotonic() + EMBED_PAUSE
                return start
            self._vectors.update(zip(keys, made, strict=True))
        return len(missing)

    def _relevance(self, index: _Indexed, query: Query) -> tuple[Scores, bool]:
        """Relevance of every skill, shape (D,), and whether it is that of words alone."""
        lexical = _lexical(index.lexical, query)
        if self._embedder is None or index.vectors is None or not query.text:
            return lexical, True
        try:
            asked = self._embedder.embed([query.text])[0]
        except SkillError as error:
            log.warning("skills are selected by words alone: %s", error)
            return lexical, True
        semantic: Scores = np.maximum(index.vectors @ asked, 0).astype(np.float64)
        if self._settings.retrieval == "embeddings":
            return semantic, False
        fused: Scores = SEMANTIC_SHARE * semantic + (1 - SEMANTIC_SHARE) * np.minimum(lexical, 1.0)
        return fused, False

    def _index(self, agent: str) -> _Indexed:
        view = self._library.view(agent)
        known = self._indexes.get(agent)
        if known is not None and known.view is view and known.complete:
            return known
        with self._lock:
            skills = tuple(view.skills.values())
            if known is not None and known.view is view:
                lexical = known.lexical
            else:
                lexical = LexicalIndex(self._vocabulary, [self._encode(skill) for skill in skills])
            vectors, complete = self._matrix(skills)
            index = _Indexed(view, skills, lexical, vectors, complete)
            self._indexes[agent] = index
        return index

    def _matrix(self, skills: Sequence[Skill]) -> tuple[Vectors | None, bool]:
        if self._embedder is None:
            return None, True
        found = [self._vectors.get(_key(skill)) for skill in skills]
        width = next((len(vector) for vector in found if vector is not None), None)
        if width is None:
            return None, not skills
        empty = np.zeros(width, np.float32)
        return np.stack([empty if vector is None else vector for vector in found]), all(v is not None for v in found)

    def _encode(self, skill: Skill) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        key = _key(skill)
        if key not in self._encoded:
            self._encoded[key] = self._vocabulary.encode(skill_terms(skill))
        return self._encoded[key]


def _lexical(index: LexicalIndex, query: Query) -> Scores:
    """BM25, relative to the most that this query could score; long queries are let off part of it, because nobody
    writes a long question of nothing but the skill's own words. Shape (D,)."""
    asked = dict.fromkeys(terms(query.text), 1.0)
    before = {term: CONTEXT_WEIGHT for term in terms(query.context) if term not in asked}
    information = index.information(asked) or index.rarest
    relevance: Scores = index.scores(asked | before) / (information**LENGTH_SHARE * index.rarest ** (1 - LENGTH_SHARE))
    return relevance


def _key(skill: Skill) -> tuple[str, str]:
    return skill.name, skill.version


def _embedded(skill: Skill) -> str:
    return f"{skill.name.replace('-', ' ')}. {skill.description} {skill.triggers}".strip()


def relevant(ranked: Sequence[Scored], threshold: float) -> list[Scored]:
    """Those of ``ranked``, best first, that reach the threshold and stand up to the best one."""
    best = ranked[0].relevance if ranked else 0.0
    return [item for item in ranked if item.relevance >= max(threshold, SHARE_OF_BEST * best)]


def within_budget(ranked: Sequence[Scored], most: int, tokens: int) -> tuple[Skill, ...]:
    """The best ``most`` skills that together cost no more than ``tokens``; one too large makes room for the next."""
    chosen: list[Skill] = []
    for item in ranked:
        if len(chosen) == most:
            break
        if item.skill.tokens <= tokens:
            chosen.append(item.skill)
            tokens -= item.skill.tokens
    return tuple(chosen)
