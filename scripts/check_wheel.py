"""Builds the wheel and tries it with each extra in an empty environment: ``python scripts/check_wheel.py [EXTRA ...]``.

It takes minutes and needs the package index, so it is no part of the tests. What each environment must have, and what
it must not, is the table below: a gateway needs no torch, a trainer no LiteLLM.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Extra -> (commands that must work, modules that must be there, modules that must not).
EXTRAS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "": (("--help", "--version", "status"), ("metaclaw_hooks",), ("litellm", "torch", "sqlalchemy")),
    "gateway": (("--version", "agents add one", "agents list"), ("litellm", "jinja2", "icalendar"), ("torch", "vllm")),
    "gateway,postgres": (("status",), ("litellm", "psycopg"), ("torch",)),
    "trainer": (("--version", "trainer --help"), ("torch", "transformers", "peft", "metaclaw_trainer"), ("litellm",)),
    "rl,evolve": (("--version",), ("torch", "litellm"), ("vllm",)),
}


def run(command: list[str], **more: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return str(done.stdout)


def check(extra: str, wheel: Path, folder: Path) -> str:
    """Install and try one extra; a line about it."""
    began = time.monotonic()
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            f"{wheel}[{extra}]" if extra else str(wheel),
        ]
    )
    run([python, "-m", "pip", "check"])
    commands, there, missing = EXTRAS[extra]
    env = {"PATH": "/usr/bin:/bin", "METACLAW_HOME": str(folder / "home"), "HOME": str(folder)}
    for words in commands:
        run([str(folder / "bin" / "metaclaw"), *words.split()], env=env)
    for module in there:
        run([python, "-c", f"import {module}"], env=env)
    for module in missing:
        run(
            [python, "-c", f"import importlib.util as u; raise SystemExit(u.find_spec('{module}') is not None)"],
            env=env,
        )
    return f"[{extra or 'bare'}] installs and works ({time.monotonic() - began:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the wheel and try it with each extra in an empty environment.")
    parser.add_argument("extras", nargs="*", help="such as '' gateway trainer; unset: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)])
        (wheel,) = folder.glob("*.whl")
        for number, extra in enumerate(options.extras or EXTRAS):
            sys.stdout.write(check(extra, wheel, folder / f"env{number}") + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
