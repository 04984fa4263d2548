"""What the gateway installs: pinned, hashed, listed, and looked up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from scripts.audit_offline import known
from scripts.audit_offline import main as audit_offline
from scripts.check_sbom import differences
from scripts.check_sbom import main as check_sbom
from tests.security.house import LONG

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "deploy" / "gateway.lock"


def test_every_package_of_the_lock_has_a_version_and_hashes_and_none_comes_from_elsewhere() -> None:
    text = LOCK.read_text(encoding="utf-8").replace("\\\n", " ")
    pins = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(pins) > 100
    for line in pins:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", line), line
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", line), line
        assert "://" not in line
        assert " @ " not in line


ONE, TWO, WRONG = "00" * 32, "11" * 32, "22" * 32
SMALL_LOCK = f"""# made by hand
a==1 \\
    --hash=sha256:{ONE} \\
    --hash=sha256:{TWO}
b-c==2.0 ; sys_platform == 'win32' \\
    --hash=sha256:{TWO}
"""


def listed(name: str, version: str, *hashes: str) -> dict[str, Any]:
    found = [{"alg": "SHA-256", "content": one} for one in hashes]
    return {"name": name, "version": version, "externalReferences": [{"hashes": found}]}


def unlike(*components: dict[str, Any], lock: str = SMALL_LOCK) -> list[str]:
    return differences(lock, json.dumps({"components": components}))


def test_a_list_that_leaves_something_out_is_noticed() -> None:
    a, b = listed("a", "1", ONE, TWO), listed("B_c", "2.0", TWO)
    assert unlike(a, b) == []
    assert unlike(a) == ["b-c 2.0 is not listed"]
    assert unlike(a, b, listed("d", "3", ONE)) == ["d 3 is listed and not pinned"]
    assert unlike(a, listed("b-c", "2.1", TWO)) == ["b-c 2.0 is not listed", "b-c 2.1 is listed and not pinned"]
    assert unlike(listed("a", "1"), lock="a==1\n") == ["a 1 is pinned without a hash"]


def test_a_list_with_other_hashes_than_the_locks_is_noticed() -> None:
    a, b = listed("a", "1", ONE, TWO), listed("b-c", "2.0", TWO)
    missing, foreign = "the lock has, and the list has not,", "the list has, and the lock has not,"
    assert unlike(listed("a", "1", ONE), b) == [f"a 1: {missing} sha256:{TWO}"]
    assert unlike(listed("a", "1", ONE, TWO, WRONG), b) == [f"a 1: {foreign} sha256:{WRONG}"]
    assert unlike(a, listed("b-c", "2.0", ONE)) == [
        f"b-c 2.0: {missing} sha256:{TWO}",
        f"b-c 2.0: {foreign} sha256:{ONE}",
    ]
    assert unlike(a, listed("b-c", "2.0")) == [f"b-c 2.0: {missing} sha256:{TWO}"]


def test_the_check_of_the_list_fails_and_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock, target = tmp_path / "small.lock", tmp_path / "small.json"
    lock.write_text(SMALL_LOCK, encoding="utf-8")
    rows = [listed("a", "1", ONE, TWO), listed("b-c", "2.0", TWO)]
    target.write_text(json.dumps({"components": rows}), encoding="utf-8")
    assert check_sbom(lock, target) == 0
    assert "lists all 2 packages" in capsys.readouterr().out
    target.write_text(json.dumps({"components": rows}).replace(ONE, WRONG), encoding="utf-8")
    assert check_sbom(lock, target) == 1
    assert f"a 1: the list has, and the lock has not, sha256:{WRONG}" in capsys.readouterr().err


@pytest.mark.skipif(not LONG, reason="fetches the tool that writes the list")
def test_the_list_of_what_is_installed_can_be_made(tmp_path: Path) -> None:
    target = tmp_path / "gateway.cdx.json"
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv), "tool", "run", "--from", "cyclonedx-bom>=7.2,<8", "cyclonedx-py", "requirements", str(LOCK)]
    subprocess.run([*command, "--spec-version", "1.6", "--output-file", str(target)], check=True, timeout=300)
    assert differences(LOCK.read_text(encoding="utf-8"), target.read_text(encoding="utf-8")) == []


def record(name: str, events: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    """A record in OSV's form, about nothing that exists."""
    affected = {"package": {"ecosystem": "PyPI", "name": name}, "ranges": [{"type": "ECOSYSTEM", "events": events}]}
    return {"id": "TEST-1", "modified": "2026-11-01T00:00:00Z", "affected": [affected], "summary": "a hole"} | more


def database(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "all.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number, one in enumerate(records):
            file.writestr(f"TEST-{number}.json", json.dumps(one))
    return path


@pytest.mark.parametrize(
    ("events", "holds"),
    [
        ([{"introduced": "0"}], True),
        ([{"introduced": "0"}, {"fixed": "2.0"}], False),
        ([{"introduced": "0"}, {"fixed": "2.0.1"}], True),
        ([{"introduced": "2.1"}], False),
        ([{"introduced": "0"}, {"last_affected": "2.0"}], True),
        ([{"introduced": "0"}, {"last_affected": "1.10"}], False),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.9"}, {"fixed": "2.2"}], True),
        ([{"introduced": "2.2"}, {"fixed": "3"}, {"fixed": "1.0"}, {"introduced": "0"}], False),
        ([{"introduced": "of old"}], True),  # unreadable: someone has to look
    ],
)
def test_a_version_is_known_to_be_vulnerable_by_osvs_rules(events: list[dict[str, str]], holds: bool) -> None:
    said = known(SMALL_LOCK, [record("B_C", events)])
    assert [line.startswith("b-c 2.0: TEST-1: a hole; ") for line in said] == [True] * holds


def test_versions_are_also_known_by_name_and_an_accepted_record_is_left_out() -> None:
    listed_by_name = record("a", [], aliases=["CVE-1"])
    listed_by_name["affected"][0]["versions"] = ["0.9", "1.0.0", "of old"]
    assert known(SMALL_LOCK, [listed_by_name]) == ["a 1: CVE-1 TEST-1: a hole; no release mends it"]
    assert known(SMALL_LOCK, [listed_by_name], ignored=["CVE-1"]) == []
    elsewhere = record("a", [{"introduced": "0"}])
    elsewhere["affected"][0]["package"]["ecosystem"] = "npm"
    assert known(SMALL_LOCK, [elsewhere]) == []


def test_the_audit_without_network_says_how_old_its_copy_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    today = datetime.now(UTC).isoformat()
    old = record("litellm", [{"introduced": "0"}, {"fixed": "0.1"}])
    new = record("numpy", [{"introduced": "999"}], modified=today)
    hole = record("LiteLLM", [{"introduced": "0"}], modified=today)
    gone = record("litellm", [{"introduced": "0"}], withdrawn=today)
    runs = [((old, new, gone), 0, f"the newest of {today[:10]}: nothing known"), ((new, hole), 1, "1 known"),
            ((old,), 2, "the newest of 2026-11-01"), ((gone,), 2, "")]  # fmt: skip
    for given, code, said in runs:
        arguments = [str(LOCK), str(database(tmp_path, *given)), "--max-age", "0.5"]
        assert audit_offline(arguments) == code
        told = capsys.readouterr()
        assert said in told.out
        assert ("fetch it anew" in told.err or "fetch OSV's" in told.err) == (code == 2)
    assert audit_offline([str(LOCK), str(tmp_path / "none.zip")]) == 2
    assert "cannot be read as OSV's export" in capsys.readouterr().err


def test_the_page_lists_every_file_of_attacks_and_no_other() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_security_\w+\.py)`", page))
    assert named == {path.name for path in Path(__file__).parent.glob("test_*.py")}
