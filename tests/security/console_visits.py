"""How visitors reach the routes of the console."""

from __future__ import annotations

import json
import re
import time

import httpx
from cryptography.fernet import Fernet

from metaclaw_plugin.console.access import COOKIE
from metaclaw_plugin.console.keys import derived
from tests.security.house import House

ACTING = {
    "POST /agents/{name}/promote", "POST /agents/{name}/rollback", "POST /agents/{name}/settings",
    "POST /traces/{trace_id}/feedback", "POST /skills/{owner}/preview", "POST /skills/{owner}",
    "POST /skills/{owner}/{name}/save", "POST /skills/{owner}/{name}/retire",
    "POST /skills/{owner}/proposals/{proposal}/{answer}", "POST /health",
}  # fmt: skip


def session(client: httpx.Client, house: House, role: str) -> dict[str, str]:
    """The cookie of a session that LiteLLM's claim opened."""
    told = {"plugin": "metaclaw", "user_id": role, "user_role": role, "exp": time.time() + 30}
    claim = Fernet(derived(house.owners["salt"], "metaclaw")).encrypt(json.dumps(told).encode()).decode()
    answer = client.post("/api/plugin-auth", json={"session_claim": claim}, headers={"origin": house.console})
    assert answer.status_code == 204, answer.text
    (token,) = re.findall(rf"{COOKIE}=([^;]+);", "\n".join(answer.headers.get_list("set-cookie")))
    client.cookies.clear()
    return {"cookie": f"{COOKIE}={token}"}


def filled(route: str) -> tuple[str, str]:
    """Method and path, with names in it that lead nowhere."""
    method, path = route.split(" ")
    return method, re.sub(r"\{(\w+)\}", lambda found: "0" if found[1] == "index" else "no-such-thing", path)
