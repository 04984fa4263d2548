"""``check_sbom.py LOCK SBOM``: whether the software bill of materials lists all that the lock pins, hashes and all."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\\\]+)", re.MULTILINE)


def differences(lock: str, sbom: str) -> list[str]:
    """What one has and the other has not, or has without a hash."""
    pinned = {(_plain(name), version) for name, version in _PIN.findall(lock)}
    components = json.loads(sbom)["components"]
    listed = {(_plain(one["name"]), one["version"]) for one in components}
    found = [f"{name} {version} is not listed" for name, version in sorted(pinned - listed)]
    found += [f"{name} {version} is listed and not pinned" for name, version in sorted(listed - pinned)]
    for one in components:
        if not any(reference.get("hashes") for reference in one.get("externalReferences", ())):
            found.append(f"{one['name']} {one['version']} is listed without a hash")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(lock: Path, sbom: Path) -> int:
    found = differences(lock.read_text(encoding="utf-8"), sbom.read_text(encoding="utf-8"))
    for line in found:
        sys.stderr.write(f"{sbom}: {line}\n")
    if not found:
        sys.stdout.write(f"{sbom} lists all that {lock} pins\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
