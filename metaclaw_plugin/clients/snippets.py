"""What to paste into a client so that it talks to the gateway: a base URL and a key, nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Where a client is to be pointed."""

    url: str  # root URL of the gateway, without /v1
    agent: str
    key: str

    @property
    def model(self) -> str:
        return f"metaclaw/{self.agent}"


def _openai(to: Target) -> str:
    return f"""\
from openai import OpenAI

client = OpenAI(base_url="{to.url}/v1", api_key="{to.key}")
reply = client.chat.completions.create(model="{to.model}", messages=[{{"role": "user", "content": "Hello"}}])
print(reply.choices[0].message.content)
"""


def _anthropic(to: Target) -> str:
    return f"""\
from anthropic import Anthropic

client = Anthropic(base_url="{to.url}", api_key="{to.key}")
reply = client.messages.create(
    model="{to.model}", max_tokens=500, messages=[{{"role": "user", "content": "Hello"}}]
)
print(reply.content[0].text)
"""


def _claude_code(to: Target) -> str:
    return f"""\
export ANTHROPIC_BASE_URL={to.url}
export ANTHROPIC_AUTH_TOKEN={to.key}
export ANTHROPIC_MODEL={to.model}
claude
"""


def _codex(to: Target) -> str:
    return f"""\
# ~/.codex/config.toml
model = "{to.model}"
model_provider = "metaclaw"

[model_providers.metaclaw]
name = "MetaClaw"
base_url = "{to.url}/v1"
env_key = "METACLAW_KEY"
wire_api = "responses"

# and in the shell that starts Codex:
# export METACLAW_KEY={to.key}
"""


def _env(to: Target) -> str:
    return f"""\
export OPENAI_BASE_URL={to.url}/v1
export OPENAI_API_KEY={to.key}
export ANTHROPIC_BASE_URL={to.url}
export ANTHROPIC_API_KEY={to.key}
"""


def _curl(to: Target) -> str:
    return f"""\
curl {to.url}/v1/chat/completions -H "Authorization: Bearer {to.key}" -H "Content-Type: application/json" \\
  -d '{{"model": "{to.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""


SNIPPETS = {
    "openai": _openai,
    "anthropic": _anthropic,
    "claude-code": _claude_code,
    "codex": _codex,
    "env": _env,
    "curl": _curl,
}
