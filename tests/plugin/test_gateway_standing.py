"""What a key is worth before its body is read, in each way that LiteLLM may be told to authenticate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from litellm.proxy import proxy_server

from metaclaw_plugin.gateway import auth
from metaclaw_plugin.gateway.identity import internal_key
from metaclaw_plugin.gateway.process import GatewayProcess
from metaclaw_plugin.settings import parse_settings
from metaclaw_plugin.store.agents import add_agent, new_key, revoke_key
from metaclaw_plugin.store.engine import open_store

MASTER = "sk-master-0123456789"


async def another_check(*_: Any) -> None:
    """Somebody's own authentication."""


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a gateway with our authentication."""
    settings = parse_settings({"home": str(tmp_path)}, "test")
    engine = open_store(settings.store_url)
    with engine.begin() as c:
        add_agent(c, "alpha")
        own, revoked = new_key(c, ["alpha"]), new_key(c, ["alpha"])
        revoke_key(c, revoked.id)
    monkeypatch.setattr(auth, "this_process", lambda: GatewayProcess(settings, engine))
    monkeypatch.setattr(proxy_server, "master_key", MASTER)
    monkeypatch.setattr(proxy_server, "user_custom_auth", auth.authenticate)
    monkeypatch.setattr(proxy_server, "general_settings", {})
    made = {"own": own.secret, "revoked": revoked.secret, "internal": internal_key(tmp_path), "master": MASTER}
    return made | {"wrong": "mc-never-made", "empty": ""}


async def standing(path: str = "/v1/chat/completions", query: bytes = b"", **headers: str) -> str:
    sent = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return await auth.standing(
        {"type": "http", "method": "POST", "path": path, "headers": sent, "query_string": query, "root_path": ""}
    )


@pytest.mark.parametrize("who", ["own", "internal", "master", "revoked", "wrong", "empty"])
async def test_our_own_keys_are_looked_up_wherever_litellm_takes_them_from(keys: dict[str, str], who: str) -> None:
    key, expected = keys[who], "known" if who in ("own", "internal", "master") else "refused"
    assert await standing(authorization=f"Bearer {key}") == expected
    for name in ("x_api_key", "api_key", "x_goog_api_key", "x_litellm_api_key", "Ocp_Apim_Subscription_Key"):
        assert await standing(**{name: key}) == expected, name
    assert await standing("/v1beta/models/m:generateContent", b"key=" + key.encode()) == expected
    assert await standing(authorization=f"Bearer {keys['own']}", x_litellm_api_key=key or "x") == expected
    assert await standing() == "refused"


async def test_a_header_that_the_owner_named_is_where_the_key_is(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_server, "general_settings", {"litellm_key_header_name": "X-Own"})
    assert await standing(x_own=f"Bearer {keys['own']}") == "known"
    assert await standing(authorization=f"Bearer {keys['own']}") == "refused"


async def test_of_litellms_virtual_keys_it_counts_that_there_is_one(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_server, "user_custom_auth", None)
    assert await standing(authorization=f"Bearer {keys['wrong']}") == "known"
    assert await standing() == "stranger"
    monkeypatch.setattr(proxy_server, "master_key", None)  # LiteLLM asks nobody for a key
    assert await standing() == "known"


async def test_of_another_authentication_nothing_is_known(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_server, "user_custom_auth", another_check)
    assert keys
    assert await standing() == "known"


async def test_while_the_store_does_not_answer_a_key_counts_as_known(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = parse_settings({"home": str(tmp_path)}, "test")
    engine = open_store(f"sqlite:///{tmp_path / 'other' / 'metaclaw.db'}")
    engine.dispose()
    (tmp_path / "other" / "metaclaw.db").unlink()
    monkeypatch.setattr(auth, "this_process", lambda: GatewayProcess(gone, engine))
    assert await standing(authorization=f"Bearer {keys['own']}") == "known"
