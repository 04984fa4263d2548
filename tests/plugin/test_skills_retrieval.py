"""Retrieval: BM25 as the library knows it, a threshold, a budget, and questions wrapped by a client."""

from __future__ import annotations

import json
from pathlib import Path

import bm25s
import numpy as np
import pytest

from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.lexical import K1, B, LexicalIndex, Vocabulary, terms
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.query import Query
from metaclaw_plugin.skills.retrieval import Retriever, Scored, within_budget
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, Skill, parse_skill, render_skill, write_atomic

TEXTS = {
    "plan-travel": ("Use when a trip, journey or holiday is being planned.", "Ask for dates, budget and pace."),
    "sql-joins": ("Use when writing SQL that joins tables.", "State the grain of each table. Check row counts."),
    "write-commit": ("Use when writing a git commit message.", "Say why in the subject, in 72 characters."),
    "review-code": ("Use when reviewing a pull request or a patch.", "Read the tests first. Look for what is missing."),
    "calm-tone": ("Use when an angry customer must be answered by email.", "Thank them, own the fault, say what now."),
}
REQUESTS = Path(__file__).parents[1] / "data" / "openclaw"


def fill(root: Path, owner: str = SHARED) -> Library:
    for name, (description, body) in TEXTS.items():
        write_atomic(root / owner / name / FILE_NAME, render_skill(name, description, body))
    return Library(root)


def test_scores_are_those_of_bm25s() -> None:
    random = np.random.default_rng(7)
    documents = [[f"t{n}" for n in random.zipf(1.4, size=random.integers(5, 60)) % 50] for _ in range(40)]
    oracle = bm25s.BM25(k1=K1, b=B, method="lucene")
    oracle.index(documents, show_progress=False)
    vocabulary = Vocabulary()
    counts = [{term: float(document.count(term)) for term in document} for document in documents]
    index = LexicalIndex(vocabulary, [vocabulary.encode(count) for count in counts])
    for query in (["t1", "t2"], ["t7"], ["t3", "t11", "t30"]):
        np.testing.assert_allclose(index.scores(dict.fromkeys(query, 1.0)), oracle.get_scores(query), rtol=1e-4)


def test_words_are_stemmed_and_talk_is_dropped() -> None:
    assert terms("Could you please help me with planning the Trips?") == terms("plans trip")
    assert terms("don't I'm it's") == []


def test_the_only_skill_of_a_library_is_found_when_it_fits(tmp_path: Path) -> None:
    write_atomic(
        tmp_path / "alpha" / "one-tip" / FILE_NAME, render_skill("one-tip", "Give one useful tip.", "Be brief.")
    )
    retriever = Retriever(Library(tmp_path), SkillSettings())
    ask = [{"role": "user", "content": "Give me one tip about salt."}]
    assert [skill.name for skill in retriever.select("alpha", ask)] == ["one-tip"]
    assert retriever.select("alpha", [{"role": "user", "content": "What is the capital of France?"}]) == ()


def test_the_right_skill_is_selected_and_nothing_for_a_question_that_needs_none(tmp_path: Path) -> None:
    retriever = Retriever(fill(tmp_path), SkillSettings())
    chosen = retriever.select("alpha", [{"role": "user", "content": "write the commit message for this change"}])
    assert [skill.name for skill in chosen][:1] == ["write-commit"]
    assert retriever.select("alpha", [{"role": "user", "content": "hello, how are you?"}]) == ()
    assert retriever.select("alpha", [{"role": "user", "content": "what is the capital of France"}]) == ()
    assert retriever.select("alpha", []) == ()


@pytest.mark.parametrize(
    "recorded", ["chat_turn1_webchat.json", "chat_turn2_with_tool_history.json", "responses_api.json"]
)
@pytest.mark.parametrize("question", ["Plan a trip to Rome", "which tables does this SQL join", "hello there"])
def test_an_openclaw_request_selects_what_the_bare_question_does(tmp_path: Path, recorded: str, question: str) -> None:
    retriever = Retriever(fill(tmp_path), SkillSettings())
    text = (REQUESTS / recorded).read_text()
    for said in ("Please help me plan a trip to Rome in May", "second turn alpha", "Hi resp, RUNTOOL please"):
        text = text.replace(said, question)
    body = json.loads(text)["body"]
    bare = retriever.select("alpha", [{"role": "user", "content": question}])
    assert retriever.select("alpha", body.get("messages") or body["input"]) == bare
    assert bool(bare) is (question != "hello there")


def test_the_task_so_far_is_weaker_evidence_than_the_question(tmp_path: Path) -> None:
    retriever = Retriever(fill(tmp_path), SkillSettings())
    ranked = retriever.rank("alpha", Query("write a git commit", "review my pull request"))
    alone = {item.skill.name: item.relevance for item in retriever.rank("alpha", Query("review my pull request"))}
    after = {item.skill.name: item.relevance for item in ranked}
    assert ranked[0].skill.name == "write-commit"
    assert 0 < after["review-code"] < alone["review-code"]


def test_each_agent_retrieves_from_its_own_view_and_sees_an_edit_at_once(tmp_path: Path) -> None:
    library = fill(tmp_path)
    retriever = Retriever(library, SkillSettings())
    assert retriever.search("alpha", "sourdough bread") == []
    path = tmp_path / "alpha" / "bake-bread" / FILE_NAME
    write_atomic(path, render_skill("bake-bread", "Use when baking sourdough bread.", "Weigh everything."))
    library.refresh()
    assert [item.skill.name for item in retriever.search("alpha", "sourdough bread")] == ["bake-bread"]
    assert retriever.search("beta", "sourdough bread") == []


def test_an_empty_library_selects_nothing(tmp_path: Path) -> None:
    assert Retriever(Library(tmp_path / "none"), SkillSettings()).search("alpha", "anything at all") == []


def test_the_budget_holds_and_a_large_skill_makes_room_for_the_next() -> None:
    def skill(name: str, size: int) -> Skill:
        return parse_skill(render_skill(name, "x", "y" * size), name, SHARED)

    ranked = [Scored(skill(name, size), 1.0) for name, size in (("a", 400), ("b", 4_000), ("c", 400), ("d", 400))]
    assert [chosen.name for chosen in within_budget(ranked, most=2, tokens=400)] == ["a", "c"]
    assert [chosen.name for chosen in within_budget(ranked, most=9, tokens=130)] == ["a"]
    assert within_budget(ranked, most=0, tokens=9_999) == ()
