"""Secrets stay where they belong; files are their owner's; what listens, listens on loopback."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from metaclaw_trainer.auth import KeyRing, refuse_open_bind
from metaclaw_trainer.errors import KeyFileError

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.gateway.command import gateway_command
from metaclaw_plugin.settings import parse_settings
from metaclaw_plugin.supervisor.plan import console_launch, trainer_launch, worker_launch
from metaclaw_plugin.vllm_command import vllm_command
from tests.replay_upstream import Script
from tests.security.console_visits import session
from tests.security.house import UPSTREAM_KEY_HEADER, House, canary
from tests.security.tried import tried

pytestmark = pytest.mark.gateway

SHOWN_TO_NOBODY = {"internal.key", "console.key"}  # files that hold one key each, for their owner's eyes


@pytest.fixture(scope="module")
def used(house: House) -> dict[str, str]:
    """Every secret, each used in every way that it may be: rightly, wrongly, and in requests that fail."""
    mine = {"caller's upstream key": canary("caller-upstream"), "wrong key": "mc-" + canary("wrong")}
    mine["wrong key of a query"] = canary("query")
    house.upstream.scripts["broken"] = Script([b'{"error": {"message": "no"}}'], [b'{"error": {"message": "no"}}'], 500)
    house.upstream.scripts["cut"] = Script.recorded("text-stream", ending="abrupt")
    shown: list[str] = []
    with httpx.Client(base_url=house.gateway, timeout=60, verify=False) as client:
        for case in ("fresh", "fresh-stream", "broken", "cut"):
            for model in ("m", "cloud"):
                for key in (house.keys["own"], house.keys["revoked"], mine["wrong key"], house.keys["internal"]):
                    shown += _talk(client, key, model, case, mine["caller's upstream key"])
        for path in (
            "/metaclaw/v1/status",
            "/metaclaw/v1/traces",
            "/metaclaw/metrics",
            "/v1/models",
            "/health",
            "/settings",
        ):
            for who in ("own", "master", "internal"):
                shown.append(client.get(path, headers={"authorization": f"Bearer {house.keys[who]}"}).text)
        shown.append(client.get("/v1/models", params={"key": mine["wrong key of a query"]}).text)
    shown += _talk_to_the_others(house, mine["wrong key"])
    told = house.secrets | mine
    for text in shown:
        assert not [name for name, secret in told.items() if secret in text], text[:500]
    return told


def _talk(client: httpx.Client, key: str, model: str, case: str, upstream_key: str) -> list[str]:
    headers = {"authorization": f"Bearer {key}", UPSTREAM_KEY_HEADER: upstream_key}
    said = [{"role": "user", "content": f"case:{case}"}]
    stream = case in ("fresh-stream", "cut")
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": said},
        "/v1/messages": {"messages": said, "max_tokens": 9},
    }
    shown = []
    for path, body in bodies.items():
        try:
            answer = client.post(path, json={"model": model, "stream": stream, **body}, headers=headers)
            shown.append(f"{answer.headers} {answer.text}")
        except httpx.RemoteProtocolError:  # the upstream broke off in the middle of the answer
            assert case == "cut"
    return shown


def _talk_to_the_others(house: House, wrong: str) -> list[str]:
    shown = []
    for key in (*house.trainer_keys.values(), wrong):
        for path in ("/v1/agents", "/metrics", "/v1/hooks", "/nowhere"):
            shown.append(httpx.get(house.trainer + path, headers={"authorization": f"Bearer {key}"}, timeout=30).text)
    with httpx.Client(base_url=house.console, timeout=30, verify=False) as client:
        for key in (house.owners["console"], wrong):
            shown.append(client.post("/sign-in", data={"key": key}).text)
        client.cookies.clear()
        cookie = session(client, house, "proxy_admin")
        page = client.get("/", headers=cookie).text
        token = page.split('"X-CSRF-Token": "')[1].split('"')[0]
        shown += [page, client.get("/health", headers=cookie).text, client.get("/agents/alpha", headers=cookie).text]
        shown.append(client.post("/health", headers={**cookie, "x-csrf-token": token, "origin": house.console}).text)
    return shown


def _metaclaw(house: House, *arguments: str) -> str:
    command = [sys.executable, "-m", "metaclaw_plugin.cli.main", *arguments, "--config", str(house.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def _found(secrets: dict[str, str], data: bytes) -> list[str]:
    return [name for name, secret in secrets.items() if secret.encode() in data]


def test_no_secret_is_in_a_file_a_log_or_a_list_of_processes(house: House, used: dict[str, str]) -> None:
    """Traces lie compressed in the store; what they hold is searched as `metaclaw traces export` writes it, below."""
    looked = 0
    files = [path for path in house.folder.rglob("*") if path.is_file() and path.name not in SHOWN_TO_NOBODY]
    for path in files:
        if path == house.config:  # the owner wrote them there
            continue
        assert not _found(used, path.read_bytes()), path
        looked += 1
    for process in psutil.process_iter(["cmdline"]):
        line = "\x00".join(process.info["cmdline"] or ()).encode("utf-8", "surrogateescape")
        assert not _found(used, line)
        looked += 1
    assert looked > 30
    tried("files, logs and command lines searched for every secret", looked)


def test_the_upstream_got_the_keys_that_were_meant_for_it(house: House, used: dict[str, str]) -> None:
    sent = {headers.get("authorization", "") for headers in house.upstream.headers}
    own = used["caller's upstream key"]
    assert f"Bearer {own}" in sent
    for headers in house.upstream.headers:
        assert UPSTREAM_KEY_HEADER not in headers
        text = json.dumps(dict(headers))
        assert not [
            name for name, secret in used.items() if secret in text and "upstream" not in name and name != "vllm"
        ]


def test_no_secret_is_in_what_commands_print_or_write(house: House, used: dict[str, str], tmp_path: Path) -> None:
    said = [
        _metaclaw(house, *words) for words in (("status", "--json"), ("agents", "list"), ("doctor",), ("hooks", "list"))
    ]
    said.append(_metaclaw(house, "traces", "export", "--agent", "alpha"))
    archive = tmp_path / "backup.tar.gz"
    said.append(_metaclaw(house, "backup", str(archive)))
    tried("outputs of commands searched for every secret", len(said))
    for text in said:
        assert not _found(used, text.encode()), text[:500]
    assert "case:fresh" in said[4]
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None and Path(member.name).name not in SHOWN_TO_NOBODY:
                assert not _found(used, stream.read()), member.name


def test_no_key_is_an_argument_of_a_process(house: House) -> None:
    launches = [worker_launch, console_launch, trainer_launch]
    lines = [make(house.settings, house.config).argv for make in launches]
    lines += [vllm_command(house.settings, cpu=True).argv, tuple(gateway_command(house.settings, house.config)[0])]
    for line in lines:
        assert not _found(house.secrets, " ".join(line).encode()), line


def test_a_home_is_its_owners_alone(house: House, used: dict[str, str]) -> None:
    """Folders of a home may be listed by others only below one that may not; what holds secrets is closed by itself."""
    assert stat.S_IMODE(house.home.stat().st_mode) == 0o700
    closed = {"internal.key", "console.key", "keys.json", "metaclaw.db", "queue.db", "metaclaw.db-wal", "queue.db-wal"}
    seen = set()
    for path in house.home.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert not mode & 0o022, f"{path} can be written by others: {mode:o}"
        assert not mode & 0o7000, path
        if path.name in closed:
            seen.add(path.name)
            assert mode == 0o600, f"{path}: {mode:o}"
        if path == house.home / "trainer":
            assert mode == 0o700
        assert path.lstat().st_uid == os.getuid()
    assert {"internal.key", "keys.json", "metaclaw.db", "queue.db"} <= seen
    tried("files of a home whose rights were looked at", len(list(house.home.rglob("*"))))


def test_everything_listens_on_loopback_and_where_it_is_said(house: House) -> None:
    settings = house.settings
    said = {"gateway": {settings.gateway.port}, "console": {settings.console.port}, "worker": set()}
    said["trainer"] = {int(house.trainer.rpartition(":")[2])}
    for name, process in house.processes.items():
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [c for one in tree for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.port for c in listening} == said[name], name
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}, name
        tried("processes whose ports were looked at")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_trainer_and_vllm_refuse_to_listen_wider_without_a_key(tmp_path: Path, tiny_model: Path, host: str) -> None:
    with pytest.raises(KeyFileError, match="without a key"):
        refuse_open_bind(host, KeyRing(tmp_path / "keys.json"))
    section = {"home": str(tmp_path), "base_model": str(tiny_model), "vllm": {"host": host}}
    with pytest.raises(ConfigError, match="without a key"):
        vllm_command(parse_settings(section, "test"), cpu=True)
    tried("hosts that want a key first", 2)
