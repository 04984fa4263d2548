"""The fork's wire, as its clients speak it: training runs by ``session_id``, many at once."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from metaclaw_trainer.api import fork_wire as wire
from metaclaw_trainer.api.access import caller_of, services_of
from metaclaw_trainer.services import Services

router = APIRouter(tags=["training sessions"])
Wired = Annotated[Services, Depends(services_of)]
Caller = Annotated[str, Depends(caller_of)]


class Closed(BaseModel):
    """A session that has ended."""

    status: str = "ok"


@router.post("/v1/lora/create")
def create(body: wire.CreateRequest, services: Wired, caller: Caller) -> wire.CreateReply:
    """Open a training session: a fresh adapter on the base model."""
    made = services.runs.create(caller, body.base_model, body.rank)
    return wire.CreateReply(
        session_id=made.run.id,
        model=services.settings.base_model,
        rank=body.rank,
        trainable_params=f"{made.trainable / 1e6:.2f}M / {made.total / 1e6:.2f}M",
    )


@router.delete("/v1/lora/{session_id}")
def close(session_id: wire.SessionId, services: Wired, caller: Caller) -> Closed:
    """End a session; its checkpoints stay."""
    services.runs.close(services.runs.get(caller, session_id))
    return Closed()


@router.post("/v1/train/forward_backward")
def forward_backward(body: wire.ForwardBackwardRequest, services: Wired, caller: Caller) -> wire.ForwardBackwardReply:
    """Add the gradient of the loss, summed over the tokens of all datums."""
    run = services.runs.get(caller, body.session_id)
    lists = [(d.model_input_tokens, d.target_tokens, d.logprobs, d.advantages) for d in body.datums]
    result = services.runs.forward_backward(run, lists, body.loss_fn)
    return wire.ForwardBackwardReply(loss=result.loss, total_tokens=result.predicted, num_datums=len(body.datums))


@router.post("/v1/train/optim_step")
def optim_step(body: wire.OptimStepRequest, services: Wired, caller: Caller) -> wire.OptimStepReply:
    """One AdamW step on the gradient, which is then used up."""
    run = services.runs.get(caller, body.session_id)
    step, norm, loss = services.runs.optim_step(run, body.learning_rate)
    return wire.OptimStepReply(step=step, grad_norm=norm, avg_loss=loss, learning_rate=body.learning_rate)


@router.post("/v1/weights/save")
def save_weights(body: wire.SaveWeightsRequest, services: Wired, caller: Caller) -> wire.SaveWeightsReply:
    """Write the adapter as a PEFT folder and load it into every vLLM; from now on samples come from it.

    A vLLM that is down gets it when it is back.
    """
    run = services.runs.get(caller, body.session_id)
    saved, step = services.runs.save_weights(run, body.name)
    services.reconciler.once(retry_refused=True)
    return wire.SaveWeightsReply(adapter_path=saved.path, step=step)


@router.post("/v1/checkpoint/save")
def save_checkpoint(body: wire.SaveCheckpointRequest, services: Wired, caller: Caller) -> wire.SaveCheckpointReply:
    """Write all that training goes on from."""
    run = services.runs.get(caller, body.session_id)
    return wire.SaveCheckpointReply(path=str(services.runs.save_checkpoint(run, body.name)))


@router.post("/v1/checkpoint/load")
def load_checkpoint(body: wire.LoadCheckpointRequest, services: Wired, caller: Caller) -> wire.LoadCheckpointReply:
    """Go on from a checkpoint that this server gave to the same caller, in this session or another."""
    run = services.runs.get(caller, body.session_id)
    return wire.LoadCheckpointReply(step=services.runs.load_checkpoint(run, body.path))
