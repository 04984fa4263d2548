"""Every name that a caller gives, with the tricks that turn names into paths. None leads anywhere."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from metaclaw_hooks.errors import InvalidNameError
from metaclaw_hooks.names import parse_version, slug

from metaclaw_plugin.backup import MANIFEST, STORE, back_up, restore
from metaclaw_plugin.errors import BackupError, MetaclawError
from metaclaw_plugin.settings import Settings, parse_settings
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.engine import open_store
from tests.security.console_visits import session
from tests.security.house import LONG, House, canary
from tests.security.tried import tried

pytestmark = pytest.mark.law(9)

TRICKS = {
    "up": "..", "here": ".", "up and over": "../bait", "far up": "../" * 12 + "etc/passwd", "absolute": "/etc/passwd",
    "backslashes": "..\\bait",
    "encoded": "..%2Fbait", "encoded twice": "%252e%252e%252fbait", "over long UTF-8": "..%c0%af",
    "within": "alpha/../bait", "NUL": "alpha\x00", "NUL, encoded": "alpha%00.safetensors", "line break": "alpha\n",
    "Cyrillic a": "\u0430lpha", "wide a": "\uff41lpha", "invisible": "al\u200bpha", "right to left": "\u202ealpha",
    "combining": "a\u0301lpha", "capital": "ALPHA", "dot at the end": "alpha.", "space": "alpha ", "home": "~root",
    "variable": "$HOME", "option": "-rf", "template": "{{7*7}}", "5,000 letters": "a" * 5_000, "device": "/dev/zero",
    "version of a path": "../bait@v1", "no version": "alpha@v0", "huge version": "alpha@v" + "9" * 40, "percent": "%",
    "link": "file:///etc/passwd", "quote": "a' OR '1'='1",
}  # fmt: skip


@pytest.fixture(scope="module")
def bait(house: House) -> str:
    """What stands in a file just outside of every folder that names lead into."""
    content = canary("bait")
    for folder in (house.folder, house.home, house.home / "trainer", house.home / "skills"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("bait", "bait.md", "adapter_config.json"):
            (folder / name).write_text(content)
    return content


SENT = list(TRICKS) if LONG else list(TRICKS)[::4]  # to running processes


def in_a_path(text: str) -> str:
    """Percent-encoded, dots too, which clients would resolve otherwise."""
    return quote(text, safe="").replace(".", "%2E")


def tree(house: House) -> set[str]:
    return {str(path) for path in house.folder.rglob("*") if not path.name.endswith((".lock", "-wal", "-shm"))}


@pytest.fixture
def same_files(house: House, bait: str) -> Iterator[None]:
    """Afterwards no file has come or gone."""
    before = tree(house)
    yield
    assert tree(house) == before


@pytest.fixture
def unmoved(same_files: None, bait: str) -> Callable[[httpx.Response], None]:
    """Checks replies; afterwards no file has come or gone."""

    def check(answer: httpx.Response) -> None:
        tried("names with path tricks")
        assert answer.status_code < 500, answer.text
        assert answer.status_code >= 300, f"{answer.request.url} was let in: {answer.text[:300]}"
        assert bait not in answer.text
        assert "root:x:0" not in answer.text
        assert "Traceback" not in answer.text

    return check


@pytest.mark.parametrize("trick", SENT)
def test_no_name_in_a_request_to_the_gateway_leads_anywhere(
    house: House, unmoved: Callable[[httpx.Response], None], trick: str
) -> None:
    text = TRICKS[trick]
    path = in_a_path(text)
    headers = {"authorization": f"Bearer {house.keys['own']}"}
    with httpx.Client(base_url=house.gateway, headers=headers, timeout=30, verify=False) as client:
        for method, where in (
            ("GET", "/metaclaw/v1/traces/{}"), ("POST", "/metaclaw/v1/sessions/{}/end"),
            ("GET", "/metaclaw/v1/adapters/{}"), ("GET", "/metaclaw/v1/adapters/{}/export"),
            ("POST", "/metaclaw/v1/adapters/{}/promote"),
            ("POST", "/metaclaw/v1/agents/{}/train"),
        ):  # fmt: skip
            answer = client.request(method, where.format(path))
            if where.endswith("/end") and answer.status_code == 200:
                continue  # a session of its own, which the fuzzing called so
            unmoved(answer)
        unmoved(client.get("/metaclaw/v1/traces", params={"agent": text}))
        unmoved(client.get("/metaclaw/v1/adapters", params={"agent": text}))
        for body in ({"agent": text}, {"agent": text, "to": 1}):
            unmoved(client.post("/metaclaw/v1/adapters/rollback", json=body))
        unmoved(client.post("/metaclaw/v1/adapters/retrain", json={"agent": text, "without_deleted": True}))
        chat = {"messages": [{"role": "user", "content": "hi case:fresh"}]}
        unmoved(client.post("/v1/chat/completions", json=chat | {"model": f"metaclaw/{text}"}))
        if text.isascii() and text.isprintable() and text.strip() == text and text:
            unmoved(client.post("/v1/chat/completions", json=chat | {"model": "m"}, headers={"x-agent-id": text}))


FREE_HEADERS = ("x-session-id", "x-litellm-session-id", "session_id", "x-session-affinity")
FREE_FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt_cache_key": lambda text: {"prompt_cache_key": text},
    "metadata.session_id": lambda text: {"metadata": {"session_id": text}},
    "previous_response_id": lambda text: {"previous_response_id": text},
}


@pytest.mark.parametrize("trick", SENT)
def test_no_name_that_may_be_any_text_leads_anywhere(house: House, bait: str, same_files: None, trick: str) -> None:
    """Names of conversations, and of what feedback is about, are the client's own: any text, and no more than that."""
    text = TRICKS[trick]
    said = {"model": "m", "messages": [{"role": "user", "content": "hi case:fresh"}]}
    headers = {"authorization": f"Bearer {house.keys['own']}"}
    paths = {"/v1/chat/completions": said, "/v1/responses": {"model": "m", "input": "hi case:fresh"}}
    with httpx.Client(base_url=house.gateway, headers=headers, timeout=30, verify=False) as client:
        answers = [
            client.post(path, json=body | make(text)) for path, body in paths.items() for make in FREE_FIELDS.values()
        ]
        for name in FREE_HEADERS:
            try:
                answers.append(client.post("/v1/chat/completions", json=said, headers={name: text.encode()}))
            except httpx.LocalProtocolError:
                continue  # no header can hold it
        for target in ("trace_id", "response_id"):
            answer = client.post("/metaclaw/v1/feedback", json={target: text, "value": 0})
            assert answer.status_code == 400 or answer.json()["trace_id"] is None
            answers.append(answer)
        for answer in answers:
            tried("names with path tricks")
            assert answer.status_code < 500, answer.text
            assert not [told for told in (bait, "root:x:0", "Traceback") if told in answer.text]
            if (trace := answer.headers.get("x-metaclaw-trace-id")) is not None:
                assert client.get(f"/metaclaw/v1/traces/{trace}").json()["agent"] == "alpha"
        sessions = {one["session"] for one in client.get("/metaclaw/v1/traces", params={"limit": 500}).json()["data"]}
        assert text not in sessions, "a session is called what the client calls it"


@pytest.mark.parametrize("trick", SENT)
def test_no_name_in_a_request_to_the_trainer_leads_anywhere(
    house: House, unmoved: Callable[[httpx.Response], None], trick: str
) -> None:
    text = TRICKS[trick]
    path = in_a_path(text)
    headers = {"authorization": f"Bearer {house.trainer_keys['worker']}"}
    with httpx.Client(base_url=house.trainer, headers=headers, timeout=60, verify=False) as client:
        run = client.post("/v1/lora/create", json={"rank": 1}).json()["session_id"]
        sample = {"id": "s", "agent": text, "session": "s", "token_ids": [1, 2], "adapter_version": 0, "turns": []}
        for method, where, body in (
            ("GET", f"/v1/agents/{path}", None), ("PUT", f"/v1/agents/{path}", {"allowed": True}),
            ("POST", f"/v1/agents/{path}/head", {"version": 1}), ("POST", f"/v1/agents/{path}/train", None),
            ("GET", f"/v1/adapters/{path}/adapter_config.json", None), ("GET", f"/v1/adapters/alpha@v1/{path}", None),
            ("DELETE", f"/v1/lora/{path}", None), ("POST", "/v1/train/optim_step", {"session_id": text}),
            ("POST", "/v1/weights/save", {"session_id": run, "name": text}),
            ("POST", "/v1/checkpoint/save", {"session_id": run, "name": text}),
            ("POST", "/v1/checkpoint/load", {"session_id": run, "path": text}),
            ("POST", "/v1/checkpoint/load", {"session_id": run, "path": str(house.home / text.replace("\x00", ""))}),
            ("POST", "/v1/lora/create", {"base_model": text}),
        ):  # fmt: skip
            if trick != "capital" or (body or {}).get("name") is None:  # a name of weights may have capitals
                unmoved(client.request(method, where, json=body))
        refused = client.post("/v1/samples", json={"samples": [sample]}).json()
        assert [one["id"] for one in refused["refused"]] == ["s"]
        assert client.put("/v1/served", json={"versions": [text[:200]]}).json().get("held", []) == []
        client.put("/v1/served", json={"versions": []})
        client.delete(f"/v1/lora/{run}")


@pytest.mark.parametrize("trick", SENT)
def test_no_name_in_a_request_to_the_console_leads_anywhere(
    house: House, unmoved: Callable[[httpx.Response], None], trick: str
) -> None:
    text = TRICKS[trick]
    path = in_a_path(text)
    with httpx.Client(base_url=house.console, timeout=30, verify=False) as client:
        cookie = session(client, house, "proxy_admin")
        token = client.get("/", headers=cookie).text.split('"X-CSRF-Token": "')[1].split('"')[0]
        headers = {**cookie, "x-csrf-token": token, "origin": house.console}
        for where in (
            "/agents/{}",
            "/agents/{}/curves",
            "/sessions/{}",
            "/traces/{}",
            "/skills/alpha/{}",
            "/static/{}",
        ):
            unmoved(client.get(where.format(path), headers=headers))
        skills = ["/skills/alpha"] if text.strip() != "alpha" else []
        form = {"name": text, "description": "When asked.", "body": "Do it.", "version": "1"}
        for where in (*skills, f"/skills/{path}", f"/skills/alpha/{path}/save", f"/skills/{path}/x/retire"):
            answer = client.post(
                where, data={**form, "name": text if where == "/skills/alpha" else "x"}, headers=headers
            )
            if answer.status_code != 200:  # 200: the form again, with what is wrong with it
                unmoved(answer)


@pytest.mark.parametrize("trick", TRICKS)
def test_no_name_becomes_an_agent_a_version_a_skill_or_a_key(tmp_path: Path, trick: str) -> None:
    text = TRICKS[trick]
    tried("names with path tricks", 4)
    for what in ("agent", "skill", "key"):
        with pytest.raises(InvalidNameError) as refused:
            slug(text, what)
        assert len(str(refused.value)) < 300
    with pytest.raises(InvalidNameError):
        parse_version(text)
    engine = open_store(f"sqlite:///{tmp_path / 'store' / 'metaclaw.db'}")
    with engine.begin() as c, pytest.raises((InvalidNameError, MetaclawError)):
        add_agent(c, text)
    engine.dispose()
    with pytest.raises((InvalidNameError, MetaclawError)):
        SkillFolder(tmp_path / "skills", text)


def _home(tmp_path: Path) -> Settings:
    settings = parse_settings({"home": str(tmp_path / "home")}, "test")
    open_store(settings.store_url).dispose()
    (settings.home / "internal.key").write_text("mci-x")
    return settings


def _link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


MEMBERS: dict[str, Callable[[], tarfile.TarInfo]] = {
    "a path up": lambda: tarfile.TarInfo("../escaped"),
    "a path up within home": lambda: tarfile.TarInfo("home/../../escaped"),
    "an absolute path": lambda: tarfile.TarInfo("/tmp/metaclaw-escaped"),
    "a link out": lambda: _link("home/skills", "/etc"),
    "a link that is out once it is moved": lambda: _link("home/skills", "../.ssh"),
    "a hard link out": lambda: _link("home/passwd", "/etc/passwd", tarfile.LNKTYPE),
    "a device": lambda: _link("home/zero", "", tarfile.CHRTYPE),
    "a pipe": lambda: _link("home/pipe", "", tarfile.FIFOTYPE),
    "a file that the list does not name": lambda: tarfile.TarInfo("home/more"),
    "a NUL": lambda: tarfile.TarInfo("home/a\x00b"),
    "a name of 4,000 letters": lambda: tarfile.TarInfo("home/" + "a" * 4_000),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_no_member_of_a_backup_lands_outside_of_the_home(tmp_path: Path, member: str) -> None:
    settings = _home(tmp_path)
    archive = tmp_path / "backup.tar.gz"
    back_up(settings, archive)
    forged = tmp_path / "forged.tar.gz"
    with tarfile.open(archive, "r:gz") as old, tarfile.open(forged, "w:gz", format=tarfile.PAX_FORMAT) as new:
        for info in old:
            new.addfile(info, old.extractfile(info))
        odd = MEMBERS[member]()
        odd.size = 3 if odd.isreg() else 0
        new.addfile(odd, io.BytesIO(b"bad"))
    place = tmp_path / "deep" / "place"
    target = parse_settings({"home": str(place / "home")}, "test")
    tried("members of backups with path tricks")
    with pytest.raises(BackupError):
        restore(target, forged, replace=False)
    assert not (place / "home").exists()
    assert [path for path in place.rglob("*") if path.name.startswith("escaped")] == []
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/metaclaw-escaped", "home/../../escaped"])
def test_no_name_in_a_backups_list_is_read_outside_of_it(tmp_path: Path, name: str) -> None:
    settings = _home(tmp_path)
    archive, forged = tmp_path / "backup.tar.gz", tmp_path / "forged.tar.gz"
    back_up(settings, archive)
    with tarfile.open(archive, "r:gz") as old, tarfile.open(forged, "w:gz") as new:
        for info in old:
            stream = old.extractfile(info)
            data = stream.read() if stream else b""
            if info.name == MANIFEST:
                manifest: dict[str, Any] = json.loads(data)
                manifest["files"][name] = manifest["files"][STORE]
                data = json.dumps(manifest).encode()
                info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    tried("members of backups with path tricks")
    with pytest.raises(BackupError):
        restore(parse_settings({"home": str(tmp_path / "other")}, "test"), forged, replace=False)
