"""Known vulnerabilities of what a lock pins, without the network: ``python -m scripts.audit_offline LOCK ZIP``.

ZIP is OSV's export of the ecosystem PyPI (``PyPI/all.zip`` of the bucket ``osv-vulnerabilities``), fetched where the
network is open; it holds the advisories of PyPA and GitHub, and the malicious packages of OpenSSF. Nothing is asked of
the network here. It ends with 1 if something is known, and with 2 if the copy is none, or too old to say anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from scripts.check_sbom import pins

DAYS = 30  # the age from which a copy is too old


class NoDatabaseError(Exception):
    """What is wrong with the copy, and what to do about it."""


def records(path: Path) -> list[dict[str, Any]]:
    """Every record of OSV's export that is about packages of PyPI and was not withdrawn.

    Raises:
        NoDatabaseError: if it cannot be read, or holds none.
    """
    try:
        with zipfile.ZipFile(path) as file:
            every = [json.loads(file.read(name)) for name in file.namelist() if name.endswith(".json")]
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise NoDatabaseError(f"{path} cannot be read as OSV's export: {error}; fetch PyPI/all.zip anew") from error
    found = [one for one in every if "withdrawn" not in one and any(_of_pypi(one))]
    if not found:
        raise NoDatabaseError(f"{path} holds no record about a package of PyPI: fetch OSV's PyPI/all.zip")
    return found


def newest(every: Sequence[Mapping[str, Any]]) -> datetime:
    """When the last change of the copy was made."""
    return max(datetime.fromisoformat(one["modified"]).astimezone(UTC) for one in every)


def known(lock: str, every: Sequence[Mapping[str, Any]], ignored: Sequence[str] = ()) -> list[str]:
    """One line for each record about a version that the lock pins."""
    pinned: dict[str, list[str]] = {}
    for name, version in pins(lock):
        pinned.setdefault(name, []).append(version)
    found = []
    for record in every:
        names = {record["id"], *record.get("aliases", ())}
        for affected in _of_pypi(record) if not names & set(ignored) else ():
            name = _plain(affected["package"]["name"])
            told = f"{' '.join(sorted(names))}: {record.get('summary') or 'no summary'}; {_mended(affected)}"
            found += [f"{name} {version}: {told}" for version in pinned.get(name, ()) if _holds(version, affected)]
    return sorted(set(found))


def _of_pypi(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (one for one in record.get("affected", ()) if one.get("package", {}).get("ecosystem") == "PyPI")


def _holds(version: str, affected: Mapping[str, Any]) -> bool:
    """Whether ``version`` is affected, by OSV's rules. A record that cannot be read holds: someone has to look."""
    ours = Version(version)
    for one in affected.get("versions", ()):
        try:
            if Version(one) == ours:
                return True
        except InvalidVersion:  # of before PEP 440; a lock has none
            continue
    ranges = [one["events"] for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM"]
    try:
        return any(_in_range(ours, events) for events in ranges)
    except InvalidVersion:
        return True


def _in_range(version: Version, events: Sequence[Mapping[str, str]]) -> bool:
    inside = False
    for kind, at in sorted(((k, v) for event in events for k, v in event.items()), key=lambda one: _place(one[1])):
        reached = at == "0" or version >= Version(at)
        if kind == "introduced" and reached:
            inside = True
        elif (kind == "fixed" and reached) or (kind == "last_affected" and version > Version(at)):
            inside = False
    return inside


def _place(version: str) -> tuple[bool, Version]:
    return version != "0", Version(version)


def _mended(affected: Mapping[str, Any]) -> str:
    events = [event for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM" for event in one["events"]]
    fixed = [event["fixed"] for event in events if "fixed" in event]
    return f"mended in {', '.join(fixed)}" if fixed else "no release mends it"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path)
    parser.add_argument("database", type=Path, metavar="ZIP")
    parser.add_argument("--ignore-vuln", action="append", default=[], metavar="ID", help="known, and accepted")
    parser.add_argument("--max-age", type=float, default=DAYS, help="days from which a copy is too old")
    given = parser.parse_args(arguments)
    lock = given.lock.read_text(encoding="utf-8")
    try:
        every = records(given.database)
    except NoDatabaseError as error:
        sys.stderr.write(f"audit: {error}\n")
        return 2
    date = newest(every)
    found = known(lock, every, given.ignore_vuln)
    for line in found:
        sys.stderr.write(f"{line}\n")
    sys.stdout.write(
        f"{len(pins(lock))} packages of {given.lock} against {len(every)} records, the newest of {date:%Y-%m-%d}: "
        f"{len(found) or 'nothing'} known\n"
    )
    age = (datetime.now(UTC) - date).days
    if age > given.max_age:
        sys.stderr.write(
            f"audit: {given.database} is {age} days old and says nothing of what came later: fetch it anew\n"
        )
        return 2
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
