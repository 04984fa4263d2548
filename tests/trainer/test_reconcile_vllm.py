"""Bringing vLLM to the wanted set, over a network that is an argument: what vLLM answers is scripted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_trainer.errors import VllmRefusedError, VllmUnavailableError
from metaclaw_trainer.proof import Proof, Prover
from metaclaw_trainer.reconcile import Reconciler
from metaclaw_trainer.versions import Wanted
from metaclaw_trainer.vllm_client import VllmClient


@dataclass
class Network:
    """Answers as vLLM 0.32 does (routes, bodies and statuses read from its source)."""

    loaded: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fault: httpx.Response | type[httpx.TransportError] | None = None  # instead of every answer
    broken: set[str] = field(default_factory=set)  # names whose load fails
    mute: set[str] = field(default_factory=set)  # names that are loaded and do not answer
    logprob: float = -2.0  # that every token of a prompt gets

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if isinstance(self.fault, httpx.Response):
            return self.fault
        if self.fault is not None:
            raise self.fault("broken", request=request)
        if request.url.path == "/v1/models":
            base = {"id": "metaclaw-base", "root": "/model", "parent": None}
            cards = [{"id": n, "root": r, "parent": "metaclaw-base"} for n, r in self.loaded.items()]
            return httpx.Response(200, json={"object": "list", "data": [base, *cards]})
        body = json.loads(request.content)
        if request.url.path == "/v1/completions":
            return self._score(body)
        name = body["lora_name"]
        self.calls.append(f"{request.url.path.split('/')[-1].removesuffix('_lora_adapter')} {name}")
        if request.url.path == "/v1/load_lora_adapter":
            if name in self.broken:
                return _error(500, "LoRA rank 64 is greater than max_lora_rank 16")
            if name in self.loaded:
                return _error(400, f"The lora adapter '{name}' has already been loaded.")
            self.loaded[name] = body["lora_path"]
            return httpx.Response(200, text="Success")
        if name not in self.loaded:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        return httpx.Response(200, text="Success")

    def _score(self, body: dict[str, Any]) -> httpx.Response:
        if "prompt_logprobs" not in body:
            self.calls.append(f"hear {body['model']}")
            choices = [] if body["model"] in self.mute else [{"text": " there"}]
            return httpx.Response(200, json={"model": body["model"], "choices": choices})
        self.calls.append(f"score {body['model']}")
        entries = [None, *({str(token): {"logprob": self.logprob}} for token in body["prompt"][1:])]
        return httpx.Response(200, json={"choices": [{"prompt_logprobs": entries}]})


def _error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "x", "code": status}})


class Stage:
    """Two replicas and a folder of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proofs: dict[str, Proof] = {}
        self.networks = [Network(), Network()]
        self.wanted: list[Wanted] = []
        clients = [
            VllmClient(f"http://vllm-{i}", transport=httpx.MockTransport(n)) for i, n in enumerate(self.networks)
        ]
        self.reconciler = Reconciler(clients, lambda: self.wanted, folder, prover=Prover(self.proofs.get, 0.3))

    def want(self, *names: str) -> None:
        self.wanted = [Wanted(name, str(self.folder / name)) for name in names]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_every_replica_gets_what_is_missing_and_loses_what_is_not_wanted(stage: Stage) -> None:
    stage.want("a@v1", "b@v1")
    stage.reconciler.once()
    stage.want("b@v1", "b@v2")
    states = stage.reconciler.once()
    for network in stage.networks:
        assert set(network.loaded) == {"b@v1", "b@v2"}
        assert network.calls == [
            "load a@v1",
            "hear a@v1",
            "load b@v1",
            "hear b@v1",
            "load b@v2",
            "hear b@v2",
            "unload a@v1",
        ]
    assert stage.reconciler.outcome(["b@v1", "b@v2"], states) == (["b@v1", "b@v2"], {})


def test_a_vllm_that_was_restarted_gets_its_adapters_again(stage: Stage) -> None:
    stage.want("a@v1", "b@v1")
    stage.reconciler.once()
    stage.networks[1].loaded.clear()
    stage.networks[1].calls.clear()
    stage.reconciler.once()
    again = ["load a@v1", "hear a@v1", "load b@v1", "hear b@v1"]
    assert [network.calls for network in stage.networks] == [again, again]


def test_nothing_is_loaded_twice(stage: Stage) -> None:
    stage.want("a@v1")
    for _ in range(3):
        stage.reconciler.once()
    assert stage.networks[0].calls == ["load a@v1", "hear a@v1"]


def test_a_version_that_is_loaded_and_does_not_answer_is_not_held(stage: Stage) -> None:
    stage.networks[1].mute = {"a@v1"}
    stage.want("a@v1")
    held, failed = stage.reconciler.outcome(["a@v1"], stage.reconciler.once())
    assert held == []
    assert failed["a@v1"] == "vLLM at http://vllm-1 does not answer as a@v1"
    assert stage.networks[1].loaded == {}


def test_adapters_of_others_are_left_alone(stage: Stage) -> None:
    stage.networks[0].loaded = {"theirs": "/elsewhere/lora", "hub": "org/lora", "sly": f"{stage.folder}/../x"}
    stage.reconciler.once()
    assert set(stage.networks[0].loaded) == {"theirs", "hub", "sly"}


def test_a_name_that_vllm_holds_from_another_folder_is_replaced(stage: Stage) -> None:
    stage.networks[0].loaded = {"a@v1": "/an/old/home/a/v1"}
    stage.want("a@v1")
    stage.reconciler.once()
    assert stage.networks[0].loaded == {"a@v1": str(stage.folder / "a@v1")}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (httpx.ConnectError, "cannot be reached"),
        (httpx.ReadTimeout, "did not answer /v1/models in time"),  # it hangs
        (httpx.RemoteProtocolError, "cannot be reached"),
        (httpx.Response(500, text="engine dead"), "500 engine dead"),
        (httpx.Response(200, text="<html>"), "something that is no JSON"),
    ],
)
def test_a_replica_that_is_down_holds_up_no_other_and_is_brought_up_to_date_later(
    stage: Stage, fault: httpx.Response | type[httpx.TransportError], reason: str
) -> None:
    stage.networks[0].fault = fault
    stage.want("a@v1")
    states = stage.reconciler.once()
    held, failed = stage.reconciler.outcome(["a@v1"], states)
    assert held == []
    assert reason in failed["a@v1"]
    assert stage.networks[1].loaded
    stage.networks[0].fault = None
    assert stage.reconciler.outcome(["a@v1"], stage.reconciler.once())[0] == ["a@v1"]


def test_an_adapter_that_vllm_refuses_is_not_tried_every_time_and_harms_no_other(stage: Stage) -> None:
    for network in stage.networks:
        network.broken = {"bad@v1"}
    stage.want("bad@v1", "good@v1")
    for _ in range(3):
        states = stage.reconciler.once()
    held, failed = stage.reconciler.outcome(["bad@v1", "good@v1"], states)
    assert held == ["good@v1"]
    assert "greater than max_lora_rank" in failed["bad@v1"]
    assert stage.networks[0].calls.count("load bad@v1") == 1
    stage.networks[0].broken = stage.networks[1].broken = set()
    assert stage.reconciler.outcome(["bad@v1"], stage.reconciler.once(retry_refused=True))[0] == ["bad@v1"]


def test_each_replica_must_score_a_stored_trace_as_the_trainer_did(stage: Stage) -> None:
    stage.proofs["a@v1"] = Proof("s1", (5, 6, 7), (-2.2, -1.9))
    stage.networks[1].logprob = -4.0  # another base model, say
    stage.want("a@v1", "b@v1")
    states = stage.reconciler.once()
    held, failed = stage.reconciler.outcome(["a@v1", "b@v1"], states)
    assert held == ["b@v1"]
    assert "http://vllm-1 and the trainer disagree about a@v1 by 1.95 nats a token" in failed["a@v1"]
    assert stage.networks[0].calls == ["load a@v1", "score a@v1", "load b@v1", "hear b@v1"]
    assert set(stage.networks[0].loaded) == {"a@v1", "b@v1"}
    assert set(stage.networks[1].loaded) == {"b@v1"}
    stage.networks[1].logprob = -2.0
    states = stage.reconciler.once(retry_refused=True)
    assert stage.reconciler.outcome(["a@v1"], states) == (["a@v1"], {})
    assert stage.networks[0].calls.count("score a@v1") == 1  # once it is proven it is not asked again
    stage.networks[0].loaded.clear()  # unless vLLM was restarted
    stage.reconciler.once()
    assert stage.networks[0].calls.count("score a@v1") == 2


def test_what_was_there_before_the_trainer_began_is_asked_too_and_left_where_it_is(stage: Stage) -> None:
    stage.proofs["a@v1"] = Proof("s1", (5, 6), (-9.0,))
    stage.want("a@v1")
    stage.networks[0].loaded = {"a@v1": str(stage.folder / "a@v1")}  # it may be serving
    states = stage.reconciler.once()
    assert "disagree about a@v1" in states[0].failed["a@v1"]
    assert "may be answering, so it is left; start that vLLM again" in states[0].failed["a@v1"]
    assert set(stage.networks[0].loaded) == {"a@v1"}


@pytest.mark.parametrize("away", [httpx.ConnectError, httpx.ReadTimeout, httpx.Response(502, text="bad gateway")])
def test_a_vllm_that_was_away_is_asked_again_though_its_adapters_are_back_before_the_next_look(
    stage: Stage, away: httpx.Response | type[httpx.TransportError]
) -> None:
    stage.proofs["a@v1"] = Proof("s1", (5, 6), (-2.0,))
    stage.want("a@v1")
    assert stage.reconciler.once()[0].held == {"a@v1"}
    stage.networks[0].fault = away
    stage.reconciler.once()
    stage.networks[0].fault = None  # started again on another base model, and a gateway had a@v1 loaded at once
    stage.networks[0].logprob = -9.0
    [state, other] = stage.reconciler.once()
    assert (state.held, other.held) == (set(), {"a@v1"})
    assert "disagree about a@v1 by 7.00 nats a token" in state.failed["a@v1"]
    assert stage.networks[0].calls.count("score a@v1") == 2
    assert stage.networks[1].calls.count("score a@v1") == 1


def test_the_thread_keeps_looking(stage: Stage) -> None:
    reconciler = Reconciler(
        [VllmClient("http://v", transport=httpx.MockTransport(stage.networks[0]))],
        lambda: stage.wanted,
        stage.folder,
        0.01,
    )
    reconciler.start()
    stage.want("a@v1")
    while "a@v1" not in stage.networks[0].loaded:
        pass
    stage.networks[0].loaded.clear()
    while "a@v1" not in stage.networks[0].loaded:
        pass
    reconciler.stop()


def client(answer: httpx.Response | Exception) -> VllmClient:
    def network(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return VllmClient("http://vllm/v1/", transport=httpx.MockTransport(network))


def test_foreign_errors_become_ours() -> None:
    with pytest.raises(VllmUnavailableError, match="did not answer /v1/models in time"):
        client(httpx.ReadTimeout("slow")).models()
    with pytest.raises(VllmUnavailableError, match="is it running"):
        client(httpx.RemoteProtocolError("broken")).models()
    with pytest.raises(VllmRefusedError, match="503 overloaded") as caught:
        client(httpx.Response(503, text="overloaded")).models()
    assert caught.value.status == 503


@pytest.mark.parametrize("answer", ["[]", "{}", '{"data": 3}', '{"data": [{}]}', "<html>"])
def test_an_answer_that_is_no_list_of_models_is_refused(answer: str) -> None:
    with pytest.raises(VllmRefusedError):
        client(httpx.Response(200, text=answer)).models()


@pytest.mark.parametrize(
    "choice",
    [{}, {"token_ids": [1, 2], "logprobs": None}, {"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}},
     {"token_ids": [1], "logprobs": {"token_logprobs": [None]}}],
)  # fmt: skip
def test_samples_without_exact_tokens_and_logprobs_are_refused(choice: dict[str, object]) -> None:
    with pytest.raises(VllmRefusedError, match="no token ids with log-probabilities"):
        client(httpx.Response(200, json={"choices": [choice]})).sample("m", [1])


@pytest.mark.parametrize(
    "entries", [None, [], [None, {"5": {"logprob": -1.0}}], [None, {"7": {"logprob": "NaN"}}, {"8": {}}]]
)
def test_prompt_logprobs_of_other_tokens_are_refused(entries: object) -> None:
    answer = httpx.Response(200, json={"choices": [{"prompt_logprobs": entries}]})
    with pytest.raises(VllmRefusedError):
        client(answer).prompt_logprobs("m", [1, 7, 8])


def test_what_somebody_loads_between_two_looks_is_not_taken_for_unwanted(stage: Stage) -> None:
    network = stage.networks[0]

    def listed_late(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models" and not network.loaded:
            stage.want("a@v1")  # somebody else wants it, and loads it, after this look began
            network.loaded["a@v1"] = str(stage.folder / "a@v1")
        return network(request)

    client = VllmClient("http://v", transport=httpx.MockTransport(listed_late))
    Reconciler([client], lambda: stage.wanted, stage.folder).once()
    assert network.calls == []
    assert set(network.loaded) == {"a@v1"}
