"""Record replies of a real vLLM, as it gives them to a client and as it gives them to the gateway.

    python tests/record_vllm_replies.py http://127.0.0.1:8000 > tests/data/vllm_replies.json

Each case is asked twice: as the client wrote it (``plain``), and with what the gateway adds to it (``rich``). The seed
makes vLLM draw the same tokens; a pair whose texts were cut into different events is asked again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

import httpx

ADDED = {"logprobs": True, "return_token_ids": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Note a number.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    },
}
FORCED = {"type": "function", "function": {"name": "note"}}
SAMPLED = {"temperature": 1.0, "top_p": 1.0, "seed": 7, "max_tokens": 3}
CASES: dict[str, dict[str, Any]] = {
    "text": SAMPLED,
    "one-token": SAMPLED | {"max_tokens": 1},
    "two-choices": SAMPLED | {"n": 2},
    "own-logprobs": SAMPLED | {"logprobs": True, "top_logprobs": 2},
    "own-token-ids": SAMPLED | {"return_token_ids": True},
    "tool-call": SAMPLED | {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 24},
    "tools-unused": SAMPLED | {"tools": [TOOL]},
    "top-logprobs-alone": SAMPLED | {"top_logprobs": 2},
    "too-long": SAMPLED | {"max_tokens": 1_000_000},
}  # fmt: skip


def ask(url: str, body: dict[str, Any]) -> tuple[int, str, str]:
    """Status, content type and body of one reply, with its id and time made constant."""
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    text = re.sub(r"chatcmpl-(tool-)?[0-9a-f]+", r"chatcmpl-\g<1>0123456789abcdef", reply.text)
    return reply.status_code, reply.headers["content-type"], re.sub(r'"created":\d+', '"created":1760000000', text)


def texts(body: str) -> list[Any]:
    """What of a reply must not depend on what else was asked for."""
    events = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")] or [json.loads(body)]
    found = [[choice.get("delta") or choice.get("message") for choice in event.get("choices", ())] for event in events]
    return [choices for choices in found if choices != [None]]  # an empty delta says nothing to a client


def record(url: str, name: str, stream: bool) -> dict[str, Any]:
    """One case, asked until both replies were cut alike."""
    body = {"model": "metaclaw-base", "messages": [{"role": "user", "content": f"case:{name}"}], "stream": stream}
    body |= CASES[name] | ({"stream_options": {"include_usage": True}} if stream and name == "text" else {})
    added = {} if "top_logprobs" in body and "logprobs" not in body else ADDED
    for _ in range(300):
        plain, rich = ask(url, body), ask(url, body | {"return_token_ids": True} | added)
        if plain[0] == rich[0] and (plain[0] != 200 or texts(plain[2]) == texts(rich[2])):
            break
    else:
        sys.exit(f"case {name}: vLLM cut its two replies differently every time")
    print(name, "stream" if stream else "whole", plain[0], file=sys.stderr)
    return {"request": body, "status": plain[0], "type": plain[1], "plain": events(plain[2]), "rich": events(rich[2])}


def events(body: str) -> list[str]:
    """The body as vLLM sends it: event by event, or in one piece."""
    return re.findall(r".*?\n\n|.+\Z", body, re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    url = parser.parse_args().url
    recorded = {
        f"{name}-{'stream' if stream else 'whole'}": record(url, name, stream) for name in CASES for stream in (0, 1)
    }
    json.dump(recorded, sys.stdout, indent=1)
