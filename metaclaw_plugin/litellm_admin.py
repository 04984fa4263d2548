"""LiteLLM's admin API, as far as its database mode is told about our agents.

An entry of ours among LiteLLM's models is for people to look at: ``metaclaw/<agent>@vN``, a name that no client may ask
for. One named ``metaclaw/<agent>`` would take the agent's requests away from the owner's deployment ``metaclaw/*``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import BASE_VERSION

from metaclaw_plugin.errors import LitellmAdminError
from metaclaw_plugin.gateway.routing import BASE_MODEL_NAME, UPSTREAM
from metaclaw_plugin.settings import Settings

TIMEOUT = 30.0  # seconds
PAGE = 100  # keys; the most that LiteLLM gives at once
_AGENT = "metaclaw_agent"  # in an entry's model_info: that it is ours, and whose
_PREFIX = "metaclaw-agent-"  # of an entry's id
_NO_DATABASE = (
    "No DB Connected",
    "DB not connected",
    "Database not connected",
    "No connected db",
)  # its ways to say it


@dataclass(frozen=True, slots=True)
class Listing:
    """What LiteLLM's Models page says about an agent."""

    agent: str
    version: int  # that serves; 0: the base model
    mode: str

    @property
    def model(self) -> str:
        """The entry's name."""
        return f"{UPSTREAM}/{self.agent}@v{self.version}"

    @property
    def served_as(self) -> str:
        """vLLM's name of what serves."""
        return BASE_MODEL_NAME if self.version == BASE_VERSION else version_name(self.agent, self.version)


@dataclass(frozen=True, slots=True)
class VirtualKey:
    """One of LiteLLM's virtual keys."""

    token: str  # LiteLLM's hash of it
    alias: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A virtual key that LiteLLM just made."""

    token: str  # LiteLLM's hash of it
    secret: str = field(repr=False)


def free_alias(agent: str, taken: Collection[str]) -> str:
    """The agent's name, with a number if that is taken: LiteLLM's aliases are unique."""
    names = (f"{agent}-{number}" for number in range(2, len(taken) + 3))
    return agent if agent not in taken else next(name for name in names if name not in taken)


class LitellmAdmin:
    """Asks LiteLLM with its master key. Every method may raise ``LitellmAdminError``."""

    def __init__(self, http: httpx.AsyncClient, settings: Settings) -> None:
        gateway = settings.gateway
        host = "127.0.0.1" if gateway.host in ("0.0.0.0", "::", "") else gateway.host
        self._http = http
        self._url = f"http://{host}:{gateway.port}"
        self._headers = {"authorization": f"Bearer {gateway.admin_key}"}
        self._params = {"api_base": f"{settings.vllm.url}/v1", "api_key": settings.vllm.api_key or "none"}

    async def listings(self) -> dict[str, Listing]:
        """Our entries among LiteLLM's models, by agent, as the answering process has them."""
        found = {}
        for entry in await self._data("GET", "/v1/model/info", "data"):
            info = entry.get("model_info") or {}
            if (agent := info.get(_AGENT)) is not None:
                version, mode = info.get("metaclaw_version"), info.get("metaclaw_mode")
                found[agent] = Listing(agent, version if isinstance(version, int) else -1, str(mode))
        return found

    async def put(self, listing: Listing) -> None:
        """Make the agent's entry say this, and make it if it is not there."""
        identity = _PREFIX + listing.agent
        body = {
            "model_name": listing.model,
            "litellm_params": self._params | {"model": f"hosted_vllm/{listing.served_as}"},
            "model_info": {
                "id": identity,
                "created_by": "metaclaw",
                "updated_at": datetime.now(UTC).isoformat(),
                _AGENT: listing.agent,
                "metaclaw_version": listing.version,
                "metaclaw_mode": listing.mode,
            },
        }
        answer = await self._send("PATCH", f"/model/{identity}/update", body)
        if answer.status_code == 404:
            answer = await self._send("POST", "/model/new", body)
        self._check(answer)

    async def drop(self, agent: str) -> None:
        """Take the agent's entry out."""
        self._check(await self._send("POST", "/model/delete", {"id": _PREFIX + agent}))

    async def virtual_keys(self) -> list[VirtualKey]:
        """All virtual keys."""
        found: list[VirtualKey] = []
        page = 1
        while True:
            keys = await self._data("GET", f"/key/list?return_full_object=true&size={PAGE}&page={page}", "keys")
            found += [VirtualKey(str(key["token"]), key.get("key_alias"), key.get("metadata") or {}) for key in keys]
            if len(keys) < PAGE:
                return found
            page += 1

    async def new_key(self, alias: str, agents: list[str], kind: str, owner: str) -> MadeKey:
        """Make a key that acts for ``agents`` and belongs to the ``user`` or ``team`` (``kind``) ``owner``."""
        named = agents[0] if len(agents) == 1 else agents
        body = {"key_alias": alias, "metadata": {"agent_id": named}, f"{kind}_id": owner}
        answer = await self._send("POST", "/key/generate", body)
        self._check(answer)
        made = answer.json()
        return MadeKey(str(made["token"]), str(made["key"]))

    async def set_alias(self, key: VirtualKey, alias: str) -> None:
        """Give a key an alias that no other key has."""
        self._check(await self._send("POST", "/key/update", {"key": key.token, "key_alias": alias}))

    async def _data(self, method: str, path: str, field: str) -> list[dict[str, Any]]:
        answer = await self._send(method, path)
        self._check(answer)
        try:
            found = answer.json()[field]
        except (ValueError, KeyError, TypeError) as error:
            raise LitellmAdminError(
                f"{self._url}{path} does not answer as LiteLLM does: {answer.text[:200]}"
            ) from error
        return [entry for entry in found if isinstance(entry, dict)]

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, self._url + path, json=body, headers=self._headers, timeout=TIMEOUT)
        except httpx.HTTPError as error:
            raise LitellmAdminError(f"{self._url}{path} did not answer: {type(error).__name__}") from error

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code < 300:
            return
        where = f"{answer.request.method} {answer.request.url.path}"
        if answer.status_code in (401, 403):
            reason = "metaclaw.gateway.admin_key is not LiteLLM's master key"
        elif any(words in answer.text for words in _NO_DATABASE):
            reason = "it has no database: set general_settings.database_url, or leave metaclaw.gateway.admin_key out"
        elif "STORE_MODEL_IN_DB" in answer.text:
            reason = "set general_settings.store_model_in_db to true"
        else:
            reason = answer.text[:300]
        raise LitellmAdminError(f"LiteLLM answered {where} with {answer.status_code}: {reason}")
