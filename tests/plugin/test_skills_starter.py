"""The starter set and the labelled questions: valid, short, and honest with each other."""

from __future__ import annotations

from pathlib import Path

import yaml

from metaclaw_plugin.skills.install import STARTER
from metaclaw_plugin.skills.lexical import terms
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, Skill, parse_skill

QUERIES = Path(__file__).parents[2] / "benchmarks" / "skills_queries.yaml"
CATEGORIES = {
    "coding",
    "research",
    "data-analysis",
    "security",
    "communication",
    "automation",
    "agentic",
    "productivity",
    "common-mistakes",
}


def starter() -> dict[str, Skill]:
    folders = sorted(STARTER.iterdir())
    return {d.name: parse_skill((d / FILE_NAME).read_bytes(), d.name, SHARED) for d in folders}


def test_about_forty_skills_cover_all_categories_and_are_short() -> None:
    skills = starter()
    assert 35 <= len(skills) <= 60
    assert {skill.category for skill in skills.values()} == CATEGORIES
    assert all(skill.tokens <= 200 for skill in skills.values())
    assert all(skill.description.startswith("Use when") and skill.triggers for skill in skills.values())
    assert len({skill.body for skill in skills.values()}) == len(skills)


def test_the_labelled_questions_are_many_and_name_skills_that_exist() -> None:
    rows = yaml.safe_load(QUERIES.read_text())
    assert len(rows) >= 200
    assert len({row["q"] for row in rows}) == len(rows)
    assert sum(not row["skills"] for row in rows) >= 50
    skills = starter()
    assert {name for row in rows for name in row["skills"]} == set(skills), "each skill is asked for at least once"


def test_no_question_repeats_a_phrase_of_the_skill_that_it_asks_for() -> None:
    skills = starter()

    def phrases(text: str, size: int = 3) -> set[tuple[str, ...]]:
        words = terms(text)
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    for row in yaml.safe_load(QUERIES.read_text()):
        for name in row["skills"]:
            skill = skills[name]
            own = [skill.description, *skill.body.splitlines(), *skill.triggers.split(",")]
            shared = phrases(row["q"]) & set().union(*map(phrases, own))
            assert not shared, f"{name}: {shared}"


def test_the_document_gives_the_numbers_as_they_are() -> None:
    text = (QUERIES.parents[1] / "docs" / "skills.md").read_text()
    assert f"the starter set: {len(starter())} skills" in text
    assert f"{len(yaml.safe_load(QUERIES.read_text()))} labelled questions" in text
