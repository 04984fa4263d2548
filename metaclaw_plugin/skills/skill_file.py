"""One skill: a folder with a ``SKILL.md``, in the Agent Skills format.

    ---
    name: cite-sources          # a slug, the folder's own name
    description: When facts are asked for, say where each comes from.
    category: research          # optional
    metadata:                   # optional, text to text
      triggers: sources, is it true that   # words and phrases for retrieval, which the model never sees
    ---
    Markdown body.

What is read is checked here and nowhere else; a ``Skill`` in hand is valid.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import slug
from metaclaw_hooks.types import SkillRef

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.query import BLOCK_OPEN

FILE_NAME = "SKILL.md"
SHARED = "_shared"  # owner of the skills that every agent has

MAX_FILE = 65_536  # bytes
MAX_FRONT = 8_192  # bytes
MAX_DESCRIPTION = 1_024  # characters, as the format says
MAX_METADATA = 32  # entries

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MARK = re.compile(rf"<\s*(?:/\s*)?{BLOCK_OPEN.strip('<>')}", re.IGNORECASE)  # what ends or opens the injected block
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed: they steer terminals, not readers


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill as it stands on disk."""

    name: str  # slug
    description: str
    body: str  # Markdown
    owner: str  # an agent, or SHARED
    version: str  # first 12 hex digits of the sha256 of the file
    category: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        return self.owner == SHARED

    @property
    def ref(self) -> SkillRef:
        return SkillRef(self.name, self.version, self.shared)

    @property
    def triggers(self) -> str:
        """Words and phrases that call for this skill; read by retrieval alone."""
        return self.metadata.get("triggers", "")

    @property
    def text(self) -> str:
        """What is injected."""
        return f"## {self.name}\n{self.description}\n\n{self.body}".strip()

    @property
    def tokens(self) -> int:
        """About how many tokens it costs: four characters each, no tokenizer at hand."""
        return -(-len(self.text) // 4)


def parse_skill(data: bytes, folder: str, owner: str) -> Skill:
    """Read a ``SKILL.md`` found in ``folder`` (its name alone), of ``owner``.

    Raises:
        SkillError: naming what is wrong and how it should be.
    """
    if len(data) > MAX_FILE:
        raise SkillError(f"{len(data):,} bytes, more than the {MAX_FILE:,} that a skill may have; split it")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SkillError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    front, body = _split(text)
    name = _name(front, folder)
    description = _line(front, "description", MAX_DESCRIPTION)
    if not description:
        raise SkillError("the front matter has no description; say in one sentence when the skill applies")
    if not body:
        raise SkillError("nothing under the front matter; the body says what to do")
    skill = Skill(
        name=name,
        description=description,
        body=body,
        owner=owner,
        version=hashlib.sha256(data).hexdigest()[:12],
        category=_line(front, "category", 64) or None,
        metadata=_metadata(front.get("metadata")),
    )
    _check_text(skill, text)
    return skill


def _check_text(skill: Skill, raw: str) -> None:
    """Refuse what no text of a skill may hold, as it stands in the file and as YAML's escapes make it."""
    parts = (raw, skill.description, skill.category or "", *skill.metadata, *skill.metadata.values())
    for part in parts:
        if found := _MARK.search(part):
            raise SkillError(f"holds {found[0]!r}, the mark of the injected block; take it out")
        if found := _CONTROL.search(part):
            raise SkillError(f"holds the control character U+{ord(found[0]):04X}; save it as plain text")


def render_skill(
    name: str, description: str, body: str, category: str | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a ``SKILL.md`` with these parts, already checked by reading them back.

    Raises:
        SkillError: if the parts make no valid skill.
    """
    front: dict[str, Any] = {"name": name, "description": " ".join(description.split())}
    if category:
        front["category"] = category
    if metadata:
        front["metadata"] = dict(metadata)
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    data = f"---\n{head}---\n\n{body.strip()}\n".encode()
    parse_skill(data, name, SHARED)
    return data


def write_atomic(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` whole or not at all; a reader never sees half a file.

    Raises:
        SkillError: if the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SkillError(f"cannot write {path}: {error.strerror}; is the disk full, the folder yours?") from error


def _split(text: str) -> tuple[dict[str, Any], str]:
    if not text.startswith("---\n"):
        raise SkillError("does not start with front matter: a line '---', YAML, another line '---', then the body")
    end = text.find("\n---", 3)
    if end < 0 or (len(text) > end + 4 and text[end + 4] != "\n"):
        raise SkillError("the front matter is not closed by a line '---'")
    head = text[4 : end + 1]
    if len(head.encode()) > MAX_FRONT:
        raise SkillError(f"front matter of more than {MAX_FRONT:,} bytes; the body is the place for text")
    try:
        _refuse_aliases(head)
        front = yaml.load(head, Loader=_LOADER)  # a safe loader: plain data and nothing else
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 2})" if mark else ""
        cause = getattr(error, "problem", None) or error
        raise SkillError(f"front matter is not valid YAML{where}: {cause}") from error
    if not isinstance(front, dict):
        raise SkillError("front matter is no YAML mapping; write lines such as 'name: my-skill'")
    return front, text[end + 4 :].strip()


def _refuse_aliases(head: str) -> None:
    """Raise ``YAMLError`` for ``*aliases``: a page of them, merged into one another, takes for ever to read."""
    if "*" in head and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(head, Loader=_LOADER)):
        raise yaml.YAMLError("aliases (*name) are not read here; write out what they stand for")


def _name(front: dict[str, Any], folder: str) -> str:
    name = front.get("name")
    if name is None:
        raise SkillError(f"the front matter has no name; write 'name: {folder}'")
    try:
        slug(name, "skill")
    except InvalidNameError as error:
        raise SkillError(str(error)) from error
    if name != folder:
        raise SkillError(f"is named {name!r} but lies in the folder {folder!r}; the two must be the same")
    return str(name)


def _line(front: dict[str, Any], key: str, limit: int) -> str:
    value = front.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SkillError(f"{key} is {type(value).__name__}, not text; put it in quotes")
    line = " ".join(value.split())
    if len(line) > limit:
        raise SkillError(f"{key} of {len(line):,} characters, more than {limit:,}; shorten it")
    return line


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise SkillError(f"metadata is no mapping of at most {MAX_METADATA} entries")
    result: dict[str, str] = {}
    for key, entry in value.items():
        if isinstance(entry, dict | list | set | tuple):
            raise SkillError(f"metadata {key!r} is a {type(entry).__name__}; values are plain text")
        result[str(key)] = "" if entry is None else str(entry)
    return result
