"""A vLLM that does not share the trainer's disk fetches each adapter over HTTP before it loads it.

``FetchAdapters`` is an ASGI middleware that ``metaclaw vllm`` gives to vLLM (``--middleware``) with the setting
``metaclaw.vllm.adapters: fetched``. The trainer asks for a load by a path of its own machine, as always. Where nothing
lies at that path here, the files are fetched into a mirror and the request goes on with the mirror's path. The mirror's
path ends with the trainer's, so the trainer still knows its own adapters in vLLM's list.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from metaclaw_hooks.wire import ADAPTER_FILES, ADAPTER_MIRROR

from metaclaw_plugin.adapter_files import fetch_adapter
from metaclaw_plugin.errors import AdapterFilesError

URL_ENV, KEY_ENV, FOLDER_ENV = "METACLAW_ADAPTERS_URL", "METACLAW_ADAPTERS_KEY", "METACLAW_ADAPTERS_FOLDER"
LIMIT = 1 << 20  # bytes of a request's body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)


class FetchAdapters:
    """The middleware; its settings are in the environment, where `metaclaw vllm` puts them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._url = os.environ[URL_ENV]
        key = os.environ.get(KEY_ENV)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._mirror = Path(os.environ[FOLDER_ENV]) / ADAPTER_MIRROR
        shutil.rmtree(self._mirror, ignore_errors=True)  # a vLLM that starts holds no adapter
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._held: dict[str, Path] = {}  # name -> its folder in the mirror

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "") if scope.get("method") == "POST" and _has_key(scope) else ""
        if path == "/v1/load_lora_adapter":
            await self._load(scope, receive, send)
        elif path == "/v1/unload_lora_adapter":
            await self._unload(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _load(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        try:
            body = await self._with_local_path(body)
        except AdapterFilesError as error:
            logger.error("%s", error)
            await _refuse(send, str(error))
            return
        await self._app(_with_length(scope, body), _again(body, receive), send)

    async def _unload(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                folder = self._held.pop(str(_parsed(body).get("lora_name")), None)
                if folder is not None:
                    await asyncio.to_thread(shutil.rmtree, folder, True)
            await send(message)

        await self._app(scope, _again(body, receive), watched)

    async def _with_local_path(self, body: bytes) -> bytes:
        asked = _parsed(body)
        name, path = asked.get("lora_name"), asked.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not path.startswith("/") or ".." in path:
            return body  # a name of the hub, or nonsense: vLLM's own business
        if await asyncio.to_thread(Path(path).exists):
            return body
        folder = self._mirror / path.lstrip("/")
        async with self._locks[name]:
            if not all((folder / file).is_file() for file in ADAPTER_FILES):
                await asyncio.to_thread(folder.parent.mkdir, 0o700, True, True)
                await asyncio.to_thread(fetch_adapter, self._url, self._headers, name, folder)
                logger.info("fetched %s from the trainer at %s", name, self._url)
        self._held[name] = folder
        return json.dumps(asked | {"lora_path": str(folder)}).encode()


def _has_key(scope: Scope) -> bool:
    """vLLM asks for its key further in; nobody without it shall make us fetch anything."""
    key = os.environ.get("VLLM_API_KEY")
    if not key:
        return True
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hmac.compare_digest(given, f"Bearer {key}".encode())


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def _read(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body") or len(body) > LIMIT:
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what really comes."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _refuse(send: Send, message: str) -> None:
    """In the form of vLLM's own errors, which the trainer reads."""
    body = json.dumps({"error": {"message": message, "type": "AdapterFilesError", "param": None, "code": 502}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 502, "headers": headers})
    await send({"type": "http.response.body", "body": body})
