"""Changes to an owner's folder: written whole, taken out without being lost, and proposals that wait for a yes.

skills/<owner>/<name>/SKILL.md              in use
skills/<owner>/.retired/<name>.<version>/   taken out; move it back to undo
skills/<owner>/.proposed/<id>/              waits for `metaclaw skills review`
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metaclaw_hooks.names import slug

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.edits import Change
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, Skill, parse_skill, write_atomic

log = logging.getLogger(__name__)

RETIRED = ".retired"
PROPOSED = ".proposed"
REJECTED = ".rejected"
_PROPOSAL = "proposal.json"
_ID = re.compile(r"[a-z0-9-]{1,80}")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that waits for the owner's yes."""

    id: str
    agent: str
    change: Change
    round: str  # the evolution round that it came from


class SkillFolder:
    """One owner's folder in the library. All names are slugs before they become paths."""

    def __init__(self, root: Path, owner: str) -> None:
        self.owner = owner if owner == SHARED else slug(owner)
        self._path = root / self.owner

    def path(self, name: str) -> Path:
        """Where the skill ``name`` lies, or would lie."""
        return self._path / slug(name, "skill") / FILE_NAME

    def read(self, name: str) -> Skill | None:
        """The skill as it stands on disk; ``None`` if there is none.

        Raises:
            SkillError: if its file is broken.
        """
        try:
            data = self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SkillError(f"cannot read {self.path(name)}: {error.strerror}") from error
        return parse_skill(data, name, self.owner)

    def put(self, name: str, data: bytes) -> Skill:
        """Write ``data`` as the skill ``name``.

        Raises:
            SkillError: if it is no valid skill of that name, or the disk refuses.
        """
        skill = parse_skill(data, slug(name, "skill"), self.owner)
        if self._path.is_symlink() or self.path(name).parent.is_symlink():
            raise SkillError(f"{self.path(name).parent} is a link; nothing is written through it")
        write_atomic(self.path(name), data)
        return skill

    def take_out(self, name: str) -> Path:
        """Move the skill ``name`` to ``.retired``, where it can be had back from; returns where it went.

        Raises:
            SkillError: if it is not there, or the disk refuses.
        """
        source = self.path(name).parent
        if not source.is_dir() or source.is_symlink():
            raise SkillError(f"{self.owner} has no skill {name!r} of its own")
        target = self._path / RETIRED / f"{name}.{secrets.token_hex(3)}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        except OSError as error:
            raise SkillError(f"cannot move {source} to {target}: {error.strerror}") from error
        return target

    @property
    def is_there(self) -> bool:
        """Whether there is anything of this owner's: skills, retired ones or proposals."""
        return self._path.is_dir() and any(self._path.iterdir())

    def delete(self) -> None:
        """Delete all of it for good; a library that watches never sees half of it.

        Raises:
            SkillError: if the disk refuses.
        """
        doomed = self._path.parent / f".deleted-{self.owner}-{secrets.token_hex(3)}"
        try:
            if self._path.is_symlink():
                self._path.unlink()  # what a link points to is not ours
                return
            self._path.rename(doomed)
            shutil.rmtree(doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            raise SkillError(f"cannot delete {self._path}: {error.strerror}") from error

    @contextmanager
    def applied(self, changes: Sequence[Change]) -> Iterator[None]:
        """Carry out ``changes``; if the block raises, everything is put back as it was.

        Raises:
            SkillError: if the disk refuses; nothing has changed then.
        """
        undo: list[tuple[Path, bytes | None]] = []  # files and what they held
        moved: list[tuple[Path, Path]] = []
        try:
            for change in changes:
                for name in change.retires:
                    if self.path(name).exists():
                        moved.append((self.path(name).parent, self.take_out(name)))
                if change.data is not None:
                    path = self.path(change.name)
                    undo.append((path, path.read_bytes() if path.exists() else None))
                    self.put(change.name, change.data)
            yield
        except BaseException:
            for path, before in reversed(undo):
                if before is None:
                    shutil.rmtree(path.parent, ignore_errors=True)
                else:
                    write_atomic(path, before)
            for source, target in reversed(moved):
                target.rename(source)
            raise

    def propose(self, change: Change, round_id: str) -> Proposal:
        """Lay ``change`` down for review.

        Raises:
            SkillError: if the disk refuses.
        """
        proposal = Proposal(f"{change.name}-{secrets.token_hex(3)}", self.owner, change, round_id)
        folder = self._path / PROPOSED / proposal.id
        record = {
            "action": change.action,
            "name": change.name,
            "retires": list(change.retires),
            "reason": change.reason,
            "round": round_id,
        }
        if change.data is not None:
            write_atomic(folder / FILE_NAME, change.data)
        write_atomic(folder / _PROPOSAL, json.dumps(record, indent=1).encode())
        return proposal

    def proposals(self) -> list[Proposal]:
        """What waits for review; proposals whose files are broken are left out and logged."""
        found = []
        for record in sorted((self._path / PROPOSED).glob(f"*/{_PROPOSAL}")):
            try:
                found.append(self._read_proposal(record.parent))
            except SkillError as error:
                log.warning("skills: %s", error)
        return found

    def proposal(self, proposal_id: str) -> Proposal:
        """The proposal of that id.

        Raises:
            SkillError: if there is none, or its files are broken.
        """
        if _ID.fullmatch(proposal_id) is None or not (self._path / PROPOSED / proposal_id).is_dir():
            shown = f"`metaclaw skills review --agent {self.owner}` shows them"
            raise SkillError(f"{self.owner} has no proposal {proposal_id[:80]!r}; {shown}")
        return self._read_proposal(self._path / PROPOSED / proposal_id)

    def drop_proposal(self, proposal: Proposal) -> None:
        """Forget a proposal that was carried out."""
        shutil.rmtree(self._path / PROPOSED / proposal.id, ignore_errors=True)

    def reject(self, proposal: Proposal) -> None:
        """Put a proposal aside for good.

        Raises:
            SkillError: if the disk refuses.
        """
        target = self._path / REJECTED / proposal.id
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._path / PROPOSED / proposal.id).rename(target)
        except OSError as error:
            raise SkillError(f"cannot move the proposal to {target}: {error.strerror}") from error

    def was_proposed(self, change: Change) -> bool:
        """Whether the same kind of change to the same skill waits for review, or was rejected."""
        folders = [*(self._path / PROPOSED).glob("*"), *(self._path / REJECTED).glob("*")]
        known = (self._read_proposal(folder).change for folder in folders if (folder / _PROPOSAL).exists())
        return any((one.action, one.name) == (change.action, change.name) for one in known)

    def _read_proposal(self, folder: Path) -> Proposal:
        try:
            record = json.loads((folder / _PROPOSAL).read_text(encoding="utf-8"))
            name = slug(record["name"], "skill")
            retires = tuple(slug(gone, "skill") for gone in record["retires"])
            data = (folder / FILE_NAME).read_bytes() if (folder / FILE_NAME).exists() else None
            change = Change(str(record["action"]), name, data, retires, str(record["reason"]))
            round_id = str(record["round"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SkillError(f"the proposal in {folder} cannot be read: {error}") from error
        if data is not None:
            parse_skill(data, name, self.owner)
        return Proposal(folder.name, self.owner, change, round_id)
