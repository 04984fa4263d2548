"""The console key, and the secrets that are made from it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import Settings

FILE = "console.key"


def console_key(settings: Settings) -> str:
    """The key that opens the console by itself: the configured one, else one kept in ``home``, made if missing.

    Raises:
        ConfigError: if it can be neither read nor written.
    """
    if settings.console.key is not None:
        return settings.console.key
    path = settings.home / FILE
    try:
        if not path.exists():
            settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = settings.home / f".{FILE}.{secrets.token_hex(8)}"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    file.write("mcc-" + secrets.token_urlsafe(32))
                os.link(fresh, path)  # whole, or not there; whoever is first wins
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot keep the console key in {path}: {error}; set metaclaw.console.key") from error
    if len(key) < 16:
        raise ConfigError(f"the console key in {path} is too short to be one; delete the file to have a new one made")
    return key


def derived(key: str, purpose: str) -> bytes:
    """A secret of 32 bytes for one purpose (HMAC-SHA256), as Fernet takes it: URL-safe base64."""
    return base64.urlsafe_b64encode(hmac.digest(key.encode(), purpose.encode(), hashlib.sha256))
