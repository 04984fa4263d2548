"""``check_sbom.py LOCK SBOM``: whether the software bill of materials lists what the lock pins, and the same hashes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Set
from pathlib import Path

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^ ;]+)")
_HASH = re.compile(r"--hash=(\w+):([0-9a-f]+)")

Pins = dict[tuple[str, str], set[str]]  # name and version -> hashes, each as algorithm:digits


def differences(lock: str, sbom: str) -> list[str]:
    """What one has and the other has not: packages, versions, and the hashes of each."""
    pinned, listed = pins(lock), components(sbom)
    found = [f"{name} {version} is not listed" for name, version in sorted(pinned.keys() - listed.keys())]
    found += [f"{name} {version} is listed and not pinned" for name, version in sorted(listed.keys() - pinned.keys())]
    for name, version in sorted(pinned.keys() & listed.keys()):
        ours, theirs = pinned[name, version], listed[name, version]
        found += [f"{name} {version} is pinned without a hash"] if not ours else []
        found += _told(f"{name} {version}: the lock has, and the list has not,", ours - theirs)
        found += _told(f"{name} {version}: the list has, and the lock has not,", theirs - ours)
    return found


def pins(lock: str) -> Pins:
    """What a lock with hashes pins."""
    found: Pins = {}
    for line in lock.replace("\\\n", " ").splitlines():
        if pin := _PIN.match(line):
            hashes = {f"{algorithm}:{digits}" for algorithm, digits in _HASH.findall(line)}
            found.setdefault((_plain(pin[1]), pin[2]), set()).update(hashes)
    return found


def components(sbom: str) -> Pins:
    """What a CycloneDX document lists."""
    found: Pins = {}
    for one in json.loads(sbom)["components"]:
        hashes = [*one.get("hashes", ())]
        hashes += [each for reference in one.get("externalReferences", ()) for each in reference.get("hashes", ())]
        named = {f"{each['alg'].replace('-', '').lower()}:{each['content']}" for each in hashes}
        found.setdefault((_plain(one["name"]), one["version"]), set()).update(named)
    return found


def _told(what: str, hashes: Set[str]) -> list[str]:
    return [f"{what} {one}" for one in sorted(hashes)]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(lock: Path, sbom: Path) -> int:
    text = lock.read_text(encoding="utf-8")
    found = differences(text, sbom.read_text(encoding="utf-8"))
    for line in found:
        sys.stderr.write(f"{sbom}: {line}\n")
    if found:
        sys.stderr.write(f"{sbom} is no list of {lock}: write it anew with `make sbom`, or the lock with `make lock`\n")
        return 1
    count = sum(map(len, pins(text).values()))
    sys.stdout.write(f"{sbom} lists all {len(pins(text))} packages that {lock} pins, with its {count} hashes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
