"""Who may speak to the trainer: Bearer keys, shown once, kept as sha256 in a file that only the owner may read.

Without any key the trainer answers on loopback alone, and only to requests that name loopback as their host, so that
no web page in a browser on this machine can reach it by a name of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from metaclaw_hooks.names import slug

from metaclaw_trainer.errors import KeyFileError

KEY_PREFIX = "mct-"
_LOCAL_NAMES = frozenset({"localhost"})


@dataclass(frozen=True, slots=True)
class Key:
    """One key, without its secret."""

    id: str
    name: str
    sha256: str  # of the secret, hex
    created_at: float
    revoked_at: float | None = None


class KeyRing:
    """The keys in ``path``; a change of the file is seen at once. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def entries(self) -> tuple[Key, ...]:
        """All keys, revoked ones too.

        Raises:
            KeyFileError: if the file cannot be read, or is not what ``add`` writes.
        """
        with self._lock:
            return self._read()

    def _read(self) -> tuple[Key, ...]:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return ()
        except OSError as error:
            raise KeyFileError(f"cannot read the key file {self.path}: {error.strerror}") from error
        if self._seen != (stat.st_mtime_ns, stat.st_size):
            try:
                self._keys = tuple(Key(**entry) for entry in json.loads(self.path.read_text(encoding="utf-8"))["keys"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise KeyFileError(
                    f"{self.path} is no file of keys ({error}); move it away and make new keys"
                ) from error
            self._seen = (stat.st_mtime_ns, stat.st_size)
        return self._keys

    @property
    def needed(self) -> bool:
        """Whether callers must bring a key: any was ever made, revoked ones count."""
        return bool(self.entries())

    def add(self, name: str) -> tuple[Key, str]:
        """Make a key; the second value is the secret, which is kept nowhere.

        Raises:
            InvalidNameError: if ``name`` is no slug.
        """
        slug(name, "key")
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        key = Key(secrets.token_hex(4), name, _digest(secret), time.time())
        with self._lock:
            self._write((*self._read(), key))
        return key, secret

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing.

        Raises:
            KeyFileError: if there is no such key.
        """
        with self._lock:
            keys = self._read()
            if not any(key.id == key_id for key in keys):
                raise KeyFileError(f"no key {key_id!r} in {self.path}; list them with --keys")
            now = time.time()
            self._write(tuple(Key(**{**asdict(k), "revoked_at": now}) if k.id == key_id else k for k in keys))

    def _write(self, keys: tuple[Key, ...]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise KeyFileError(f"cannot write the key file {self.path}: {error.strerror}") from error

    def find(self, secret: str) -> Key | None:
        """The key of ``secret``, if it was made here and not revoked; takes as long whichever key it is."""
        digest = _digest(secret)
        found: Key | None = None
        for key in self.entries():
            if hmac.compare_digest(key.sha256, digest) and key.revoked_at is None:
                found = key
        return found


def _digest(secret: str) -> str:
    # A key is 32 random bytes, so a plain hash cannot be reversed by guessing.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address, with or without brackets) is this machine's loopback."""
    name = host.strip("[]").lower()
    if name in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refuse_open_bind(host: str, ring: KeyRing) -> None:
    """Without a key the trainer listens on loopback only.

    Raises:
        KeyFileError: if ``host`` is wider and no key that works was made.
    """
    if not is_loopback(host) and not any(key.revoked_at is None for key in ring.entries()):
        raise KeyFileError(
            f"refusing to listen on {host} without a key: make one with `python -m metaclaw_trainer --new-key NAME`, "
            "or listen on 127.0.0.1"
        )


def host_of(header: str) -> str:
    """The host of a ``Host`` header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.rpartition(":")[0] if header.count(":") == 1 else header
