"""Visitors of the console whom LiteLLM vouches for."""

from __future__ import annotations

import json
import time
from typing import Any

from cryptography.fernet import Fernet
from fastapi.testclient import TestClient

from metaclaw_plugin.console.keys import derived
from tests.console.conftest import ORIGIN, SALT


def claim(age: float = 0.0, salt: str = SALT, plugin: str = "metaclaw", **changes: Any) -> str:
    """A claim as LiteLLM makes it, ``age`` seconds ago."""
    now = int(time.time() - age)
    told = {"plugin": "metaclaw", "user_id": "ann", "user_role": "proxy_admin", "exp": now + 30} | changes
    return Fernet(derived(salt, plugin)).encrypt_at_time(json.dumps(told).encode(), now).decode()


def show(client: TestClient, text: str, **headers: str) -> Any:
    return client.post("/api/plugin-auth", json={"session_claim": text}, headers={"origin": ORIGIN, **headers})
