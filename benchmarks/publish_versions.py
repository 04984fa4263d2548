"""Versions of benchmarks.publish: made, scored as the trainer would, and committed as its loop commits them."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path

import numpy as np
import torch
from metaclaw_hooks.types import AdapterVersion
from metaclaw_trainer.proof import Proof
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.publish_stage import Stage
from benchmarks.publish_streams import Streams
from benchmarks.telltale import Telltale, TelltaleMaker
from metaclaw_plugin.store.adapters import get_route
from metaclaw_plugin.store.engine import open_store

PUBLISH_TIMEOUT = 60.0  # seconds
PROOF_TOKENS = 32
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class Scorer:
    """Scores a text under an adapter with transformers and two products a layer: no code of the trainer or of vLLM."""

    def __init__(self, model: Path) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._random = np.random.default_rng(0)

    def proof(self, name: str, folder: Path) -> Proof:
        """Random tokens, and the log-probabilities of all but the first under the adapter in ``folder``; alpha is r."""
        tokens = self._random.integers(1, self._base.config.vocab_size, PROOF_TOKENS)
        weights = load_file(folder / "adapter_model.safetensors")
        hooks = [
            self._base.get_submodule(key.removeprefix("base_model.model.").removesuffix(DOWN)).register_forward_hook(
                functools.partial(_added, down, weights[key.removesuffix(DOWN) + UP])
            )
            for key, down in weights.items()
            if key.endswith(DOWN)
        ]
        with torch.no_grad():
            logits_TV = self._base(torch.tensor(tokens)[None]).logits[0]
        for hook in hooks:
            hook.remove()
        found = torch.log_softmax(logits_TV[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return Proof(name, tuple(int(token) for token in tokens), tuple(found.tolist()))


def _added(down: Tensor, up: Tensor, _layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
    return made + given[0] @ down.T @ up.T


class Publishing:
    """Commits versions, and waits until each one answers."""

    def __init__(self, stage: Stage, maker: TelltaleMaker, spoken: dict[str, Telltale]) -> None:
        self._maker, self._spoken = maker, spoken
        self._routes = open_store(f"sqlite:///{stage.home / 'metaclaw.db'}")
        self._store = open_trainer_store(f"sqlite:///{stage.trainer_home / 'queue.db'}")
        self._versions = StoredVersions(self._store, "benchmark")
        self._scorer = Scorer(maker.model)
        self._making = asyncio.Lock()

    async def publish(self, agent: str, streams: Streams) -> float:
        """One more version of ``agent``; returns the seconds from its commit to the first word of a reply by it."""
        name, committed = await self.commit(agent)
        return await self.first_word(agent, name, streams) - committed

    async def commit(self, agent: str, noise: float = 0.0) -> tuple[str, float]:
        """List one more version; its name, and when it was listed (``perf_counter``)."""
        head = self._versions.head(agent)
        number = head.newest + 1
        name = f"{agent}@v{number}"
        async with self._making:
            telltale = await asyncio.to_thread(self._maker.make, f"{agent}-v{number}", noise=noise)
            self._spoken[name] = telltale
            proof = await asyncio.to_thread(self._scorer.proof, name, telltale.path)
        version = AdapterVersion(
            agent=agent,
            number=number,
            base_model=str(self._maker.model),
            parent=head.head,
            trace_ids=(),
            step=number,
            metrics={},
            sha256=telltale.sha256,
            libraries={},
            path=str(telltale.path),
            created_at=time.time(),
        )
        started = time.perf_counter()
        if not await asyncio.to_thread(self._versions.commit, version, [], head.generation, proof):
            raise SystemExit(f"the trainer did not list {name}")
        return name, started

    async def first_word(self, agent: str, name: str, streams: Streams) -> float:
        """Ask as soon as ``name`` is on the agent's route, and until it answers; when its first word came.

        Asked before, the version that is to be replaced would be busy with the question.
        """
        turn, started = 0, time.perf_counter()
        streams.seen.pop(name, None)
        while name not in streams.seen:
            if time.perf_counter() - started > PUBLISH_TIMEOUT:
                raise SystemExit(f"{name} did not answer within {PUBLISH_TIMEOUT:.0f} s")
            if await asyncio.to_thread(self._routed, agent) != name:
                await asyncio.sleep(0.01)
                continue
            turn += 1
            await streams.ask(agent, f"Probe {turn} for {name}.", 2)
        return streams.seen[name]

    def _routed(self, agent: str) -> str:
        with self._routes.connect() as c:
            return f"{agent}@v{get_route(c, agent).version}"
