"""What the evolver may ask for, and what of it is accepted.

An answer is a list of edits: add, improve, merge, retire. Each is judged by itself, in order; what is refused is named
with its reason, and never taken halfway.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import slug
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.lexical import skill_terms
from metaclaw_plugin.skills.library import View
from metaclaw_plugin.skills.query import without_blocks
from metaclaw_plugin.skills.safety import objections
from metaclaw_plugin.skills.skill_file import Skill, parse_skill, render_skill

MAX_ANSWER = 200_000  # characters of an evolver's answer that are read
SIMILAR = 0.72  # cosine of term counts from which on two skills are about the same thing


class _Edit(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    reason: str = ""


class AddEdit(_Edit):
    action: Literal["add"]
    name: str
    description: str
    body: str
    category: str | None = None
    triggers: str = ""


class ImproveEdit(_Edit):
    action: Literal["improve"]
    name: str
    description: str | None = None
    body: str
    triggers: str | None = None


class MergeEdit(_Edit):
    action: Literal["merge"]
    names: list[str] = Field(min_length=2, max_length=10)
    name: str
    description: str
    body: str
    category: str | None = None
    triggers: str = ""


class RetireEdit(_Edit):
    action: Literal["retire"]
    name: str


Edit = Annotated[AddEdit | ImproveEdit | MergeEdit | RetireEdit, Field(discriminator="action")]
_EDIT: TypeAdapter[AddEdit | ImproveEdit | MergeEdit | RetireEdit] = TypeAdapter(Edit)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one round may change."""

    edits: int  # accepted at most
    own_skills: int  # of one agent
    body: int  # characters
    description: int = 400  # characters
    triggers: int = 400  # characters


@dataclass(frozen=True, slots=True)
class Change:
    """An accepted edit: what to write, and which of the agent's skills go."""

    action: str  # add, improve, merge or retire
    name: str
    data: bytes | None  # the new SKILL.md; None: nothing is written
    retires: tuple[str, ...]  # the agent's own skills that are taken out
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An edit that was not accepted."""

    name: str
    reason: str


def parse_answer(text: str) -> list[dict[str, Any]]:
    """The edits in an evolver's answer, unchecked; prose and code fences around the JSON are let pass.

    Raises:
        SkillError: if there is no list of edits in it.
    """
    if len(text) > MAX_ANSWER:
        raise SkillError(f"the evolver answered with {len(text):,} characters; more than {MAX_ANSWER:,} are not read")
    text = without_blocks(text, "<think>", "</think>", to_the_end=False)
    decoder = json.JSONDecoder(strict=False)
    for start in (match.start() for match in re.finditer(r"[{\[]", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        edits = value.get("edits") if isinstance(value, dict) else value
        if isinstance(edits, list) and all(isinstance(edit, dict) for edit in edits):
            return edits
    raise SkillError('the evolver\'s answer holds no JSON of the form {"edits": [...]}')


def judge_edits(
    edits: Sequence[Mapping[str, Any]], view: View, limits: Limits, provenance: Mapping[str, str]
) -> tuple[list[Change], list[Refused]]:
    """Accept what is valid, safe, new and within bounds; ``provenance`` goes into each written skill's metadata."""
    changes: list[Change] = []
    refused: list[Refused] = []
    desk = _Desk(view, limits, provenance)
    for raw in edits[: 10 * limits.edits]:
        name = str(raw.get("name", "?"))[:63]
        if len(changes) == limits.edits:
            break
        try:
            change = desk.judge(_EDIT.validate_python(dict(raw)))
        except ValidationError as error:
            first = error.errors()[0]
            refused.append(Refused(name, f"{'.'.join(map(str, first['loc'])) or 'edit'}: {first['msg']}"))
        except (SkillError, InvalidNameError) as error:
            refused.append(Refused(name, str(error)))
        else:
            changes.append(change)
    over = len(edits) - len(changes) - len(refused)
    if over > 0:
        refused.append(Refused("?", f"{over} further edits are past the {limits.edits} that one round may make"))
    return changes, refused


def similarity(one: Skill, two: Skill) -> float:
    """Cosine of the two skills' term counts, damped; 1 is the same, 0 has nothing in common."""
    a, b = skill_terms(one), skill_terms(two)
    dot = sum(math.sqrt(a[term] * b[term]) for term in a.keys() & b.keys())
    return dot / (math.sqrt(sum(a.values()) * sum(b.values())) or 1.0)


def nearest(skill: Skill, others: Iterable[Skill]) -> tuple[Skill, float] | None:
    """The most similar of ``others``, and how similar it is."""
    scored = [(other, similarity(skill, other)) for other in others]
    return max(scored, key=lambda pair: pair[1], default=None)


class _Desk:
    """Judges one round's edits, each in the light of those accepted before."""

    def __init__(self, view: View, limits: Limits, provenance: Mapping[str, str]) -> None:
        self._skills = dict(view.skills)
        self._agent = view.agent
        self._limits = limits
        self._provenance = dict(provenance)
        self._touched: set[str] = set()

    def judge(self, edit: AddEdit | ImproveEdit | MergeEdit | RetireEdit) -> Change:
        if isinstance(edit, AddEdit):
            return self._add(edit)
        if isinstance(edit, ImproveEdit):
            known = self._known(edit.name)
            return self._write("improve", known.name, edit, known.category)
        if isinstance(edit, MergeEdit):
            merged = [self._own(name) for name in dict.fromkeys(edit.names)]
            if len(merged) < 2:
                raise SkillError("a merge needs two of the agent's own skills")
            gone = tuple(skill.name for skill in merged if skill.name != edit.name)
            change = self._write("merge", edit.name, edit, edit.category or merged[0].category, gone)
            for name in gone:
                self._skills.pop(name)
            return change
        skill = self._own(edit.name)
        self._touch(skill.name)
        self._skills.pop(skill.name)
        return Change("retire", skill.name, None, (skill.name,), edit.reason[:500])

    def _add(self, edit: AddEdit) -> Change:
        if edit.name in self._skills:
            return self._write("improve", edit.name, edit, edit.category)
        draft = parse_skill(render_skill(slug(edit.name, "skill"), edit.description, edit.body), edit.name, self._agent)
        near = nearest(draft, self._skills.values())
        if near is not None and near[1] >= SIMILAR:
            return self._write("improve", near[0].name, edit, near[0].category)
        own = sum(not skill.shared for skill in self._skills.values())
        if own >= self._limits.own_skills:
            raise SkillError(f"{self._agent} has {own} skills of its own, as many as it may; merge or retire some")
        return self._write("add", edit.name, edit, edit.category)

    def _write(
        self,
        action: str,
        name: str,
        edit: AddEdit | ImproveEdit | MergeEdit,
        category: str | None,
        retires: tuple[str, ...] = (),
    ) -> Change:
        known = self._skills.get(slug(name, "skill"))
        description = edit.description or (known.description if known else "")
        triggers = edit.triggers if edit.triggers is not None else (known.triggers if known else "")
        self._check_size("body", edit.body, self._limits.body)
        self._check_size("description", description, self._limits.description)
        self._check_size("triggers", triggers, self._limits.triggers)
        if found := objections("\n".join([name.replace("-", " "), description, triggers, category or "", edit.body])):
            raise SkillError("refused for safety: " + "; ".join(found))
        if known is not None and (known.body, known.description) == (edit.body.strip(), " ".join(description.split())):
            raise SkillError("changes nothing")
        metadata = {"triggers": " ".join(triggers.split())} if triggers.strip() else {}
        data = render_skill(name, description, edit.body, category, metadata | self._provenance)
        self._touch(name, *retires)
        self._skills[name] = parse_skill(data, name, self._agent)
        return Change(action, name, data, retires, edit.reason[:500])

    def _check_size(self, what: str, text: str, limit: int) -> None:
        if len(text) > limit:
            raise SkillError(f"{what} of {len(text):,} characters, more than {limit:,}")

    def _touch(self, *names: str) -> None:
        if twice := self._touched.intersection(names):
            raise SkillError(f"an earlier edit of the same round changes {', '.join(sorted(twice))} already")
        self._touched.update(names)

    def _known(self, name: str) -> Skill:
        skill = self._skills.get(name)
        if skill is None:
            raise SkillError(f"{self._agent} has no skill of that name")
        return skill

    def _own(self, name: str) -> Skill:
        skill = self._known(name)
        if skill.shared:
            raise SkillError("is a shared skill, which an agent may shadow but neither merge nor retire")
        return skill
