"""Does what deploy/Dockerfile.gateway does, without a container engine: ``python -m scripts.check_image``.

Each stage gets a folder and an empty virtual environment; its COPY and pip lines are done there as they stand. Then
everything that is installed must be pinned in the lock, and the command line must work. It takes minutes and needs the
package index, so it is no part of the tests. What it does not try: the base image, users, volumes and the network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.check_sbom import pins

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile.gateway"
LOCK = ROOT / "deploy" / "gateway.lock"
BROUGHT = {"pip", "setuptools"}  # by the virtual environment, as by the base image
COMMANDS = ("--version", "agents add one", "agents list")


def run(command: str, folder: Path) -> str:
    """Run in a stage's folder, with its environment's commands first; what it said."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "METACLAW"))}
    env |= {"PATH": f"{folder}/venv/bin:/usr/bin:/bin", "METACLAW_HOME": str(folder / "home"), "HOME": str(folder)}
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"`{command}` ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def build(dockerfile: Path, folder: Path) -> Path:
    """The folder of the last stage, once all COPY and pip lines are done."""
    stages: dict[str, Path] = {}
    here = folder
    for line in re.sub(r"\\\n", " ", dockerfile.read_text(encoding="utf-8")).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            here = folder / str(len(stages))
            stages[rest.partition(" AS ")[2] or "last"] = here
            here.mkdir()
            subprocess.run([sys.executable, "-m", "venv", str(here / "venv")], check=True)
        elif word == "COPY":
            copy(rest.split(), here, stages)
        elif word == "RUN" and rest.startswith("pip "):
            sys.stdout.write(f"{rest}\n")
            sys.stdout.flush()
            run(rest, here)
    return here


def copy(words: list[str], here: Path, stages: dict[str, Path]) -> None:
    """One COPY line; a path of another stage lies in its working directory."""
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
    *sources, target = words
    for source in sources:
        there = stages[stage] / source.removeprefix("/app/") if stage else ROOT / source
        to = here / target / there.name if target.endswith("/") else here / target
        if there.is_dir():
            shutil.copytree(there, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(there, to)


def unpinned(installed: str, lock: str) -> list[str]:
    """What ``pip list --format json`` names and the lock does not pin in that version; ours apart."""
    rows = [(re.sub(r"[-_.]+", "-", one["name"]).lower(), one["version"]) for one in json.loads(installed)]
    known = pins(lock)
    return [f"{name} {version}" for name, version in rows
            if (name, version) not in known and name not in {*BROUGHT, "metaclaw-plugin"}]  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = build(DOCKERFILE, Path(temporary))
        installed = run("pip list --format json --disable-pip-version-check", folder)
        extra = unpinned(installed, LOCK.read_text(encoding="utf-8"))
        for one in extra:
            sys.stderr.write(f"{one} is installed and {LOCK.name} does not pin it: make lock\n")
        for words in COMMANDS:
            run(f"metaclaw {words}", folder)
        count = len(json.loads(installed))
        if not extra:
            sys.stdout.write(
                f"{count} packages are installed, each but {', '.join(sorted(BROUGHT))} and ours as locked\n"
            )
    return 1 if extra else 0


if __name__ == "__main__":
    sys.exit(main())
