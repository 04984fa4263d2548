"""Sentence vectors without torch: static embeddings, ONNX Runtime, or any embeddings endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from numpy.typing import NDArray

from metaclaw_plugin.errors import ConfigError, SkillError
from metaclaw_plugin.settings import SkillSettings

Vectors = NDArray[np.float32]

MAX_WORDS = 256  # word pieces of one text that are read, as sentence models were trained


class Embedder(Protocol):
    """Turns texts into vectors of length 1."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of ``N`` texts, shape (N, D).

        Raises:
            SkillError: if the model or endpoint does not answer.
        """


class StaticEmbedder:
    """A model2vec model: one vector for each word piece, averaged. Microseconds a text."""

    def __init__(self, folder: str) -> None:
        from model2vec import StaticModel

        try:
            self._model = StaticModel.from_pretrained(folder, force_download=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"metaclaw.skills.embedder_model: {folder!r} is no model2vec model that is here: {error}"
            ) from error

    def embed(self, texts: Sequence[str]) -> Vectors:
        return _unit(self._model.encode(list(texts), max_length=MAX_WORDS, use_multiprocessing=False))


class OnnxEmbedder:
    """A sentence transformer exported to ONNX: a folder with ``model.onnx`` and ``tokenizer.json``; mean pooling."""

    def __init__(self, folder: str) -> None:
        try:
            onnxruntime = import_module("onnxruntime")
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(
                f"metaclaw.skills.embedder: onnx needs a package that is missing ({error.name}); "
                "pip install 'metaclaw-plugin[onnx]'"
            ) from error
        path = Path(folder).expanduser()
        for name in ("model.onnx", "tokenizer.json"):
            if not (path / name).is_file():
                raise ConfigError(f"metaclaw.skills.embedder_model: {path} has no {name}; export the model to it first")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the request path shares its cores
        try:
            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
            self._session = onnxruntime.InferenceSession(
                str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # both libraries raise classes of their own that derive from nothing narrower
            raise ConfigError(f"metaclaw.skills.embedder_model: what is in {path} cannot be read: {error}") from error
        self._tokenizer.enable_truncation(MAX_WORDS)
        self._tokenizer.enable_padding()
        self._inputs = {entry.name for entry in self._session.get_inputs()}

    def embed(self, texts: Sequence[str]) -> Vectors:
        encoded = self._tokenizer.encode_batch(list(texts))
        mask = np.array([entry.attention_mask for entry in encoded], np.int64)
        feed = {
            "input_ids": np.array([entry.ids for entry in encoded], np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        try:
            states = self._session.run(None, {name: feed[name] for name in self._inputs})[0]  # (N, T, D)
        except Exception as error:  # as above, and a KeyError for an input that no sentence model has
            raise SkillError(f"the ONNX model does not answer: {error}") from error
        weights = mask[:, :, None].astype(np.float32)
        return _unit((states * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9))


class EndpointEmbedder:
    """Any endpoint that speaks OpenAI's ``/embeddings``, the gateway's own included."""

    def __init__(self, url: str, model: str, key: str | None, timeout: float) -> None:
        self._url = url.rstrip("/") + "/embeddings"
        self._model = model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=False)
        self._width: int | None = None  # of the first vectors; others could not be compared with them

    def embed(self, texts: Sequence[str]) -> Vectors:
        try:
            reply = self._client.post(self._url, json={"model": self._model, "input": list(texts)})
            reply.raise_for_status()
            rows: list[dict[str, Any]] = sorted(reply.json()["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise SkillError(f"the embeddings endpoint {self._url} did not answer as it should: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise SkillError(f"the embeddings endpoint {self._url} sent {vectors.shape} for {len(texts)} texts")
        self._width = self._width or vectors.shape[1]
        if vectors.shape[1] != self._width or not np.isfinite(vectors).all():
            raise SkillError(
                f"the embeddings endpoint {self._url} sent vectors that fit no others; restart the gateway"
            )
        return _unit(vectors)


def load_embedder(settings: SkillSettings) -> Embedder | None:
    """The embedder that the settings name; ``None`` if retrieval is lexical.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    if settings.retrieval == "lexical":
        return None
    if settings.embedder is None or not settings.embedder_model:
        raise ConfigError(
            f"metaclaw.skills.retrieval: {settings.retrieval} needs metaclaw.skills.embedder (model2vec, onnx or "
            "endpoint) and embedder_model; or set retrieval: lexical"
        )
    if settings.embedder == "model2vec":
        return StaticEmbedder(settings.embedder_model)
    if settings.embedder == "onnx":
        return OnnxEmbedder(settings.embedder_model)
    if settings.embedder_url is None:
        raise ConfigError(
            "metaclaw.skills.embedder: endpoint needs metaclaw.skills.embedder_url, such as http://host/v1"
        )
    return EndpointEmbedder(
        settings.embedder_url, settings.embedder_model, settings.embedder_api_key, settings.embedder_timeout
    )


def _unit(vectors: Any) -> Vectors:
    array = np.asarray(vectors, np.float32)
    length = np.linalg.norm(array, axis=1, keepdims=True)
    return np.asarray(array / np.maximum(length, 1e-9), np.float32)
