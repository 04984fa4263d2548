"""LiteLLM's database mode for tests: virtual keys, users, teams, sign-in to its admin UI.

LiteLLM talks to PostgreSQL through Prisma, whose native engine is downloaded from a server of Prisma's. Where that
server is out of reach, ``query_engine.js`` beside this file takes the engine's place (its npm packages come from the
registry). It is made once, below ``.cache/``:

    python -m tests.litellm_db.database_mode          says what is missing, or sets it up
    with running_database() as env:                   a fresh PostgreSQL with LiteLLM's tables
        start_gateway(..., env=env | {"LITELLM_MASTER_KEY": ...})

A config for it has no ``custom_auth``. For the admin UI set ``UI_USERNAME``, ``UI_PASSWORD`` and ``LITELLM_SALT_KEY``
as well. Users have the native engine and need none of this.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.postgres_server import create_database, program, running_postgres

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent.parent / ".cache" / "litellm_db"
_PYTHON = ("prisma==0.11.0", "nodeenv==1.9.1")  # what litellm[proxy] leaves to its users; nodeenv is only imported
_ENGINE = "393aa359c9ad4a4bb28630fb5613f9c281cde053"  # of Prisma 5.17.0
_BUILD_TIME = 240.0  # seconds; 15 on a quiet machine


class CannotBuildError(Exception):
    """This machine cannot have the database mode; the message says why."""


def build() -> Path:
    """The folder with all that is needed, made if it is not there.

    Raises:
        CannotBuildError: without Node or a package registry.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs may begin at once
        ready = BUILT / "ready"
        if not ready.exists():
            _build()
            ready.touch()
    return BUILT


@contextmanager
def running_database() -> Iterator[dict[str, str]]:
    """A PostgreSQL with LiteLLM's tables; yields what the environment of LiteLLM must hold besides.

    Raises:
        CannotBuildError: without Node or a package registry.
    """
    build()
    with running_postgres() as server:
        url = create_database(server, "litellm")
        migrations = sorted((_package("litellm_proxy_extras") / "migrations").glob("*/migration.sql"))
        files = [argument for path in migrations for argument in ("-f", str(path))]
        _run([str(program("psql")), "-q", "-X", "-v", "ON_ERROR_STOP=1", "-d", url, *files])
        yield _environment() | {"DATABASE_URL": url, "STORE_MODEL_IN_DB": "True", "DISABLE_SCHEMA_UPDATE": "true"}


def _build() -> None:
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            raise CannotBuildError(f"LiteLLM's database mode needs {name}, which is not on PATH")
    shutil.copy(HERE / "package.json", BUILT)
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    _run(["npm", "install", *quiet], cwd=BUILT)
    _run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", "python", *_PYTHON], BUILT
    )
    schema = _package("litellm") / "proxy" / "schema.prisma"
    _run([sys.executable, "-m", "prisma", "generate", f"--schema={schema}"], cwd=BUILT)


def _environment() -> dict[str, str]:
    engine, schema_engine = HERE / "query_engine.js", HERE / "schema_engine.sh"
    paths = [str(BUILT / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        "PATH": f"{BUILT / 'python' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PRISMA_NODE_MODULES": str(BUILT / "node_modules"),
        "PRISMA_BINARY_CACHE_DIR": str(BUILT),  # where the Python client looks for the npm package
        "PRISMA_VERSION": "5.17.0",
        "PRISMA_EXPECTED_ENGINE_VERSION": _ENGINE,
        "PRISMA_QUERY_ENGINE_BINARY": str(engine),
        "PRISMA_SCHEMA_ENGINE_BINARY": str(schema_engine),
        "PRISMA_ENGINES_CHECKSUM_IGNORE_MISSING": "1",
        "PRISMA_HIDE_UPDATE_MESSAGE": "1",
        "CHECKPOINT_DISABLE": "1",  # Prisma asks for updates otherwise
    }


def _run(command: list[str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | _environment(), capture_output=True, text=True, timeout=_BUILD_TIME
        )
    except subprocess.TimeoutExpired as error:
        raise CannotBuildError(f"`{' '.join(command[:3])}` took more than {_BUILD_TIME:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-400:]
        raise CannotBuildError(f"`{' '.join(command[:3])}` failed: {said}")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


if __name__ == "__main__":
    try:
        print(f"LiteLLM's database mode is ready in {build()}")
    except CannotBuildError as error:
        sys.exit(str(error))
