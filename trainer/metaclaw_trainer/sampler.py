"""Whose weights answer a request for samples, and from which vLLM they come."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from metaclaw_trainer.errors import BadSamplingError, VllmRefusedError, VllmUnavailableError
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.runs import Runs
from metaclaw_trainer.versions import StoredVersions
from metaclaw_trainer.vllm_client import Drawn, VllmClient


class Sampler:
    """Draws from any vLLM that answers, taking turns."""

    def __init__(
        self,
        clients: Sequence[VllmClient],
        runs: Runs,
        versions: StoredVersions,
        reconciler: Reconciler,
        vocabulary: int,
    ) -> None:
        self._clients = list(clients)
        self._runs = runs
        self._versions = versions
        self._reconciler = reconciler
        self._vocabulary = vocabulary
        self._turn = itertools.count()

    def model_for(self, caller: str, session_id: str | None, asked: str | None = None) -> str | None:
        """The name in vLLM that answers: a served version asked for by name, else the weights that the session (or,
        without one, the caller) saved last. ``None``: the base model, while nothing was saved.

        Raises:
            UnknownSessionError: if the session is not the caller's.
        """
        if asked and any(wanted.name == asked for wanted in self._versions.served()):
            return asked
        saved = self._runs.newest_weights(caller, session_id)
        return saved.name if saved else None

    def place(self, model: str | None) -> tuple[VllmClient, str]:
        """A vLLM that holds ``model`` (``None``: the base model), and the model's name there.

        Raises:
            VllmUnavailableError: if none answers.
            VllmRefusedError: if those that answer do not hold it.
        """
        if not self._clients:
            raise VllmUnavailableError("no vLLM is configured: set metaclaw.trainer.vllm_urls")
        first = next(self._turn) % len(self._clients)
        trouble: Exception | None = None
        for client in self._clients[first:] + self._clients[:first]:
            try:
                models = client.models()
            except (VllmUnavailableError, VllmRefusedError) as error:
                trouble = error
                continue
            for entry in models:
                if entry.name == model or (model is None and entry.parent is None):
                    return client, entry.name
        if trouble is not None:
            raise trouble
        states = self._reconciler.once(retry_refused=True)
        for client, state in zip(self._clients, states, strict=True):
            if model in state.held:
                return client, str(model)
        reason = next((state.failed[model] for state in states if model in state.failed), "it does not serve it")
        raise VllmRefusedError(f"no vLLM holds {model}: {reason}")

    def draw(
        self, model: str | None, token_ids: Sequence[int], n: int, max_tokens: int, parameters: Mapping[str, Any]
    ) -> list[Drawn]:
        """Draw ``n`` continuations.

        Raises:
            BadSamplingError: if vLLM cannot sample so: a prompt that is too long, an unknown token id.
        """
        if (outside := max(token_ids)) >= self._vocabulary:
            raise BadSamplingError(f"token id {outside} is outside the vocabulary of {self._vocabulary}")
        client, name = self.place(model)
        try:
            return client.sample(name, token_ids, n=n, max_tokens=max_tokens, parameters=parameters)
        except VllmRefusedError as error:
            if error.status is not None and 400 <= error.status < 500 and error.status != 404:
                raise BadSamplingError(str(error)) from error
            raise
