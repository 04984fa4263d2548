"""What is wrong with a config file, in words: where it stands, what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

ROOT = "metaclaw"  # our section's name in the file


def explain(error: ValidationError, settings: type[BaseModel], file: Path | None = None) -> str:
    """All that ``error`` found, in one line. ``file``: where the section was read from, for line and column."""
    return "; ".join(_one(item["loc"], item["type"], item["msg"], settings, file) for item in error.errors())


def _one(location: tuple[int | str, ...], kind: str, message: str, settings: type[BaseModel], file: Path | None) -> str:
    name = ".".join(str(part) for part in (ROOT, *location))
    where = _position(file, location, kind == "extra_forbidden") if file is not None else ""
    if kind != "extra_forbidden":
        return f"{where}setting {name}: {message}"
    section = _section(settings, location[:-1])
    if section is None:
        return f"{where}unknown setting {name}"
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(section.model_fields)}"
    return f"{where}unknown setting {name}{hint}"


def _section(settings: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The class of the section at ``location``, also where it is optional."""
    section = settings
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:
            return None
        options = [field.annotation, *get_args(field.annotation)]
        inner = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
        if inner is None:
            return None
        section = inner
    return section


def _position(file: Path, location: tuple[int | str, ...], of_key: bool) -> str:
    """``line 3, column 5: `` of a setting's value, or of its name; empty if it does not stand in the file."""
    try:
        node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return ""
    mark = None
    for part in (ROOT, *location):
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            key, node = found
            mark = key.start_mark if of_key else node.start_mark
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        else:
            break
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
