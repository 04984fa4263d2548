"""The fork's client protocol over HTTP, two sessions at once, answered by a real vLLM."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_trainer.batching import datum_of_lists
from metaclaw_trainer.settings import TrainerSettings
from openai import OpenAI

from tests.trainer_server import TrainerServer, serving
from tests.vllm_server import VllmProcess

pytestmark = pytest.mark.vllm

PROMPT = [100, 200, 300, 400, 500, 600]


def settings_for(model: Path, home: Path, *urls: str, **others: Any) -> TrainerSettings:
    return TrainerSettings(
        base_model=str(model), home=home, device="cpu", dtype="float32", rank=4, alpha=8.0, nice=0,
        vllm_urls=list(urls), **others,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tiny_vllm: VllmProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerServer]:
    home = tmp_path_factory.mktemp("home")
    with serving(settings_for(tiny_vllm.model, home, tiny_vllm.url)) as server:
        yield server
        server.services.versions.set_served([])
        for run in list(server.services.runs.wanted()):
            server.services.runs.close(server.services.runs.get("", run.name.split(".")[1]))
        server.services.reconciler.once()


class Session:
    """The fork's training client, in the few lines that the protocol takes."""

    def __init__(self, http: httpx.Client, model: str, rank: int = 4) -> None:
        self.http = http
        reply = self.post("/v1/lora/create", base_model=model, rank=rank)
        assert (reply["status"], reply["rank"], reply["model"]) == ("ready", rank, model)
        trainable, total = reply["trainable_params"].split(" / ")
        assert float(trainable.removesuffix("M")) < float(total.removesuffix("M"))
        self.id = reply["session_id"]

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        response = self.http.post(route, json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def learn(self, token: int, steps: int = 1) -> list[dict[str, Any]]:
        """Make ``token`` likely after PROMPT."""
        tokens = [*PROMPT, token, token, token]
        response = [0.0] * (len(PROMPT) - 1)
        datum = {
            "model_input_tokens": tokens[:-1],
            "target_tokens": tokens[1:],
            "logprobs": [*response, -1.0, -1.0, -1.0],
            "advantages": [*response, 1.0, 1.0, 1.0],
        }
        replies = []
        for _ in range(steps):
            seen = self.post("/v1/train/forward_backward", session_id=self.id, datums=[datum], loss_fn="cross_entropy")
            assert (seen["status"], seen["num_datums"], seen["total_tokens"]) == ("ok", 1, 3)
            moved = self.post("/v1/train/optim_step", session_id=self.id, learning_rate=0.02)
            assert moved["avg_loss"] == pytest.approx(seen["loss"])
            replies.append(moved)
        return replies

    def save(self, name: str = "openclaw_lora") -> dict[str, Any]:
        return self.post("/v1/weights/save", session_id=self.id, name=name)

    def draw(self, **others: Any) -> list[dict[str, Any]]:
        body = {"tokens": PROMPT, "num_samples": 1, "temperature": 0.0, "max_tokens": 3, "top_k": -1, "top_p": 1.0}
        return list(self.post("/v1/sample", session_id=self.id, **{**body, "stop": [], **others})["sequences"])


def model_of(trainer: TrainerServer) -> str:
    return trainer.services.settings.base_model


@pytest.mark.law(4)
def test_two_sessions_at_once_learn_apart_and_each_is_answered_by_its_own_weights(trainer: TrainerServer) -> None:
    sessions = {token: Session(trainer.http, model_of(trainer)) for token in (1234, 4321)}
    failures: list[BaseException] = []

    def teach(token: int) -> None:
        try:
            replies = sessions[token].learn(token, steps=12)
            assert [r["step"] for r in replies] == list(range(1, 13))
            assert replies[-1]["avg_loss"] < replies[0]["avg_loss"]
            for _ in range(2):  # the fork saves under one name again and again
                saved = sessions[token].save()
            assert (saved["status"], saved["step"]) == ("ok", 12)
            assert (Path(saved["adapter_path"]) / "adapter_config.json").is_file()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=teach, args=(token,)) for token in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for token, session in sessions.items():
        [drawn] = session.draw()
        assert drawn["tokens"] == [token] * 3
        assert drawn["stop_reason"] == "length"
        ours = trainer.services.engine.call(
            lambda e, t=token, s=session: e.logprobs(
                f"_run_{s.id}",
                [datum_of_lists([*PROMPT, t, t], [*PROMPT[1:], t, t, t], [0.0] * 5 + [-1.0] * 3, [0.0] * 8)],
            )
        )
        assert drawn["logprobs"] == pytest.approx(ours[0].tolist(), abs=0.05)


def test_a_session_without_saved_weights_is_answered_by_the_base_model(trainer: TrainerServer) -> None:
    session = Session(trainer.http, model_of(trainer))
    [drawn] = session.draw()
    answer = trainer.services.vllm[0].sample("metaclaw-base", PROMPT, max_tokens=3, parameters={"temperature": 0.0})
    assert drawn["tokens"] == list(answer[0].token_ids)
    several = session.draw(num_samples=3, temperature=1.0, top_k=5, stop=["a"])
    assert len(several) == 3
    assert all(len(one["tokens"]) == len(one["logprobs"]) for one in several)


def test_training_from_a_checkpoint_is_training_that_was_never_interrupted(trainer: TrainerServer) -> None:
    whole = Session(trainer.http, model_of(trainer))
    whole.learn(77, steps=2)
    path = whole.post("/v1/checkpoint/save", session_id=whole.id, name="halfway")["path"]
    expected = whole.learn(77, steps=2)
    resumed = Session(trainer.http, model_of(trainer), rank=2)  # the checkpoint brings its own rank
    assert resumed.post("/v1/checkpoint/load", session_id=resumed.id, path=path) == {"status": "ok", "step": 2}
    assert resumed.learn(77, steps=2) == expected


def test_chat_is_answered_with_the_weights_saved_last(trainer: TrainerServer) -> None:
    session = Session(trainer.http, model_of(trainer))
    client = OpenAI(base_url=f"{trainer.url}/v1", api_key="unused")
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]}]
    common: dict[str, Any] = {"model": "metaclaw", "messages": parts, "max_tokens": 4, "temperature": 0.0}
    extra = {"session_id": session.id}
    base = client.chat.completions.create(**common, extra_body=extra, logprobs=True)
    assert base.model == "metaclaw-base"
    assert base.choices[0].message.content
    session.learn(9, steps=1)
    session.save("first")
    whole = client.chat.completions.create(**common, extra_body=extra)
    assert whole.model == f"run.{session.id}.1"
    assert client.chat.completions.create(**common).model == whole.model, "without a session: saved last"
    stream = client.chat.completions.create(**common, extra_body=extra, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content


def test_weights_that_vllm_forgot_are_loaded_again_when_they_are_asked_for(trainer: TrainerServer) -> None:
    session = Session(trainer.http, model_of(trainer))
    session.learn(9)
    session.save()
    [before] = session.draw()
    trainer.services.vllm[0].unload(f"run.{session.id}.1")
    assert session.draw() == [before]


def test_closing_a_session_takes_its_weights_out_of_vllm(trainer: TrainerServer) -> None:
    session = Session(trainer.http, model_of(trainer))
    session.learn(9)
    folder = Path(session.save()["adapter_path"])
    assert trainer.http.delete(f"/v1/lora/{session.id}").json() == {"status": "ok"}
    trainer.services.reconciler.once()
    assert f"run.{session.id}.1" not in {m.name for m in trainer.services.vllm[0].models()}
    assert not folder.exists()
    gone = trainer.http.post("/v1/train/optim_step", json={"session_id": session.id})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_session")


def test_what_vllm_cannot_sample_is_the_callers_error(trainer: TrainerServer) -> None:
    session = Session(trainer.http, model_of(trainer))
    for body in ({"tokens": [10**8]}, {"tokens": [5] * 100_000}):
        response = trainer.http.post("/v1/sample", json={"session_id": session.id, "max_tokens": 1, **body})
        assert (response.status_code, response.json()["error"]["code"]) == (422, "bad_sampling")
    chat = trainer.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "top_p": 7})
    assert chat.status_code == 400
    assert "vLLM refused" in chat.json()["error"]["message"]
