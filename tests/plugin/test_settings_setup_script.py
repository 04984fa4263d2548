"""`make setup`: each thing in the way gets one line and a remedy, and a second run does nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "setup.py"


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_python_that_is_too_old_is_named_with_the_remedy(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 1))
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 or newer is needed, .* make PYTHON="):
        setup.check_python()


def test_the_script_is_understood_by_pythons_that_it_refuses() -> None:
    """Else they would tell of a syntax error instead of the version."""
    import ast

    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 7))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run("--venv", str(tmp_path / "venv"), "--needed-gib", "1e9")
    assert done.returncode == 1
    assert done.stderr.startswith("setup: ")
    assert "GiB are needed; free some, or: make VENV=" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--venv", str(tmp_path / "file" / "venv"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "setup: " in done.stderr


def test_a_second_run_does_nothing(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / setup.STAMP).write_text(setup.fingerprint() + "\n")
    before = sorted(tmp_path.iterdir())
    done = run("--venv", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(tmp_path.iterdir()) == before


def test_changed_requirements_set_up_again(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / setup.STAMP).write_text("of another time\n")
    assert not setup.is_done(tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "set PIP_EXTRA_INDEX_URL to PyTorch's CPU"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying after NewConnectionError: Temporary failure", "the package index cannot be reached"),
        ("x\nERROR: something of its own\n", "ERROR: something of its own"),
        ("", "a command failed without a word"),
    ],
)
def test_what_pip_says_becomes_one_line(setup: ModuleType, said: str, expected: str) -> None:
    line = setup.explain(said.splitlines())
    assert expected in line
    assert "\n" not in line


def test_no_registry_host_is_written_down() -> None:
    for name in ("scripts/setup.py", "Makefile", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "index-url" not in text.replace("PIP_EXTRA_INDEX_URL", "")
        assert "://" not in text
