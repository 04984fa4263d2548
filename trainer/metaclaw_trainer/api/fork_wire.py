"""Bodies of the fork's wire. ``session_id`` means a training run here, and only here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SessionId = Annotated[str, Field(pattern=r"^[a-f0-9]{32}$", description="From POST /v1/lora/create.")]
FileName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", description="1 to 63 of A-Z, a-z, 0-9, _ and -; never a path."),
]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=2**31, strict=True)]], Field(min_length=1)]
Numbers = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]


class Body(BaseModel):
    """Root: an unknown field is refused, so that nobody believes it was honoured."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CreateRequest(Body):
    base_model: str = Field(default="", max_length=1000, description="Must be the model that this trainer holds.")
    rank: int = Field(default=32, ge=1, le=512)


class CreateReply(Body):
    session_id: str
    status: Literal["ready"] = "ready"
    model: str
    rank: int
    trainable_params: str  # "4.88M / 139.40M"


class DatumBody(Body):
    """Four lists of length T: inputs are tokens[:-1], targets tokens[1:]; zeros on the prompt."""

    model_input_tokens: Tokens
    target_tokens: Tokens
    logprobs: Numbers
    advantages: Numbers


class ForwardBackwardRequest(Body):
    session_id: SessionId
    datums: list[DatumBody] = Field(min_length=1, max_length=4096)
    loss_fn: str = Field(default="importance_sampling", max_length=100)


class ForwardBackwardReply(Body):
    status: Literal["ok"] = "ok"
    loss: float  # sum over tokens of all datums
    total_tokens: int
    num_datums: int


class OptimStepRequest(Body):
    session_id: SessionId
    learning_rate: float = Field(default=1e-4, gt=0, le=1, allow_inf_nan=False)


class OptimStepReply(Body):
    status: Literal["ok"] = "ok"
    step: int
    grad_norm: float  # L2, before clipping
    avg_loss: float  # mean over the forward_backward calls that the step used
    learning_rate: float


class SaveWeightsRequest(Body):
    session_id: SessionId
    name: FileName | Literal[""] = ""


class SaveWeightsReply(Body):
    status: Literal["ok"] = "ok"
    adapter_path: str
    step: int


class SaveCheckpointRequest(Body):
    session_id: SessionId
    name: FileName


class SaveCheckpointReply(Body):
    status: Literal["ok"] = "ok"
    path: str


class LoadCheckpointRequest(Body):
    session_id: SessionId
    path: str = Field(min_length=1, max_length=600)


class LoadCheckpointReply(Body):
    status: Literal["ok"] = "ok"
    step: int


class SampleRequest(Body):
    tokens: Tokens
    num_samples: int = Field(default=1, ge=1, le=64)
    temperature: float = Field(default=0.7, ge=0, le=10, allow_inf_nan=False)
    max_tokens: int = Field(default=2048, ge=1, le=1_000_000)
    top_k: int = Field(default=50, ge=-1, le=1_000_000)  # 0 or -1: all
    top_p: float = Field(default=0.95, gt=0, le=1, allow_inf_nan=False)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(default=None, max_length=16)
    session_id: SessionId | None = None  # ours: whose weights, where the caller has several sessions


class SequenceBody(Body):
    tokens: list[int]
    logprobs: list[float]  # natural, before temperature
    stop_reason: str


class SampleReply(Body):
    sequences: list[SequenceBody]


ChatBody = dict[str, Any]  # OpenAI's, handed to vLLM as it is
