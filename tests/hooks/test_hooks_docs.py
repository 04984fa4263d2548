"""docs/hooks.md names every hook with its literal signature, every setting and every command."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from metaclaw_hooks import hookspecs
from metaclaw_hooks.plugins import HOOKS
from pydantic import BaseModel

from metaclaw_plugin.cli.hooks import app as hooks_app
from metaclaw_plugin.cli.rewards import app as rewards_app
from metaclaw_plugin.gateway.runtime import HOOKS as GATEWAY_HOOKS
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.worker.wiring import WORKER_HOOKS

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
TRAINER = (ROOT / "trainer" / "metaclaw_trainer" / "process.py").read_text(encoding="utf-8")  # to import it takes torch
SPECS = ast.parse(inspect.getsource(hookspecs))


def section(title: str) -> str:
    """The text under a heading, up to the next of the same level."""
    level = re.search(rf"^(#+) {re.escape(title)}$", DOCS, re.M)
    assert level is not None, f"docs/hooks.md has no heading {title!r}"
    rest = DOCS[level.end() :]
    return re.split(rf"^{level[1]} ", rest, maxsplit=1, flags=re.M)[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_literal_signature_and_what_none_means(hook: str) -> None:
    definition = next(node for node in SPECS.body if isinstance(node, ast.FunctionDef) and node.name == hook)
    lines = inspect.getsource(hookspecs).splitlines()
    signature = " ".join(line.strip() for line in lines[definition.lineno - 1 : definition.body[0].lineno - 1])
    text = section(hook)
    assert signature in text
    returns = ast.unparse(definition.returns) if definition.returns else ""
    assert "`None`" in text or "returns is ignored" in text or (returns != "None" and "None" in text)


def test_no_hook_is_documented_that_there_is_not() -> None:
    assert set(re.findall(r"^### ([a-z]+_[a-z_]+)$", DOCS, re.M)) == set(HOOKS)


def test_each_hook_stands_under_the_process_that_calls_it() -> None:
    [trainer] = [
        ast.literal_eval(node.value)
        for node in ast.parse(TRAINER).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TRAINER_HOOKS"
    ]
    for title, hooks in (("gateway", GATEWAY_HOOKS), ("worker", WORKER_HOOKS), ("trainer", trainer)):
        assert set(re.findall(r"^### ([a-z_]+)$", section(f"In the {title}"), re.M)) == set(hooks)


def _settings() -> list[tuple[str, str]]:
    found = []
    todo = [(f"metaclaw.{name}", Settings.model_fields[name].annotation) for name in ("hooks", "rewards", "worker")]
    while todo:
        path, model = todo.pop()
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                todo.append((f"{path}.{name}", field.annotation))
            else:
                found.append((path, name))
    return found


@pytest.mark.parametrize(("path", "name"), _settings())
def test_every_setting_is_listed(path: str, name: str) -> None:
    items = re.findall(r"^- `([a-z._]+)`: ((?:.|\n  )+)$", section("Settings"), re.M)
    listed = dict(items)
    assert f"`{name}`" in listed[path]


@pytest.mark.parametrize(
    "command",
    [
        *(f"hooks {command.name}" for command in hooks_app.registered_commands),
        *(
            f"rewards {command.name or command.callback.__name__}"
            for command in rewards_app.registered_commands
            if command.callback
        ),
    ],
)
def test_every_command_is_listed(command: str) -> None:
    assert f"`metaclaw {command}" in section("Commands")


def test_the_reward_in_the_docs_works(tmp_path: Path) -> None:
    from metaclaw_hooks.plugins import create_plugin_manager

    from tests.hook_nouns import make_session, make_trace

    code = re.search(r"```python\n(.*?)```", section("A reward in ten lines"), re.S)
    assert code is not None
    (tmp_path / "short.py").write_text(code[1], encoding="utf-8")
    plugins = create_plugin_manager(tmp_path, 5.0, packages=False)
    trace = make_trace(text="Yes.")
    [(name, reward)] = plugins.call_blocking("score_trace", trace=trace, next_trace=None, session=make_session(trace))
    assert (name, reward.value) == ("short", pytest.approx(1 - 1 / 40))
