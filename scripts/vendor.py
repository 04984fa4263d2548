"""The console's scripts of others, taken from their npm packages: ``python scripts/vendor.py [--check]``.

Each file stands in the package as it stands here, with its licence beside it; ``vendored.json`` holds what came from
where, and the sha256 of each. It needs npm and the package registry, so it is no part of setting up: the files are in
the repository. To take a newer one, change its version below and run this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "metaclaw_plugin" / "console" / "static" / "vendor"

# Package -> version, licence, and file in the package -> file here.
PACKAGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "htmx.org": ("2.0.11", "0BSD", {"dist/htmx.min.js": "htmx.min.js", "LICENSE": "htmx.LICENSE"}),
    "htmx-ext-sse": (
        "2.2.4",
        "0BSD",
        {"dist/sse.min.js": "htmx-ext-sse.min.js", "LICENSE": "htmx-ext-sse.LICENSE"},
    ),
    "uplot": (
        "1.6.32",
        "MIT",
        {
            "dist/uPlot.iife.min.js": "uPlot.iife.min.js",
            "dist/uPlot.min.css": "uPlot.min.css",
            "LICENSE": "uPlot.LICENSE",
        },
    ),
}


def packed(package: str, version: str, folder: Path) -> Path:
    """The package's archive, as the registry has it."""
    command = ["npm", "pack", "--silent", f"{package}@{version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1]


def take(package: str, version: str, files: dict[str, str], folder: Path) -> dict[str, bytes]:
    """Our file name -> its bytes."""
    with tarfile.open(packed(package, version, folder)) as archive:
        found = {}
        for inside, name in files.items():
            file = archive.extractfile(f"package/{inside}")
            if file is None:
                raise SystemExit(f"{package} {version} has no file {inside}")
            found[name] = file.read()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the console's scripts of others from their npm packages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs from its package's")
    options = parser.parse_args()
    record: dict[str, object] = {}
    differing = []
    with tempfile.TemporaryDirectory() as temporary:
        for package, (version, licence, files) in PACKAGES.items():
            taken = take(package, version, files, Path(temporary))
            sums = {name: hashlib.sha256(data).hexdigest() for name, data in taken.items()}
            record[package] = {"version": version, "licence": licence, "sha256": sums}
            for name, data in taken.items():
                if options.check:
                    differing += [] if (TARGET / name).read_bytes() == data else [name]
                else:
                    (TARGET / name).write_bytes(data)
    if differing:
        sys.stderr.write(f"not as in its package: {', '.join(differing)}\n")
        return 1
    if not options.check:
        (TARGET / "vendored.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
