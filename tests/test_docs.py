"""What the documents say is so: commands and options, settings, links, snippets, the ten-line reward."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from metaclaw_hooks.plugins import create_plugin_manager
from pydantic import BaseModel

from metaclaw_plugin.cli.main import COMMANDS, app
from metaclaw_plugin.clients.openclaw import Connection, connect
from metaclaw_plugin.settings import Settings
from tests.hook_nouns import make_trace
from tests.source import parsed

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands_in(path: Path) -> Iterator[list[str]]:
    """Every `metaclaw ...` that the document shows: lines of console blocks, and code in a sentence."""
    text = text_of(path).replace("\\\n", " ")
    for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            found = re.match(r"\$ (metaclaw .*)", line.strip())
            if found:
                yield shlex.split(found[1], comments=True)
    for span in re.findall(r"(?<!`)`(metaclaw [^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield shlex.split(span.replace(" | ", " "))


def command_tree() -> Any:
    return typer.main.get_command(app)


ALL_COMMANDS = [(path.name, words) for path in DOCS for words in commands_in(path)]


def test_the_documents_show_commands_at_all() -> None:
    assert len(ALL_COMMANDS) > 40
    assert {"setup", "start", "status", "connect"} <= {words[1] for _, words in ALL_COMMANDS}


@pytest.mark.parametrize(
    ("where", "words"), ALL_COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_command_and_option_in_the_documents_exists(where: str, words: list[str]) -> None:
    node = command_tree()
    for word in words[1:]:
        if word.startswith("-"):
            name = word.split("=")[0]
            known = {option for parameter in node.params for option in getattr(parameter, "opts", [])}
            assert name in known or name == "--help", f"{where}: {' '.join(words)} has no {name}"
        elif hasattr(node, "get_command"):
            inner = node.get_command(None, word)
            if inner is None and word.isupper():
                return  # a placeholder, such as X
            assert inner is not None, f"{where}: no command {' '.join(words)}"
            node = inner


def test_every_command_is_in_the_documents() -> None:
    shown = {words[1] for _, words in ALL_COMMANDS if len(words) > 1}
    assert set(COMMANDS) - shown == set()


def test_the_configuration_reference_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def sections(model: type[BaseModel], name: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield name, model
    for field_name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{name}.{field_name}")


@pytest.mark.parametrize(("name", "section"), list(sections(Settings, "metaclaw")))
def test_every_setting_says_what_it_does(name: str, section: type[BaseModel]) -> None:
    assert section.__doc__
    for field_name, field in section.model_fields.items():
        inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert inner or field.description, f"{name}.{field_name} has no description"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_settings_that_a_document_names_exist(path: Path) -> None:
    known = {name for name, _ in sections(Settings, "metaclaw")}
    known |= {f"{name}.{field}" for name, section in sections(Settings, "metaclaw") for field in section.model_fields}
    from metaclaw_trainer.settings import TrainerSettings

    known |= {f"metaclaw.trainer.{field}" for field in TrainerSettings.model_fields}
    named = set(re.findall(r"`(metaclaw(?:\.[a-z_]+)+)", text_of(path)))
    assert named - known - {"metaclaw.db"} == set()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(path)):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_snippets_parse(path: Path) -> None:
    if path.name == "hooks.md":  # shows signatures; its own test holds them against the specs
        return
    for language, block in re.findall(r"```(python|json|yaml)\n(.*?)```", text_of(path), re.DOTALL):
        {"python": parsed, "json": json.loads, "yaml": yaml.safe_load}[language](block)


def test_the_readmes_openclaw_entry_is_the_one_that_connect_writes() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
    shown = json.loads(block)
    written, _ = connect({}, [Connection("main", "http://127.0.0.1:4000", "mc-...", 32768, 8192)])
    assert shown["models"] == written["models"]


async def test_the_readmes_reward_works_as_a_file_dropped_into_the_hooks_folder(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
    (reward,) = [block for block in blocks if "def score_trace" in block]
    (tmp_path / "brief.py").write_text(reward)
    plugins = create_plugin_manager(tmp_path, packages=False)
    try:
        for words, expected in ((3, 1.0), (100, -1.0)):
            trace = make_trace(response={"role": "assistant", "content": "word " * words})
            opinions = await plugins.call("score_trace", trace=trace, next_trace=None, session=None)
            assert [opinion.value for _, opinion in opinions] == [expected]
    finally:
        plugins.close()
