"""The walls of the house, held up over every import of every module: who may know whom, and how big a room may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.source import parsed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "metaclaw_hooks": ROOT / "hooks" / "metaclaw_hooks",
    "metaclaw_plugin": ROOT / "metaclaw_plugin",
    "metaclaw_trainer": ROOT / "trainer" / "metaclaw_trainer",
}
MAX_FILE = 330  # lines; about 300 is meant
MAX_FUNCTION = 60  # lines; about 50 is meant
MAX_TABLES = 400  # lines of a file that only declares tables: the schema, and migrations, which are one long list
NO_ROOMS = {"helpers", "helper", "utils", "util", "common", "misc", "manager", "managers", "base", "core"}

# The callback and its neighbours: auth makes LiteLLM's identities, upstream its client, routes adds to its app.
LITELLM_KNOWN_TO = {
    "metaclaw_plugin.callback",
    "metaclaw_plugin.gateway.auth",
    "metaclaw_plugin.gateway.proxy_hooks",
    "metaclaw_plugin.gateway.routes",
    "metaclaw_plugin.gateway.upstream",
}
IN_VLLM = {"metaclaw_plugin.vllm_repair", "metaclaw_plugin.vllm_lora"}  # run in vLLM's processes
TRAINER_ONLY = {"torch", "peft", "transformers", "safetensors", "accelerate"}


@dataclass(frozen=True)
class Import:
    """``module`` imports ``target`` (dotted, absolute) in ``line``."""

    module: str
    target: str
    line: int

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all three packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import statement, at any depth, under TYPE_CHECKING too: a wall is a wall."""
    found: list[Import] = []
    for module, file in modules().items():
        for node in ast.walk(parsed(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += (Import(module, alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.append(Import(module, _absolute(module, file, node), node.lineno))
            elif isinstance(node, ast.Call) and _imports_by_name(node):
                found.append(Import(module, str(node.args[0].value), node.lineno))  # type: ignore[attr-defined]
    return tuple(found)


def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    parents = parts[: len(parts) - node.level + 1]
    return ".".join((*parents, node.module)) if node.module else ".".join(parents)


def _imports_by_name(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    literal = bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return name in ("import_module", "__import__") and literal


def _told(found: Iterator[Import]) -> list[str]:
    return [f"{item.module}:{item.line} imports {item.target}" for item in found]


def test_the_packages_are_all_seen() -> None:
    """Guards the other tests: a moved folder must not make them pass by looking at nothing."""
    for package in PACKAGES:
        assert sum(name.startswith(f"{package}.") for name in modules()) > 3
    assert any(item.target == "metaclaw_hooks.types" for item in imports())


def test_plugin_and_trainer_know_the_contract_and_never_each_other() -> None:
    ours = set(PACKAGES)
    allowed = {
        "metaclaw_hooks": {"metaclaw_hooks"},
        "metaclaw_plugin": {"metaclaw_plugin", "metaclaw_hooks"},
        "metaclaw_trainer": {"metaclaw_trainer", "metaclaw_hooks"},
    }
    assert _told(i for i in imports() if i.top in ours and i.top not in allowed[i.package]) == []


def test_no_file_of_tests_is_built_on_another() -> None:
    """What two of them need lives in a module of its own, so that a test can be moved without asking who else did."""
    files = [file for folder in ("tests", "benchmarks", "demo") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} imports from {node.module}"
        for file in files
        for node in ast.walk(parsed(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1].startswith("test_")
    ]
    assert found == []


def test_litellm_is_known_to_the_callback_and_its_neighbours_alone() -> None:
    assert _told(i for i in imports() if i.top == "litellm" and i.module not in LITELLM_KNOWN_TO) == []


def test_the_model_libraries_are_known_to_the_trainer_alone() -> None:
    """But for what vLLM, whose libraries they are as well, loads into its own processes."""
    found = (i for i in imports() if i.top in TRAINER_ONLY and i.module not in IN_VLLM)
    assert _told(i for i in found if i.package != "metaclaw_trainer") == []


def test_vllm_is_a_process_and_never_imported() -> None:
    """But for what vLLM loads into its own processes."""
    assert _told(i for i in imports() if i.top == "vllm" and i.module not in IN_VLLM) == []


def test_pluggy_is_known_to_the_contract_alone() -> None:
    assert _told(i for i in imports() if i.top == "pluggy" and i.package != "metaclaw_hooks") == []


def test_the_request_path_does_not_reach_into_the_worker_or_the_command_line() -> None:
    behind = ("metaclaw_plugin.worker", "metaclaw_plugin.cli", "metaclaw_plugin.supervisor")
    front = ("metaclaw_plugin.gateway", "metaclaw_plugin.capture", "metaclaw_plugin.callback")
    assert _told(i for i in imports() if i.module.startswith(front) and i.target.startswith(behind)) == []


def test_the_store_knows_nobody_above_it() -> None:
    above = ("metaclaw_plugin.gateway", "metaclaw_plugin.capture", "metaclaw_plugin.worker", "metaclaw_plugin.cli")
    assert (
        _told(i for i in imports() if i.module.startswith("metaclaw_plugin.store") and i.target.startswith(above)) == []
    )


@pytest.mark.parametrize("library", ["litellm", "sqlalchemy", "torch", "httpx", "rich"])
def test_commands_import_nothing_heavy_before_they_run(library: str) -> None:
    """At the top level of cli/ modules; inside a command it is imported when it is needed."""
    heavy = []
    for module, file in modules().items():
        if not module.startswith("metaclaw_plugin.cli.") or module.endswith("_display"):
            continue
        for node in parsed(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy += [f"{module}:{node.lineno}" for name in names if name.split(".")[0] == library]
    assert heavy == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_rooms_stay_small(module: str) -> None:
    text = modules()[module].read_text(encoding="utf-8")
    migration = ".migrations.versions." in module
    assert len(text.splitlines()) <= (MAX_TABLES if migration or module.endswith(".schema") else MAX_FILE)
    long = [
        f"{node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines"
        for node in ast.walk(parsed(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == [] or migration


def test_rooms_are_named_by_the_trade() -> None:
    assert [name for name in modules() if name.rsplit(".", 1)[-1] in NO_ROOMS] == []


def test_every_module_says_what_it_is_for() -> None:
    texts = {name: file.read_text(encoding="utf-8") for name, file in modules().items()}
    assert [name for name, text in texts.items() if text.strip() and not ast.get_docstring(parsed(text))] == []
