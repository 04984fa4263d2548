"""One file that holds METACLAW_HOME and the store, and the way back.

The archive is a compressed tar: ``manifest.json`` with the sha256 of every file, ``store.db`` (SQLite, whatever the
store runs on), and ``home/``. Databases are copied while they are used, each as of one moment; the store goes first, so
that what the trainer's database knows is never less than what the store says it was told.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import sqlalchemy as sa

from metaclaw_plugin import __version__
from metaclaw_plugin.errors import BackupError
from metaclaw_plugin.settings import CONFIG_NAME, Settings, load_settings
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.transfer import copy_store

FORMAT = 1
MANIFEST, STORE, HOME = "manifest.json", "store.db", "home/"
_LEFT_OUT = {"run", "logs", "cache", ".cache"}  # top folders that a machine makes for itself
_SQLITE_HEAD = b"SQLite format 3\x00"
_SIDE_FILES = ("-wal", "-shm", "-journal", ".part", ".tmp")


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What an archive holds."""

    path: str
    files: int
    bytes: int  # before compression
    rows: int  # of the store
    created_at: float


def back_up(settings: Settings, archive: Path) -> BackupReport:
    """Write the archive; it appears whole or not at all, and its owner alone can read it.

    Raises:
        BackupError: if it is there already, or cannot be written.
        StoreError: if the store cannot be read.
    """
    if archive.exists():
        raise BackupError(f"{archive} is there already; choose another name")
    files: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".metaclaw-backup-") as work:
            part, spare = Path(work) / "archive", Path(work) / "database"
            rows = _copy_out(settings.store_url, spare)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as raw:
                with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=3) as tar:
                    files[STORE] = _add(tar, spare, STORE)
                    for path, name in _home_files(settings, archive):
                        if (entry := _add_home_file(tar, path, HOME + name, spare)) is not None:
                            files[HOME + name] = entry
                    created = time.time()
                    manifest = {"format": FORMAT, "version": __version__, "created_at": created, "files": files}
                    part_manifest = Path(work) / MANIFEST
                    part_manifest.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                    tar.add(part_manifest, MANIFEST)
                raw.flush()
                os.fsync(raw.fileno())
            os.link(part, archive)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot write the backup {archive}: {error}") from error
    return BackupReport(str(archive), len(files), sum(entry["size"] for entry in files.values()), rows, created)


def restore(settings: Settings, archive: Path, replace: bool, own_config: bool = False) -> BackupReport:
    """Put the archive's content in the place of ``settings.home`` and of the store.

    ``own_config``: the config file in the archive, if there is one, says where the store is, and not ``settings``.
    Everything is unpacked and checked beside the home first. What was there is kept, under the home's name with
    ``.before-restore-TIME`` added; a store on PostgreSQL must be empty.

    Raises:
        BackupError: if the archive is damaged or of another format, or ``replace`` is false and the home not empty.
    """
    home = settings.home
    if not replace and home.is_dir() and any(item.name not in _LEFT_OUT for item in home.iterdir()):
        raise BackupError(f"{home} is not empty; --replace moves what is there aside")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".metaclaw-restore-") as work:
            folder = Path(work)
            manifest = _unpack(archive, folder)
            (folder / HOME).mkdir(exist_ok=True, mode=0o700)
            config = folder / HOME / CONFIG_NAME
            url = settings.store_url
            if own_config and config.is_file():
                url = load_settings(config).store.url or url
            rows = _put_store(url, home, folder)
            if home.exists():
                home.rename(home.with_name(f"{home.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S')}"))
            (folder / HOME).rename(home)
            home.chmod(0o700)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot restore {archive}: {error}") from error
    files = manifest["files"]
    size = sum(entry["size"] for entry in files.values())
    return BackupReport(str(archive), len(files), size, rows, manifest["created_at"])


def _home_files(settings: Settings, archive: Path) -> Iterator[tuple[Path, str]]:
    own = _sqlite_path(settings.store_url)
    for folder, folders, names in os.walk(settings.home):
        if Path(folder) == settings.home:
            folders[:] = [name for name in folders if name not in _LEFT_OUT]
        folders[:] = [name for name in folders if not name.startswith(".metaclaw-")]
        for name in names:
            path = Path(folder) / name
            skipped = name.endswith(_SIDE_FILES) or path in (own, archive) or not path.is_file() or path.is_symlink()
            if not skipped:
                yield path, path.relative_to(settings.home).as_posix()


def _add_home_file(tar: tarfile.TarFile, path: Path, name: str, spare: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            database = file.read(len(_SQLITE_HEAD)) == _SQLITE_HEAD
        if database:
            _copy_sqlite(path, spare)
        return _add(tar, spare if database else path, name)
    except FileNotFoundError:  # a version that was retired, say, since the folder was listed
        return None


def _add(tar: tarfile.TarFile, path: Path, name: str) -> dict[str, Any]:
    with path.open("rb") as file:
        info = tar.gettarinfo(arcname=name, fileobj=file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        tar.addfile(info, file)
    return {"size": info.size, "sha256": digest}


def _copy_out(url: str, target: Path) -> int:
    """The store as an SQLite file of its own."""
    source = open_store(url)
    copy = open_store(f"sqlite:///{target}")
    try:
        rows = sum(copy_store(source, copy).values())
    finally:
        source.dispose()
        copy.dispose()
    with closing(sqlite3.connect(target)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    return rows


def _copy_sqlite(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


def _unpack(archive: Path, folder: Path) -> dict[str, Any]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            # A link that stays in the archive's folder leads out of the home once that is moved to its place.
            odd = next((one.name for one in tar if not (one.isreg() or one.isdir() or one.islnk())), None)
            if odd is not None:
                raise BackupError(f"{archive} holds {odd!r}, which is neither a file nor a folder; it is none of ours")
            tar.extractall(folder, filter="data")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BackupError(f"{archive} is of format {manifest['format']!r}; this release reads format {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise BackupError(f"{archive} names a file outside of it: {name!r}")
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise BackupError(f"{archive} is damaged: {name} is not what was saved")
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{archive} is no backup of MetaClaw, or damaged: {error}") from error
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if found != set(files) or STORE not in files:
        raise BackupError(f"{archive} is damaged: its files are not those that its manifest names")
    return manifest


def _put_store(url: str, home: Path, folder: Path) -> int:
    """Copy the unpacked store to ``url``; into the new home, if it lies in the home."""
    place = _sqlite_path(url)
    target = url
    if place is not None and place.is_relative_to(home):
        target = f"sqlite:///{folder / HOME / place.relative_to(home)}"
    elif place is not None and place.exists():
        place.rename(place.with_name(f"{place.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S')}"))
        for side in ("-wal", "-shm"):
            place.with_name(place.name + side).unlink(missing_ok=True)
    source = open_store(f"sqlite:///{folder / STORE}")
    try:
        copied = open_store(target)
        try:
            return sum(copy_store(source, copied).values())
        finally:
            copied.dispose()
    finally:
        source.dispose()


def _sqlite_path(url: str) -> Path | None:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database).absolute()
