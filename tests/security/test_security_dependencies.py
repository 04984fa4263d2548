"""What the gateway installs: pinned, hashed, and listed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_sbom import differences
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


def test_a_list_that_leaves_something_out_is_noticed() -> None:
    lock = "a==1 \\\n    --hash=sha256:00\nb-c==2.0 ; sys_platform == 'win32' \\\n    --hash=sha256:11\n"
    hashes = {"externalReferences": [{"hashes": [{"alg": "SHA-256", "content": "00"}]}]}
    whole = [{"name": "a", "version": "1", **hashes}, {"name": "B_c", "version": "2.0", **hashes}]
    assert differences(lock, json.dumps({"components": whole})) == []
    assert differences(lock, json.dumps({"components": whole[:1]})) == ["b-c 2.0 is not listed"]
    bare = [whole[0], {"name": "b-c", "version": "2.0"}]
    assert differences(lock, json.dumps({"components": bare})) == ["b-c 2.0 is listed without a hash"]
    more = [*whole, {"name": "d", "version": "3", **hashes}]
    assert differences(lock, json.dumps({"components": more})) == ["d 3 is listed and not pinned"]


@pytest.mark.skipif(not LONG, reason="fetches the tool that writes the list")
def test_the_list_of_what_is_installed_can_be_made(tmp_path: Path) -> None:
    target = tmp_path / "gateway.cdx.json"
    uv = Path(sys.executable).parent / "uv"
    command = [str(uv), "tool", "run", "--from", "cyclonedx-bom>=7.2,<8", "cyclonedx-py", "requirements", str(LOCK)]
    subprocess.run([*command, "--spec-version", "1.6", "--output-file", str(target)], check=True, timeout=300)
    assert differences(LOCK.read_text(encoding="utf-8"), target.read_text(encoding="utf-8")) == []


def test_the_page_lists_every_file_of_attacks_and_no_other() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_security_\w+\.py)`", page))
    assert named == {path.name for path in Path(__file__).parent.glob("test_*.py")}
