"""The skill library: look, search, edit, retire, and answer proposals."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import slug

from metaclaw_plugin.console.access import Acting, Action, Looking
from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.pages import back, fragment, page
from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.editing import Proposal, SkillFolder
from metaclaw_plugin.skills.evolution import accept_proposal
from metaclaw_plugin.skills.ledger import read_ledger
from metaclaw_plugin.skills.safety import objections
from metaclaw_plugin.skills.skill_file import SHARED, Skill, parse_skill, render_skill
from metaclaw_plugin.store.agents import get_record, list_agents

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/skills")

PAGE = 50

Owner = Annotated[str, Path(max_length=63)]
Name = Annotated[str, Path(max_length=63)]


@dataclass(frozen=True, slots=True)
class Draft:
    """A skill as it stands in the form."""

    name: str
    description: str
    body: str
    category: str
    triggers: str

    @classmethod
    def of(cls, action: Action, name: str) -> Draft:
        texts = (action.text(field).replace("\r\n", "\n") for field in ("description", "body", "category", "triggers"))
        return cls(name, *texts)

    def render(self, kept: dict[str, str]) -> bytes:
        """Its file; ``kept`` is the metadata that the form does not show."""
        metadata = kept | ({"triggers": self.triggers} if self.triggers else {})
        return render_skill(self.name, self.description, self.body, self.category or None, metadata)


@router.get("", name="skills")
def skills(
    request: Request,
    visitor: Looking,
    owner: Annotated[str, Query(max_length=63)] = "",
    q: Annotated[str, Query(max_length=200)] = "",
    start: Annotated[int, Query(ge=0, le=10**6)] = 0,
) -> Response:
    house = house_of(request)
    with house.reading() as c:
        agents = [record.name for record in list_agents(c)]
    library = house.library
    owners = [SHARED, *agents]
    wanted = [owner] if owner in owners else owners
    found = [skill for name in wanted for skill in library.skills_of(name).values() if matches(skill, q)]
    values: dict[str, Any] = {
        "skills": found[start : start + PAGE],
        "total": len(found),
        "start": start,
        "size": PAGE,
        "owner": owner,
        "q": q,
    }
    if request.headers.get("hx-request"):
        return HTMLResponse(fragment("skills_found.html", values))
    proposals = [proposal for name in agents for proposal in _folder(house, name).proposals()][:20]
    return page(
        request,
        "skills.html",
        visitor=visitor,
        owners=owners,
        problems=library.problems()[:20],
        proposals=[(proposal, _diff(house, proposal)) for proposal in proposals],
        **values,
    )


def matches(skill: Skill, words: str) -> bool:
    """Whether every word stands somewhere in the skill."""
    text = f"{skill.name} {skill.description} {skill.category or ''} {skill.triggers} {skill.body}".lower()
    return all(word in text for word in words.lower().split())


@router.get("/{owner}/{name}")
def skill(request: Request, owner: Owner, name: Name, visitor: Looking) -> Response:
    house = house_of(request)
    found = _find(house, owner, name)
    with house.reading() as c:
        agents = [record.name for record in list_agents(c)] if owner == SHARED else [owner]
        measured = [(agent, read_ledger(c, agent).get(name)) for agent in agents[:100]]
    return page(
        request,
        "skill.html",
        visitor=visitor,
        skill=found,
        measured=[(agent, entry.summary) for agent, entry in measured if entry is not None],
        hidden={key: value for key, value in found.metadata.items() if key != "triggers"},
    )


@router.get("/{owner}")
def new_skill(request: Request, owner: Owner, visitor: Looking) -> Response:
    """The form for one more skill."""
    _known_owner(house_of(request), owner)
    return page(request, "new_skill.html", visitor=visitor, owner=owner)


@router.post("/{owner}/preview")
def preview(owner: Owner, action: Acting) -> Response:
    """What is wrong with the draft, and what the model would be shown."""
    draft = Draft.of(action, action.text("name"))
    values: dict[str, object] = {"problem": None, "skill": None, "objections": []}
    try:
        made = parse_skill(draft.render({}), slug(draft.name, "skill"), owner)
        values |= {"skill": made, "objections": objections(made.text)}
    except (SkillError, InvalidNameError) as error:
        values["problem"] = str(error)
    return HTMLResponse(fragment("skill_preview.html", values))


@router.post("/{owner}")
def add(request: Request, owner: Owner, action: Acting) -> Response:
    house = house_of(request)
    folder = _folder(house, _known_owner(house, owner))
    name = slug(action.text("name"), "skill")
    if folder.path(name).exists():
        raise SkillError(f"{owner} has a skill {name!r} already: open that one to change it")
    made = folder.put(name, Draft.of(action, name).render({}))
    logger.info("console: skill %s of %s is added", name, owner)
    return back(request, f"/skills/{owner}/{name}", f"added; it is in use within a second, version {made.version}")


@router.post("/{owner}/{name}/save")
def save(request: Request, owner: Owner, name: Name, action: Acting) -> Response:
    house = house_of(request)
    before = _find(house, owner, name)
    if action.text("version") != before.version:
        raise SkillError(f"{owner}/{name} was changed by someone else meanwhile: load the page again, then edit")
    kept = {key: value for key, value in before.metadata.items() if key != "triggers"}
    made = _folder(house, owner).put(name, Draft.of(action, name).render(kept))
    logger.info("console: skill %s of %s is changed", name, owner)
    return back(request, f"/skills/{owner}/{name}", f"saved; it is in use within a second, version {made.version}")


@router.post("/{owner}/{name}/retire")
def retire(request: Request, owner: Owner, name: Name, action: Acting) -> Response:
    del action
    house = house_of(request)
    _find(house, owner, name)
    moved = _folder(house, owner).take_out(name)
    logger.info("console: skill %s of %s is retired", name, owner)
    return back(request, "/skills", f"{name} is out of use; it lies in {moved.parent.name}/{moved.name}")


@router.post("/{owner}/proposals/{proposal}/{answer}")
def answer_proposal(
    request: Request, owner: Owner, proposal: Annotated[str, Path(max_length=80)], answer: str, action: Acting
) -> Response:
    del action
    house = house_of(request)
    folder = _folder(house, _known_owner(house, owner))
    found = folder.proposal(proposal)
    if answer == "accept":
        generation = accept_proposal(house.engine, folder, found)
        said = f"{found.change.action} {found.change.name}: done; {owner}'s skills are of generation {generation} now"
    elif answer == "reject":
        folder.reject(found)
        said = f"{found.change.action} {found.change.name}: turned down"
    else:
        raise SkillError(f"a proposal is accepted or rejected, not {answer[:40]!r}")
    logger.info("console: a proposal of %s: %s", owner, answer)
    return back(request, "/skills", said)


def _diff(house: House, proposal: Proposal) -> list[tuple[str, str]]:
    """Lines of the change, each with ``add``, ``del``, ``at`` or nothing for what it is."""
    old = house.library.view(proposal.agent).skills.get(proposal.change.name)
    before = _lines(old) if old is not None and old.owner == proposal.agent else []
    after = proposal.change.data.decode("utf-8", "replace").splitlines() if proposal.change.data is not None else []
    kinds = {"+": "add", "-": "del", "@": "at"}
    lines = list(difflib.unified_diff(before, after, lineterm="", n=3))[2:]
    return [(kinds.get(line[:1], ""), line) for line in lines[:400]]


def _lines(old: Skill) -> list[str]:
    return render_skill(old.name, old.description, old.body, old.category, old.metadata).decode().splitlines()


def _known_owner(house: House, owner: str) -> str:
    if owner != SHARED:
        with house.reading() as c:
            get_record(c, owner)
    return owner


def _folder(house: House, owner: str) -> SkillFolder:
    return SkillFolder(house.settings.skills_path, owner)


def _find(house: House, owner: str, name: str) -> Skill:
    found = _folder(house, owner).read(slug(name, "skill"))
    if found is None:
        raise SkillError(f"{owner} has no skill {name!r} of its own")
    return found
