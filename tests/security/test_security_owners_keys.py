"""The keys in the owner's environment, with which LiteLLM asks the makers' own servers, open nothing to an agent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.gateway_server import GatewayServer, running_gateway
from tests.replay_upstream import ReplayUpstream
from tests.security.tried import tried

pytestmark = [pytest.mark.gateway]

SECRET = "canary-of-the-owners-environment"
MASTER = "sk-master-of-the-rich-0123456789"
SAID = [{"role": "user", "content": "hi case:text-whole"}]
# Everything that any of the routes wants, so that none is refused for what is missing.
BODY: dict[str, Any] = {
    "messages": SAID, "input": "x", "prompt": "x", "query": "x", "documents": ["a"], "max_tokens": 5, "voice": "alloy",
    "contents": [{"role": "user", "parts": [{"text": "x"}]}],
}  # fmt: skip
MODELS = (None, "gpt-4o", "openai/gpt-4o", "claude-sonnet-4-5", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.5-pro",
          "omni-moderation-latest", "cohere/rerank-v3.5", "hosted_vllm/x")  # fmt: skip
PATHS = (
    "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/images/generations", "/v1/audio/speech", "/v1/rerank",
    "/v2/rerank", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses",
    "/v1/responses/compact", "/v1/responses/input_tokens", "/v1/responses/resp_x/cancel",
    "/openai/v1/responses", "/openai/v1/responses/resp_x/cancel",
    "/engines/{}/chat/completions", "/engines/{}/embeddings", "/engines/{}/completions",
    "/openai/deployments/{}/chat/completions", "/openai/deployments/{}/completions",
    "/openai/deployments/{}/embeddings", "/openai/deployments/{}/images/generations",
    "/v1beta/models/{}:generateContent", "/v1beta/models/{}:countTokens", "/models/{}:streamGenerateContent",
)  # fmt: skip
FORMS = ("/v1/images/edits", "/openai/deployments/{}/images/edits", "/v1/audio/transcriptions")
OTHERS = (
    ("GET", "/v1/responses/resp_x"), ("DELETE", "/v1/responses/resp_x"), ("GET", "/v1/responses/resp_x/input_items"),
    ("GET", "/openai/v1/responses/resp_x"), ("DELETE", "/openai/v1/responses/resp_x"), ("GET", "/v1/models/gpt-4o"),
    ("GET", "/openai/deployments/x/chat/completions"), ("PUT", "/openai/deployments/x/chat/completions"),
    ("GET", "/openai/v1/responses"), ("PATCH", "/openai/v1/responses"), ("GET", "/openai/v1/models"),
    ("POST", "/openai/v1/chat/completions"), ("POST", "/openai/chat/completions"), ("POST", "/openai/responses"),
    ("GET", "/openai/responses/resp_x"), ("POST", "/openai/responses/resp_x/cancel"),
    ("POST", "/openai/deployments/x/moderations"), ("POST", "/openai/deployments/x/images/variations"),
    ("POST", "/openai/v1/embeddings"), ("POST", "/openai_passthrough/v1/chat/completions"),
    ("POST", "/anthropic/v1/messages"), ("POST", "/cohere/v1/rerank"), ("POST", "/mistral/v1/chat/completions"),
    ("POST", "/gemini/v1beta/models/gemini-2.5-pro:generateContent"),
)  # fmt: skip


class Canary(ThreadingHTTPServer):
    """The makers' servers, as far as LiteLLM's settings go: notes who comes, and with which key."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Noting)
        self.seen: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Noting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Canary)
        self.rfile.read(int(self.headers.get("content-length", "0")))
        self.server.seen.append(f"{self.requestline} {dict(self.headers)}")
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None: ...


for verb in ("POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
    setattr(_Noting, f"do_{verb}", _Noting.do_GET)


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    server = Canary()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture(scope="module")
def rich(
    canary: Canary, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    """A gateway of an owner whose environment holds keys for every maker, and leads to the canary."""
    with ReplayUpstream() as upstream, pytest.MonkeyPatch.context() as patch:
        for maker in ("OPENAI", "ANTHROPIC", "GEMINI", "COHERE", "MISTRAL"):
            patch.setenv(f"{maker}_API_KEY", SECRET)
            patch.setenv(f"{maker}_API_BASE", canary.url)
        for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
            patch.setenv(name, canary.url)
        patch.setenv("LITELLM_MASTER_KEY", MASTER)
        with running_gateway(tmp_path_factory.mktemp("rich"), upstream.url, free_port()) as server:
            yield server


@pytest.fixture
def client(rich: GatewayServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=rich.url, timeout=60, verify=False) as found:
        found.headers["authorization"] = f"Bearer {rich.key}"
        yield found


def came(canary: Canary, answer: httpx.Response, what: str) -> str | None:
    """What the canary saw of a request, and how it was answered; ``None``: nothing."""
    tried("requests that the owner's environment could have paid for")
    assert SECRET not in answer.text
    seen = "; ".join(canary.seen)
    canary.seen.clear()
    return f"{what}: {answer.status_code}, {seen[:200]}" if seen else None


@pytest.mark.parametrize("path", PATHS)
def test_no_model_that_no_deployment_has_is_asked_of_its_maker(client: httpx.Client, canary: Canary, path: str) -> None:
    paid = []
    for model in MODELS:
        body = BODY if model is None else BODY | {"model": model}
        answer = client.post(path.format(model or "x"), json=body)
        paid.append(came(canary, answer, f"{path} {model}"))
    assert not any(paid), "\n".join(filter(None, paid))


@pytest.mark.parametrize("path", FORMS)
def test_no_form_asks_a_maker(client: httpx.Client, canary: Canary, path: str) -> None:
    paid = []
    for model in MODELS:
        files = {"image": ("a.png", b"x", "image/png"), "file": ("a.wav", b"x", "audio/wav")}
        answer = client.post(path.format(model or "x"), data={"model": model} if model else {}, files=files)
        paid.append(came(canary, answer, f"{path} {model}"))
    assert not any(paid), "\n".join(filter(None, paid))


@pytest.mark.parametrize(("method", "path"), OTHERS)
def test_nothing_else_asks_a_maker(client: httpx.Client, canary: Canary, method: str, path: str) -> None:
    body = {} if method in ("GET", "DELETE") else {"json": BODY | {"model": "gpt-4o"}}
    paid = came(canary, client.request(method, path, **body), f"{method} {path}")
    assert paid is None


def test_the_keys_do_lead_to_the_canary(client: httpx.Client, canary: Canary) -> None:
    """LiteLLM's admin may use them, so what came from an agent would have been seen too."""
    client.headers["authorization"] = f"Bearer {MASTER}"
    client.post("/openai/v1/embeddings", json=BODY | {"model": "gpt-4o"})
    client.post("/v1/moderations", json={"input": "x"})
    assert len(canary.seen) == 2
    assert all(SECRET in seen for seen in canary.seen)
    canary.seen.clear()
