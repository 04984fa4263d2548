"""The trainer, over HTTP: one method for each route of ``metaclaw_hooks.wire``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import httpx
from metaclaw_hooks.names import slug
from metaclaw_hooks.types import Sample
from metaclaw_hooks.wire import (
    AgentsReply,
    AgentStatus,
    AgentTraining,
    HeadRequest,
    HealthReply,
    HooksReply,
    RecallReply,
    RecallRequest,
    RewardChange,
    RewardsReply,
    RewardsRequest,
    SampleBody,
    SamplesReply,
    SamplesRequest,
    ServedReply,
    ServedRequest,
    TrainReply,
    VersionBody,
    VersionsReply,
    Wire,
)
from pydantic import ValidationError

from metaclaw_plugin.errors import TrainerFullError, TrainerRefusedError, TrainerUnavailableError

CONNECT_TIMEOUT = 5.0  # seconds
ANSWER_TIMEOUT = 60.0  # seconds; loading adapters into vLLM is the slowest thing asked for

WireT = TypeVar("WireT", bound=Wire)


class TrainerClient:
    """Asks the trainer at ``url``. Every method may raise ``TrainerUnavailableError`` (try again later; its kind
    ``TrainerFullError``: this agent's queue is full) and ``TrainerRefusedError`` (it answered, and will not)."""

    def __init__(self, http: httpx.AsyncClient, url: str, api_key: str | None = None) -> None:
        self._http = http
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def health(self) -> HealthReply:
        return await self._ask(HealthReply, "GET", "/v1/health")

    async def send_samples(self, samples: Sequence[Sample]) -> SamplesReply:
        """Hand over at most 512 samples; sending one again does no harm."""
        bodies = [SampleBody.of(sample) for sample in samples]
        return await self._ask(SamplesReply, "POST", "/v1/samples", SamplesRequest(samples=bodies))

    async def recall(self, trace_ids: Sequence[str]) -> RecallReply:
        """Take what is still queued of these traces (at most 10,000) out of the queue."""
        return await self._ask(RecallReply, "POST", "/v1/samples/recall", RecallRequest(trace_ids=list(trace_ids)))

    async def set_rewards(self, rewards: Mapping[str, float]) -> RewardsReply:
        """Change the rewards of at most 10,000 traces, by id, where they are not trained yet."""
        changes = [RewardChange(trace_id=trace, reward=reward) for trace, reward in rewards.items()]
        return await self._ask(RewardsReply, "POST", "/v1/samples/rewards", RewardsRequest(rewards=changes))

    async def agents(self) -> list[AgentStatus]:
        return (await self._ask(AgentsReply, "GET", "/v1/agents")).agents

    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus:
        return await self._ask(AgentStatus, "PUT", f"/v1/agents/{slug(agent)}", training)

    async def versions(self, after: int = 0, wait: float = 0.0) -> list[VersionBody]:
        """New versions past the cursor ``after``, ascending; while there is none, the answer takes ``wait`` seconds."""
        return (await self._ask(VersionsReply, "GET", f"/v1/versions?after={int(after)}&wait={wait:g}")).versions

    async def set_served(self, versions: Sequence[str], keep: Sequence[str] = ()) -> ServedReply:
        """The whole set of versions, as ``agent@vN``, that vLLM shall hold; the files of ``keep`` stay besides."""
        body = ServedRequest(versions=list(versions), keep=list(keep))
        return await self._ask(ServedReply, "PUT", "/v1/served", body)

    async def set_head(self, agent: str, version: int) -> None:
        """Let the next step start from ``version`` (0: from the base model)."""
        await self._send("POST", f"/v1/agents/{slug(agent)}/head", HeadRequest(version=version))

    async def hooks(self) -> HooksReply:
        """Plugins of the trainer's process, and what they did."""
        return await self._ask(HooksReply, "GET", "/v1/hooks")

    async def train(self, agent: str) -> TrainReply:
        """Ask for a step now, with what is queued."""
        return await self._ask(TrainReply, "POST", f"/v1/agents/{slug(agent)}/train")

    async def _ask(self, reply: type[WireT], method: str, path: str, body: Wire | None = None) -> WireT:
        answer = await self._send(method, path, body)
        try:
            return reply.model_validate_json(answer.content)
        except ValidationError as error:
            raise TrainerRefusedError(
                f"{method} {self._url}{path}: the answer is not the trainer's ({error.error_count()} fields differ); "
                "check metaclaw.rl.remote_url and that both sides run the same version"
            ) from error

    async def _send(self, method: str, path: str, body: Wire | None = None) -> httpx.Response:
        try:
            answer = await self._http.request(
                method,
                self._url + path,
                content=None if body is None else body.model_dump_json(),
                headers=self._headers | ({} if body is None else {"content-type": "application/json"}),
                timeout=httpx.Timeout(ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT),
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrainerUnavailableError(
                f"the trainer at {self._url} did not answer {method} {path}: {type(error).__name__}"
            ) from error
        if answer.status_code == 429:
            raise TrainerFullError(f"the trainer at {self._url} has no room: {_reason(answer)}")
        if answer.status_code >= 500 or answer.status_code in (408, 425):
            raise TrainerUnavailableError(
                f"the trainer at {self._url} answered {answer.status_code}: {_reason(answer)}"
            )
        if not answer.is_success:
            raise TrainerRefusedError(
                f"the trainer at {self._url} refused {method} {path} with {answer.status_code}: {_reason(answer)}",
                answer.status_code,
            )
        return answer


def _reason(answer: httpx.Response) -> str:
    """The message of the trainer's error body, shortened."""
    try:
        error: Any = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase or "no reason given"
    return str(error)[:300]
