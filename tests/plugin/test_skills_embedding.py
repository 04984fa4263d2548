"""Sentence vectors: a real static model, a real HTTP endpoint, and retrieval that survives the loss of either."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model2vec import StaticModel
from onnx import TensorProto, helper, numpy_helper, save_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from metaclaw_plugin.errors import ConfigError, SkillError
from metaclaw_plugin.settings import SkillSettings
from metaclaw_plugin.skills.embedding import EndpointEmbedder, StaticEmbedder, Vectors, load_embedder
from metaclaw_plugin.skills.library import Library
from metaclaw_plugin.skills.query import Query
from metaclaw_plugin.skills.retrieval import LEXICAL_THRESHOLD, Retriever
from metaclaw_plugin.skills.skill_file import SHARED
from tests.skill_cases import put

WORDS = {"[UNK]": (0.0, 0.0), "car": (1.0, 0.0), "automobile": (0.95, 0.1), "bread": (0.0, 1.0), "loaf": (0.1, 0.95)}


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model2vec model of five words on disk."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("static") / "model"
    StaticModel(np.array(list(WORDS.values()), np.float32), tokenizer).save_pretrained(folder)
    return str(folder)


def library(root: Path) -> Library:
    put(root, SHARED, "fix-car", "car", "car")
    put(root, SHARED, "bake-bread", "bread", "bread")
    return Library(root)


def static(model: str, retrieval: str = "embeddings", **more: Any) -> SkillSettings:
    values = {"retrieval": retrieval, "embedder": "model2vec", "embedder_model": model} | more
    return SkillSettings.model_validate(values)


@pytest.mark.parametrize("retrieval", ["embeddings", "fused"])
def test_a_word_that_no_skill_holds_finds_the_skill_that_means_it(
    tmp_path: Path, static_model: str, retrieval: str
) -> None:
    settings = static(static_model, retrieval)
    retriever = Retriever(library(tmp_path), settings, load_embedder(settings))
    assert retriever.embed_new() == 2
    assert retriever.embed_new() == 0
    chosen = retriever.select("alpha", [{"role": "user", "content": "automobile"}])
    assert [skill.name for skill in chosen] == ["fix-car"]
    assert retriever.select("alpha", [{"role": "user", "content": "zebra"}]) == ()


def test_a_skill_without_a_vector_is_found_by_its_words_until_it_has_one(tmp_path: Path, static_model: str) -> None:
    settings = static(static_model, "fused")
    skills = library(tmp_path)
    retriever = Retriever(skills, settings, load_embedder(settings))
    assert [item.skill.name for item in retriever.rank("alpha", Query("car"))] == ["fix-car"]
    assert retriever.rank("alpha", Query("automobile")) == []
    retriever.embed_new()
    assert retriever.rank("alpha", Query("automobile"))[0].skill.name == "fix-car"
    put(tmp_path, "alpha", "bake-loaf", "loaf", "loaf")
    skills.refresh()
    assert "bake-loaf" in [item.skill.name for item in retriever.rank("alpha", Query("loaf"))]


class _Endpoint(BaseHTTPRequestHandler):
    answer: Any = None

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(type(self).answer(asked, self.headers["Authorization"])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        return


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_as_openai_defines_it_and_its_order_is_not_trusted(endpoint: ThreadingHTTPServer) -> None:
    asked = []

    def answer(body: Any, key: str) -> Any:
        asked.append((body, key))
        return {"data": [{"index": 1, "embedding": [0, 5]}, {"index": 0, "embedding": [3, 4]}]}

    _Endpoint.answer = staticmethod(answer)
    embedder = EndpointEmbedder(f"http://127.0.0.1:{endpoint.server_port}/v1", "m", "k", 5.0)
    np.testing.assert_allclose(embedder.embed(["a", "b"]), [[0.6, 0.8], [0.0, 1.0]], rtol=1e-6)
    assert asked == [({"model": "m", "input": ["a", "b"]}, "Bearer k")]


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{"index": 0, "embedding": "x"}]}, [], {"data": 5}])
def test_a_strange_answer_is_one_error(endpoint: ThreadingHTTPServer, answer: Any) -> None:
    _Endpoint.answer = staticmethod(lambda *_: answer)
    embedder = EndpointEmbedder(f"http://127.0.0.1:{endpoint.server_port}/v1", "m", None, 5.0)
    with pytest.raises(SkillError, match="embeddings endpoint"):
        embedder.embed(["a"])


class Fading:
    """An embedder that works for its first ``calls`` and is gone then."""

    def __init__(self, model: str, calls: int) -> None:
        self._model = StaticEmbedder(model)
        self._left = calls

    def embed(self, texts: Sequence[str]) -> Vectors:
        self._left -= 1
        if self._left < 0:
            raise SkillError("gone")
        return self._model.embed(texts)


def test_when_the_embedder_is_gone_words_decide(tmp_path: Path, static_model: str) -> None:
    retriever = Retriever(library(tmp_path), static(static_model, "fused"), Fading(static_model, calls=1))
    assert retriever.embed_new() == 2
    assert [item.skill.name for item in retriever.rank("alpha", Query("bread"))] == ["bake-bread"]


def test_words_keep_their_own_threshold_when_the_embedder_is_gone(tmp_path: Path, static_model: str) -> None:
    retriever = Retriever(library(tmp_path), static(static_model, "fused"), Fading(static_model, calls=1))
    retriever.embed_new()
    question = "bread marmalade crumpets teapot porcelain saucer doily kettle scones"
    [scored] = retriever.rank("alpha", Query(question))
    assert LEXICAL_THRESHOLD <= scored.relevance < retriever.threshold, "as vectors it would not do"
    assert [skill.name for skill in retriever.select("alpha", [{"role": "user", "content": question}])] == [
        "bake-bread"
    ]


@pytest.mark.parametrize(
    ("embedder", "retrieval", "threshold"),
    [("model2vec", "fused", 0.39), ("model2vec", "embeddings", 0.49), ("onnx", "fused", 0.20), (None, "lexical", 0.30)],
)
def test_each_kind_of_vectors_has_its_own_threshold(
    tmp_path: Path, embedder: str | None, retrieval: str, threshold: float
) -> None:
    settings = SkillSettings.model_validate({"retrieval": retrieval, "embedder": embedder})
    assert Retriever(library(tmp_path), settings).threshold == threshold
    chosen = settings.model_copy(update={"min_relevance": 0.7})
    assert Retriever(library(tmp_path), chosen).threshold == 0.7


def test_an_embedder_that_fails_is_not_asked_again_at_once(
    tmp_path: Path, static_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = Retriever(library(tmp_path), static(static_model, "fused"), Fading(static_model, calls=0))
    assert [retriever.embed_new() for _ in range(5)] == [0] * 5
    assert caplog.text.count("2 skills have no vector yet") == 1


def test_vectors_of_another_width_are_refused(endpoint: ThreadingHTTPServer) -> None:
    widths = iter((2, 3))
    _Endpoint.answer = staticmethod(lambda *_: {"data": [{"index": 0, "embedding": [1.0] * next(widths)}]})
    embedder = EndpointEmbedder(f"http://127.0.0.1:{endpoint.server_port}/v1", "m", None, 5.0)
    embedder.embed(["a"])
    with pytest.raises(SkillError, match="fit no others"):
        embedder.embed(["a"])


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"retrieval": "fused"}, "needs metaclaw.skills.embedder"),
        ({"retrieval": "fused", "embedder": "model2vec", "embedder_model": "/nowhere/at/all"}, "no model2vec model"),
        ({"retrieval": "fused", "embedder": "endpoint", "embedder_model": "m"}, "embedder_url"),
        ({"retrieval": "fused", "embedder": "onnx", "embedder_model": "/nowhere"}, "onnx"),
    ],
)
def test_an_embedder_that_cannot_be_is_named_with_its_remedy(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        load_embedder(SkillSettings.model_validate(settings))


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX model that looks up WORDS and 9 for padding, without a layer on top, so that all can be foretold."""
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0} | {word: i for i, word in enumerate(WORDS, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = numpy_helper.from_array(np.array([(9.0, 9.0), *WORDS.values()], np.float32), "table")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["texts", "pieces"])
    states = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["texts", "pieces", 2])
    node = helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])
    graph = helper.make_graph([node], "words", [ids], [states], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save_model(model, str(folder / "model.onnx"))
    return folder


def onnx(folder: Path, retrieval: str = "embeddings") -> SkillSettings:
    values = {"retrieval": retrieval, "embedder": "onnx", "embedder_model": str(folder)}
    return SkillSettings.model_validate(values)


def test_an_onnx_model_is_the_mean_of_its_words_whatever_they_are_padded_with(onnx_model: Path) -> None:
    embedder = load_embedder(onnx(onnx_model))
    assert embedder is not None
    together = embedder.embed(["car", "car bread car bread"])
    np.testing.assert_allclose(together, [[1, 0], [np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-6)
    np.testing.assert_allclose(embedder.embed(["car"])[0], together[0], atol=1e-6)
    assert embedder.embed(["bread " * 5000]).shape == (1, 2)


@pytest.mark.parametrize("retrieval", ["embeddings", "fused"])
def test_skills_are_found_by_meaning_with_an_onnx_model(tmp_path: Path, onnx_model: Path, retrieval: str) -> None:
    settings = onnx(onnx_model, retrieval)
    retriever = Retriever(library(tmp_path), settings, load_embedder(settings))
    retriever.embed_new()
    assert [scored.skill.name for scored in retriever.search("alpha", "loaf")][:1] == ["bake-bread"]


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_an_onnx_model_that_is_damaged_is_named(tmp_path: Path, onnx_model: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(onnx_model, folder)
    (folder / name).write_bytes(b"\x00nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_embedder(onnx(folder))


def test_an_onnx_model_that_fails_leaves_the_choice_to_words(tmp_path: Path, onnx_model: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(onnx_model, folder)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "car": 99, "bread": 98}, unk_token="[UNK]"))  # beyond its table
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = onnx(folder)
    embedder = load_embedder(settings)
    assert embedder is not None
    with pytest.raises(SkillError, match="ONNX"):
        embedder.embed(["car"])
    retriever = Retriever(library(tmp_path / "skills"), settings, embedder)
    retriever.embed_new()
    assert [scored.skill.name for scored in retriever.search("alpha", "car")] == ["fix-car"]


def test_a_missing_onnx_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    settings = {"retrieval": "fused", "embedder": "onnx", "embedder_model": "/nowhere"}
    with pytest.raises(ConfigError, match=r"metaclaw-plugin\[onnx\]"):
        load_embedder(SkillSettings.model_validate(settings))


def test_lexical_retrieval_loads_no_model() -> None:
    assert load_embedder(SkillSettings(embedder="model2vec", embedder_model="/nowhere")) is None
