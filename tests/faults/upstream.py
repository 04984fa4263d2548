"""A vLLM as far as the wire goes: loads and unloads adapters, and every answer says which one spoke.

    python -m tests.faults.upstream PORT MODEL [PIECE_SECONDS]

An answer is ``<nonce> <model> <first 12 digits of the adapter file's sha256>`` and a few more words; the nonce is read
from the newest message. So who holds an answer, or its trace, can tell whose weights it came from and whose question
it answers. Token ids are a function of the text: see ``ids_of`` and ``prompt_ids``. Routes, fields and refusals are as
vLLM 0.32 has them; a restart forgets all adapters.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

BASE = "metaclaw-base"
EOS = 2
NONCE = re.compile(r"nonce=([0-9a-z-]+)")
CHUNK = 6  # characters to a token
ROLES = {"system": 11, "user": 12, "assistant": 13, "tool": 14}
WORDS = ("the river goes on and the day is long", "so it was said and so it is kept", "one more word and then no more")


def ids_of(text: str) -> list[int]:
    """Token ids of ``text``."""
    return [100 + zlib.crc32(text[i : i + CHUNK].encode()) % 40_000 for i in range(0, len(text), CHUNK)]


def logprob_of(token: int) -> float:
    """What every model here gives to ``token``, in nats: about that of one that knows nothing."""
    return -10.8 - (token % 64) / 64


def prompt_ids(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the next answer begins."""
    ids: list[int] = []
    for message in messages:
        ids += [ROLES[message["role"]], *ids_of(_text(message.get("content"))), EOS]
    return [*ids, ROLES["assistant"]]


def answer_text(nonce: str, model: str, digest: str) -> str:
    """What ``model`` says to a question with ``nonce``."""
    return f"{nonce} {model} {digest} {WORDS[zlib.crc32(nonce.encode()) % len(WORDS)]}"


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return str(content or "")


class Upstream:
    """The server; holds which adapters are loaded from where."""

    def __init__(self, model: str, pause: float) -> None:
        self._model = model
        self._pause = pause
        self._adapters: dict[str, tuple[str, str]] = {}  # name -> folder, digest

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        entries = [{"id": BASE, "object": "model", "root": self._model, "parent": None}]
        entries += [{"id": n, "object": "model", "root": f, "parent": BASE} for n, (f, _) in self._adapters.items()]
        return web.json_response({"object": "list", "data": entries})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], body["lora_path"]
        if name in self._adapters:
            return _refusal(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        try:
            weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
        except OSError:
            return _refusal(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        self._adapters[name] = (folder, hashlib.sha256(weights).hexdigest()[:12])
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self._adapters.pop(name, None) is None:
            return _refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    def _digest(self, model: str) -> str | None:
        if model == BASE:
            return "0" * 12
        return self._adapters[model][1] if model in self._adapters else None

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._digest(body["model"]) is None:
            return _unknown(body["model"])
        choice: dict[str, Any] = {"index": 0, "text": " the", "finish_reason": "length", "token_ids": [262]}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = _scored(body["prompt"])
        answer = {"id": _new_id(), "object": "text_completion", "model": body["model"], "choices": [choice]}
        return web.json_response(answer)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model = body["model"]
        digest = self._digest(model)
        if digest is None:
            return _unknown(model)
        nonces = NONCE.findall(_text(body["messages"][-1].get("content")))
        text = answer_text(nonces[-1] if nonces else "none", model, digest)
        rich = bool(body.get("logprobs") and body.get("return_token_ids"))
        prompt = prompt_ids(body["messages"]) if rich else None
        head = {"id": _new_id(), "created": int(time.time()), "model": model}
        pieces = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
        usage = {"prompt_tokens": len(prompt or ()), "completion_tokens": len(pieces) + 1}
        usage["total_tokens"] = sum(usage.values())
        if not body.get("stream"):
            await asyncio.sleep(self._pause * 4)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            choice |= {"logprobs": None, "stop_reason": None, **(_tokens([*pieces, ""], text) if rich else {})}
            whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            if body.get("prompt_logprobs") is not None:  # scores the conversation as it stands
                prompt = prompt_ids(body["messages"])
                whole["prompt_logprobs"] = _scored(prompt)
            return web.json_response(whole if prompt is None else whole | {"prompt_token_ids": prompt})
        return await self._stream(request, body, head, pieces, prompt, usage)

    async def _stream(
        self,
        request: web.Request,
        body: Mapping[str, Any],
        head: Mapping[str, Any],
        pieces: Sequence[str],
        prompt: list[int] | None,
        usage: Mapping[str, int],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        chunk = {**head, "object": "chat.completion.chunk"}

        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            data = json.dumps({**chunk, "choices": choices, **more}, separators=(",", ":"))
            await response.write(f"data: {data}\n\n".encode())

        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        await send([first], **({} if prompt is None else {"prompt_token_ids": prompt}))
        step = max(1, len(pieces) // 5)  # several tokens to an event, as when vLLM batches
        for start in range(0, len(pieces), step):
            await asyncio.sleep(self._pause)
            part, last = pieces[start : start + step], start + step >= len(pieces)
            choice = {"index": 0, "delta": {"content": "".join(part)}, "finish_reason": "stop" if last else None}
            tokens = [*part, ""] if last else part
            choice |= {"logprobs": None} if prompt is None else _tokens(tokens, "".join(part))
            await send([choice])
        if (body.get("stream_options") or {}).get("include_usage"):
            await send([], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _tokens(pieces: Sequence[str], text: str) -> dict[str, Any]:
    """Ids and log-probabilities of ``pieces``; an empty one is the end of the answer."""
    ids = [*ids_of(text), *([EOS] if pieces and not pieces[-1] else [])]
    entries = [
        {"token": piece, "logprob": logprob_of(token), "bytes": None, "top_logprobs": []}
        for piece, token in zip(pieces, ids, strict=True)
    ]
    return {"token_ids": ids, "logprobs": {"content": entries}}


def _scored(ids: Sequence[int]) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt, as vLLM gives them: none for its first token."""
    return [None, *({str(token): {"logprob": logprob_of(token)}} for token in ids[1:])]


def _refusal(status: int, message: str, kind: str) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
    )


def _unknown(model: str) -> web.Response:
    return _refusal(404, f"The model `{model}` does not exist.", "NotFoundError")


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def main() -> None:
    port, model = int(sys.argv[1]), sys.argv[2]
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.02
    web.run_app(Upstream(model, pause).app(), host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()
