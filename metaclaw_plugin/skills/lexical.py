"""BM25 over skills, as Robertson and Zaragoza describe it (2009), with Lucene's idf and saturation.

Our own because a reload must not cost more than the change: each skill's term counts are kept, and the index over a
thousand of them is a few vectorised operations (bm25s, which a test compares scores with, takes several times as
long), and because the relevance threshold needs what libraries keep to themselves: how much of the query's
information a skill covers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import snowballstemmer
from numpy.typing import NDArray

from metaclaw_plugin.skills.skill_file import Skill

# Chosen on the development half of benchmarks/skills_queries.yaml.
K1, B = 0.8, 0.75
# A library of a few skills says nothing about how rare a word is: it is taken for a sample of one of this many.
LEAST_DOCUMENTS = 40
NAME_WEIGHT, DESCRIPTION_WEIGHT, BODY_WEIGHT = 3.0, 3.0, 0.35

_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_STEMMER = snowballstemmer.stemmer("english")
# Words that say how one talks, not what about.
_STOP_WORDS = """
    a about actually after again all also am an and any anyone anything are as ask asked at be because been
    before being believe best big bit but by call called can cannot come could day days describe did different
    do does doing done dont down each else even ever every everyone everything explain feel feels few first for
    from get gets getting give given go goes going gone good got great had happen happens has hate have having
    he hello help her here hey hi him his how i idea ideas if im important in into is isnt it its ive just keep
    kind know let lets life like little ll long look lot love made make makes making man many may maybe me mean
    meaning means might mine month more most much must my name need needs never new nice night no nobody not now
    of off ok okay old on once one only or other our out over own part people person please put quick quickly
    really right s same say says see seem shall she should show simply since so some somebody someone something
    sort sound sounds still such sure t take tell than thank thanks that thats the their them then there these
    they thing things think this those though through to today together tomorrow tonight too try trying two
    under up upon us use used using ve very want wants was way we well went were what whats when where whether
    which while who whom why will with without woman won work world would year years yes yesterday yet you your
    yours
"""
_STOP = frozenset(_STOP_WORDS.split())


@lru_cache(maxsize=50_000)
def _stem(word: str) -> str:
    return str(_STEMMER.stemWord(word))


def terms(text: str) -> list[str]:
    """Stemmed words of ``text`` in order, without stop words and single letters."""
    words = (word for word in _WORD.findall(text.lower().replace("'", "").replace("’", "")) if len(word) > 1)
    return [_stem(word) for word in words if word not in _STOP]


def skill_terms(skill: Skill) -> dict[str, float]:
    """Term -> weighted count in a skill: its name and description weigh more than its body."""
    counts: Counter[str] = Counter()
    fields = (
        (skill.name.replace("-", " "), NAME_WEIGHT),
        (f"{skill.category or ''} {skill.description} {skill.triggers}", DESCRIPTION_WEIGHT),
        (skill.body, BODY_WEIGHT),
    )
    for text, weight in fields:
        for term in terms(text):
            counts[term] += weight  # type: ignore[assignment]
    return dict(counts)


class Vocabulary:
    """Term -> number, shared by all indexes of a process; it only grows."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, term: str) -> int | None:
        return self._ids.get(term)

    def encode(self, counts: Mapping[str, float]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Term numbers and their counts, two arrays of one length."""
        ids = np.fromiter((self._ids.setdefault(term, len(self._ids)) for term in counts), np.int32, len(counts))
        return ids, np.fromiter(counts.values(), np.float32, len(counts))


class LexicalIndex:
    """An immutable index over ``D`` documents, given as the vocabulary's arrays."""

    def __init__(
        self, vocabulary: Vocabulary, documents: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]]
    ) -> None:
        self._vocabulary = vocabulary
        self._size = len(documents)
        sizes = np.fromiter((len(ids) for ids, _ in documents), np.int64, self._size)
        term_P = np.concatenate([ids for ids, _ in documents] or [np.zeros(0, np.int32)])  # noqa: N806 - P postings
        count_P = np.concatenate([counts for _, counts in documents] or [np.zeros(0, np.float32)])  # noqa: N806
        document_P = np.repeat(np.arange(self._size, dtype=np.int32), sizes)  # noqa: N806
        length_D = np.bincount(document_P, weights=count_P, minlength=self._size)  # noqa: N806
        frequency_V = np.bincount(term_P, minlength=len(vocabulary))  # noqa: N806
        self._population = max(self._size, LEAST_DOCUMENTS)
        self._idf_V = np.log1p((self._population - frequency_V + 0.5) / (frequency_V + 0.5))
        mean = float(length_D.mean()) if self._size else 1.0
        norm_D = K1 * (1 - B + B * length_D / max(mean, 1e-9))  # noqa: N806
        weight_P = self._idf_V[term_P] * count_P / (count_P + norm_D[document_P])  # noqa: N806
        order = np.argsort(term_P, kind="stable")
        self._document_P, self._weight_P = document_P[order], weight_P[order]
        self._start_V = np.concatenate([[0], np.cumsum(frequency_V)])

    @property
    def rarest(self) -> float:
        """The idf of a term that no document has: the largest there is."""
        return float(np.log1p((self._population + 0.5) / 0.5))

    def idf(self, term: str) -> float:
        number = self._vocabulary.get(term)
        return self.rarest if number is None or number >= len(self._idf_V) else float(self._idf_V[number])

    def scores(self, weights: Mapping[str, float]) -> NDArray[np.float64]:
        """BM25 score of every document for a query of weighted terms; shape (D,)."""
        result = np.zeros(self._size)
        for term, weight in weights.items():
            number = self._vocabulary.get(term)
            if number is None or number >= len(self._idf_V):
                continue
            span = slice(self._start_V[number], self._start_V[number + 1])
            result[self._document_P[span]] += weight * self._weight_P[span]
        return result

    def information(self, query: Iterable[str]) -> float:
        """What a document that had every term of ``query`` without end would score at most."""
        return sum(self.idf(term) for term in query)
