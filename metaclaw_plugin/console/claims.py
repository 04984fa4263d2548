"""Who LiteLLM says is looking: its claim, checked, and taken once.

LiteLLM encrypts ``{plugin, user_id, user_role, exp}`` for 30 seconds with Fernet, under HMAC-SHA256(salt key, plugin
name); its admin UI hands it to our page, which posts it here. What was taken is remembered in the store until it has
expired, so that neither a restart nor a second console lets it be taken again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass

import sqlalchemy as sa
from cryptography.fernet import Fernet, InvalidToken
from sqlalchemy.engine import Connection

from metaclaw_plugin.console.keys import derived
from metaclaw_plugin.errors import ClaimError
from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.schema import leases

LIFETIME = 30  # seconds, as LiteLLM gives them
MAX_LENGTH = 4096  # characters
_PREFIX = "console-claim:"

ADMINS = frozenset({"proxy_admin"})
VIEWERS = frozenset({"proxy_admin_viewer"})


@dataclass(frozen=True, slots=True)
class Claim:
    """A user of LiteLLM's admin UI."""

    user: str
    may_act: bool


def read_claim(text: str, salt_key: str | None, plugin: str, now: float) -> Claim:
    """Decrypt and check a claim; ``now`` in Unix seconds.

    Raises:
        ClaimError: saying what is wrong with it; the claim itself is never in the message.
    """
    if not salt_key:
        raise ClaimError("the console does not know LiteLLM's salt key: set LITELLM_SALT_KEY where it runs")
    if len(text) > MAX_LENGTH:
        raise ClaimError("the claim is too long to be LiteLLM's")
    try:
        raw = Fernet(derived(salt_key, plugin)).decrypt_at_time(text.encode(), ttl=LIFETIME, current_time=int(now))
        claim = json.loads(raw)
    except (InvalidToken, ValueError) as error:
        raise ClaimError("the claim is forged, of another plugin, or older than 30 seconds") from error
    if not isinstance(claim, dict) or claim.get("plugin") != plugin:
        raise ClaimError("the claim was made for another plugin")
    expires = claim.get("exp")
    if isinstance(expires, bool) or not isinstance(expires, int | float) or expires < now:
        raise ClaimError("the claim has expired: open MetaClaw in the admin UI again")
    role = claim.get("user_role")
    if role not in ADMINS | VIEWERS:
        raise ClaimError("the console is for admins of LiteLLM, and for admins who only look (proxy_admin_viewer)")
    return Claim(str(claim.get("user_id") or "")[:200] or "an admin", role in ADMINS)


def take_claim(c: Connection, text: str, now: float) -> None:
    """Use up a claim that ``read_claim`` accepted.

    Raises:
        ClaimError: if it was taken before.
    """
    c.execute(sa.delete(leases).where(leases.c.name.startswith(_PREFIX, autoescape=True), leases.c.until < now))
    # What is encoded, not its encoding: base64 can be written in many ways that are read alike.
    digest = hashlib.sha256(base64.urlsafe_b64decode(text)).hexdigest()
    row = {"name": _PREFIX + digest, "owner": "console", "until": now + 2 * LIFETIME}
    if not insert_or_ignore(c, leases, [row]):
        raise ClaimError("the claim was used before: open MetaClaw in the admin UI again")
