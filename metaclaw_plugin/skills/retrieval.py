"""Which skills fit what the human just asked: few, relevant, within a budget; nothing when nothing fits."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.lexical import LexicalIndex, Vocabulary, skill_terms, terms
from metaclaw_plugin.skills.library import Library, View
from metaclaw_plugin.skills.query import Query, build_query
from metaclaw_plugin.skills.skill_file import Skill

CONTEXT_WEIGHT = 0.25  # of a term that only the conversation before has


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


class Retriever:
    """Selects from a library. Safe to call from several threads; never from an event loop."""

    def __init__(self, library: Library, settings: SkillSettings) -> None:
        self._library = library
        self._settings = settings
        self._lock = threading.Lock()
        self._vocabulary = Vocabulary()
        self._encoded: dict[tuple[str, str], tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        self._indexes: dict[str, _Indexed] = {}

    def select(self, agent: str, messages: Sequence[Mapping[str, Any]]) -> tuple[Skill, ...]:
        """The skills to inject for the newest human message, best first."""
        ranked = self.rank(agent, build_query(messages))
        relevant = [item for item in ranked if item.relevance >= self._settings.min_relevance]
        return within_budget(relevant, self._settings.max_skills, self._settings.max_tokens)

    def search(self, agent: str, text: str, limit: int = 10) -> list[Scored]:
        """The skills nearest to ``text``, best first, whether or not they reach the threshold."""
        return self.rank(agent, Query(text))[:limit]

    def rank(self, agent: str, query: Query) -> list[Scored]:
        """All skills that share anything with the query, best first."""
        index = self._index(agent)
        relevance = self._lexical(index.lexical, query)
        best = np.argsort(-relevance, kind="stable")
        return [Scored(index.skills[i], float(relevance[i])) for i in best if relevance[i] > 0]

    @staticmethod
    def _lexical(index: LexicalIndex, query: Query) -> NDArray[np.float64]:
        """BM25, relative to the most that this query could score; long queries are let off part of it, because
        nobody writes a long question of nothing but the skill's own words. Shape (D,)."""
        asked = dict.fromkeys(terms(query.text), 1.0)
        before = {term: CONTEXT_WEIGHT for term in terms(query.context) if term not in asked}
        information = index.information(asked) or index.rarest
        return index.scores(asked | before) / math.sqrt(information * index.rarest)

    def _index(self, agent: str) -> _Indexed:
        view = self._library.view(agent)
        known = self._indexes.get(agent)
        if known is not None and known.view is view:
            return known
        with self._lock:
            skills = tuple(view.skills.values())
            lexical = LexicalIndex(self._vocabulary, [self._encode(skill) for skill in skills])
            index = _Indexed(view, skills, lexical)
            self._indexes[agent] = index
        return index

    def _encode(self, skill: Skill) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        key = (skill.name, skill.version)
        if key not in self._encoded:
            self._encoded[key] = self._vocabulary.encode(skill_terms(skill))
        return self._encoded[key]


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
