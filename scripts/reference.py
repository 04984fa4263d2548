"""The configuration reference, written from the settings classes: ``python scripts/reference.py [--check]``."""

from __future__ import annotations

import argparse
import enum
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from metaclaw_trainer.settings import TrainerSettings
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from metaclaw_plugin.settings import Settings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/reference.py from the settings classes; `make docs` writes it anew, and a test compares. -->

There is one file: LiteLLM's config, with our settings in its top-level section `metaclaw:`, which LiteLLM leaves alone.
It is found by `--config FILE`, else by the variable `METACLAW_CONFIG`, else it is `litellm_config.yaml` in
`METACLAW_HOME` (default `~/.metaclaw`). `metaclaw setup` writes it; the repository's
[`litellm_config.yaml`](../litellm_config.yaml) is a commented start. Unknown names and wrong types are refused at
start, with line, column and the nearest right name. After an edit: `metaclaw restart`.

Where a value is a secret, `os.environ/NAME` reads it from the variable `NAME`.

The trainer reads its own section `metaclaw.trainer` and takes `base_model`, `home` and the address of vLLM from
`metaclaw` unless it says otherwise. The seed's `rl: {backend: remote, remote_url, remote_api_key}` works as it stands.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_section("metaclaw", Settings), *_section("metaclaw.trainer", TrainerSettings)]
    return "\n".join(parts)


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    plain, inner = [], []
    for field_name, field in model.model_fields.items():
        section = _inner(field)
        if section is not None:
            inner.append((field_name, section))
        elif name != "metaclaw" or field_name != "trainer":
            plain.append((field_name, field))
    yield f"## `{name}`\n\n{_first_line(model)}\n"
    if plain:
        yield "| setting | type | default | meaning |\n|---|---|---|---|"
        for field_name, field in plain:
            described = _cell(field.description or "")
            yield f"| `{field_name}` | {_cell(_type(field))} | {_cell(_default(field))} | {described} |"
        yield ""
    for field_name, section in inner:
        yield from _section(f"{name}.{field_name}", section)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    for option in (field.annotation, *get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _first_line(model: type[BaseModel]) -> str:
    return re.sub(r"``", "`", (model.__doc__ or "").strip().splitlines()[0])


def _type(field: FieldInfo) -> str:
    bounds = []
    for limit in field.metadata:
        for sign, attribute in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
            if (value := getattr(limit, attribute, None)) is not None:
                bounds.append(f"{sign} {value:g}")
    return _type_name(field.annotation) + (f" ({', '.join(bounds)})" if bounds else "")


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if origin in (list, tuple, dict):
        inner = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
        return {list: "list of ", tuple: "", dict: "map of "}[origin] + (" and ".join(dict.fromkeys(inner)))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    names = {str: "text", int: "whole number", float: "number", bool: "yes or no", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.default is not PydanticUndefined:
        value = field.default
    elif field.default_factory is not None and field.annotation is not Path:
        value = field.default_factory()  # type: ignore[call-arg]
    else:
        return "see there"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, list | tuple | dict) and not value:
        return "empty"
    if isinstance(value, list | tuple):
        return "`" + ", ".join(str(item) for item in value) + "`"
    return f"`{value}`" if value != "" else "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md from the settings classes.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is not current")
    options = parser.parse_args()
    text = reference()
    if options.check:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            sys.stderr.write(f"{TARGET} is not current: make docs\n")
        return int(current != text)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
