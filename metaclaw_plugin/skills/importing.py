"""Skills from elsewhere: a folder in the Agent Skills format, checked before anything is copied.

Only ``SKILL.md`` is taken. What lies beside it (scripts, assets) is not: nothing here would run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.safety import find_hostile, find_secrets
from metaclaw_plugin.skills.skill_file import FILE_NAME, MAX_FILE, parse_skill

MAX_IMPORTED = 2_000  # skills


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one folder."""

    name: str
    state: str  # added, replaced, kept (there is one of that name) or refused
    notes: tuple[str, ...] = ()  # why refused; or what the owner should look at


def import_skills(source: Path, target: SkillFolder, replace: bool = False) -> list[Imported]:
    """Copy the skill in ``source``, or each skill in a folder of ``source``, to ``target``.

    A broken skill, a link, or one that holds a secret is refused by itself; wording that an evolved skill could not
    have is only noted, since here a person vouches for it.

    Raises:
        SkillError: if ``source`` is no folder or holds no skill.
    """
    if not source.is_dir():
        raise SkillError(f"{source} is no folder; give one that holds SKILL.md, or folders that do")
    if (source / FILE_NAME).exists():
        found = [source.resolve()]
    else:
        found = sorted(folder for folder in source.iterdir() if (folder / FILE_NAME).exists())
    if not found:
        raise SkillError(f"{source} holds no {FILE_NAME}, nor does any folder in it")
    if len(found) > MAX_IMPORTED:
        raise SkillError(f"{source} holds {len(found):,} skills, more than {MAX_IMPORTED:,}; import them in parts")
    return [_import(folder, source.resolve(), target, replace) for folder in found]


def _import(folder: Path, source: Path, target: SkillFolder, replace: bool) -> Imported:
    try:
        path = (folder / FILE_NAME).resolve()
        if not path.is_relative_to(source):
            raise SkillError("is a link out of the imported folder")
        if not path.is_file() or path.stat().st_size > MAX_FILE:
            raise SkillError(f"is no file of at most {MAX_FILE:,} bytes")
        data = path.read_bytes()
        skill = parse_skill(data, folder.name, target.owner)
        if secrets := find_secrets(data.decode()):
            raise SkillError(f"holds {', '.join(secrets)}; take that out first")
        there = target.path(skill.name).exists()
        if there and not replace:
            return Imported(skill.name, "kept", ("there is a skill of that name; --replace overwrites it",))
        target.put(skill.name, data)
    except (SkillError, OSError) as error:
        return Imported(folder.name, "refused", (str(error),))
    notes = tuple(f"look at this: {what}" for what in find_hostile(f"{skill.description}\n{skill.body}"))
    return Imported(skill.name, "replaced" if there else "added", notes)
