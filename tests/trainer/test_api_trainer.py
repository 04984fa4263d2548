"""The trainer's own routes over real HTTP, with the tiny model behind them."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.types import Sample
from metaclaw_hooks.wire import AgentsReply, HealthReply, SampleBody, SamplesReply, VersionsReply
from metaclaw_trainer.schema import kept

from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings
from tests.trainer_server import TrainerServer, serving

_names = (f"agent-{number}" for number in itertools.count())
_seeds = itertools.count()


@pytest.fixture(scope="module")
def trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerServer]:
    home = tmp_path_factory.mktemp("home")
    settings = tiny_settings(
        tiny_model,
        home,
        batch_size=3,
        max_queued=8,
        max_body_mib=1,
        poll_interval=0.02,
        vllm_urls=["http://127.0.0.1:9"],
    )
    with serving(settings) as server:
        yield server


@pytest.fixture
def agent() -> str:
    return next(_names)


def bodies(trainer: TrainerServer, agent: str, count: int) -> list[dict[str, Any]]:
    """Samples as an exact sampler would have drawn them from the base model, with rewards that differ."""
    made = [random_sample(next(_seeds), rewards=(1.0 if i % 2 else -1.0,), agent=agent) for i in range(count)]
    return [SampleBody.of(s).model_dump() for s in as_sampled(trainer.services.engine, made)]


def put(trainer: TrainerServer, samples: list[dict[str, Any]]) -> httpx.Response:
    return trainer.http.post("/v1/samples", json={"samples": samples})


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    return dict(body["error"])


def test_a_full_batch_becomes_a_version_that_is_listed(trainer: TrainerServer, agent: str) -> None:
    given = bodies(trainer, agent, 3)
    reply = SamplesReply.model_validate(put(trainer, given).json())
    assert reply.accepted == [s["id"] for s in given]
    status = trainer.http.put(f"/v1/agents/{agent}", json={"allowed": True}).json()
    assert status["allowed"]
    cursor = 0
    while True:
        found = trainer.http.get("/v1/versions", params={"after": cursor, "wait": 30})
        mine = [v for v in VersionsReply.model_validate(found.json()).versions if v.agent == agent]
        if mine:
            break
        cursor = found.json()["versions"][-1]["cursor"]
    assert mine[0].number == 1
    assert sorted(mine[0].trace_ids) == sorted(t["trace_id"] for s in given for t in s["turns"])
    assert (Path(mine[0].path) / "adapter_model.safetensors").is_file()
    agents = AgentsReply.model_validate(trainer.http.get("/v1/agents").json()).agents
    status = next(a for a in agents if a.agent == agent).model_dump()
    assert (status["trained"], status["queued"], status["head"]) == (3, 0, 1)
    assert status["idle_reason"] == "0 of 3 samples are waiting"
    assert status["metrics"]["grad_norm"] > 0


def test_sending_again_changes_nothing(trainer: TrainerServer, agent: str) -> None:
    given = bodies(trainer, agent, 2)
    put(trainer, given)
    again = put(trainer, given).json()
    assert again["accepted"] == []
    assert again["duplicate"] == [s["id"] for s in given]
    assert trainer.http.get(f"/v1/agents/{agent}").json()["queued"] == 2


def test_one_bad_sample_does_not_hold_up_the_others(trainer: TrainerServer, agent: str) -> None:
    good, *bad = bodies(trainer, agent, 6)
    bad[0]["turns"][0]["logprobs"][1] = float("nan")
    bad[1]["turns"][0]["logprobs"] = []
    bad[2]["turns"][0]["start"] = 400
    bad[3]["token_ids"][0] = 10**9
    bad[4]["agent"] = "../../etc"
    body = json.dumps({"samples": [good, *bad]})  # Python writes NaN
    reply = SamplesReply.model_validate(trainer.http.post("/v1/samples", content=body).json())
    assert reply.accepted == [good["id"]]
    reasons = {refusal.id: refusal.reason for refusal in reply.refused}
    assert list(reasons) == [*(b["id"] for b in bad[:3]), bad[4]["id"], bad[3]["id"]]
    assert "finite number" in reasons[bad[0]["id"]]
    assert "spans" in reasons[bad[2]["id"]]
    assert "outside the vocabulary" in reasons[bad[3]["id"]]
    assert trainer.http.get(f"/v1/agents/{agent}").json()["queued"] == 1


def test_a_sample_of_a_hundred_thousand_tokens_is_refused_with_the_reason(trainer: TrainerServer, agent: str) -> None:
    [good] = bodies(trainer, agent, 1)
    good["token_ids"] = [1] * 100_000
    reply = put(trainer, [good]).json()
    assert reply["refused"][0]["reason"] == "100000 tokens; setting max_sample_tokens allows 32768"


def test_a_full_queue_says_429_and_what_to_do(trainer: TrainerServer, agent: str) -> None:
    given = bodies(trainer, agent, 10)
    response = put(trainer, given)
    assert response.status_code == 429
    assert response.headers["retry-after"].isdigit()
    assert agent in error_of(response)["message"]
    assert trainer.http.get(f"/v1/agents/{agent}").json()["queued"] == 8
    assert put(trainer, given[:8]).json()["duplicate"] == [s["id"] for s in given[:8]]


def test_recalled_traces_are_gone(trainer: TrainerServer, agent: str) -> None:
    given = bodies(trainer, agent, 2)
    put(trainer, given)
    trace = given[0]["turns"][0]["trace_id"]
    reply = trainer.http.post("/v1/samples/recall", json={"trace_ids": [trace]}).json()
    assert reply == {"removed": [given[0]["id"]], "trained_into": []}
    assert trainer.http.get(f"/v1/agents/{agent}").json()["queued"] == 1


def test_a_caller_that_is_killed_while_sending_leaves_one_line(
    trainer: TrainerServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = httpx.URL(trainer.url)
    with caplog.at_level(logging.INFO), socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /v1/samples HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"samples": [')
        time.sleep(0.2)
        connection.close()
        deadline = time.monotonic() + 10
        while "went away" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "Traceback" not in caplog.text


def test_rewards_of_queued_traces_can_be_changed(trainer: TrainerServer, agent: str) -> None:
    given = bodies(trainer, agent, 2)
    put(trainer, given)
    trace = given[0]["turns"][0]["trace_id"]
    changes = {"rewards": [{"trace_id": trace, "reward": -1.0}, {"trace_id": "unknown", "reward": 1.0}]}
    reply = trainer.http.post("/v1/samples/rewards", json=changes).json()
    assert reply == {"changed": [trace], "in_training": []}
    bad = {"rewards": [{"trace_id": trace, "reward": 7.0}]}
    assert trainer.http.post("/v1/samples/rewards", json=bad).status_code == 422


def test_a_plugin_that_is_dropped_in_is_picked_up_and_listed_with_what_it_did(
    trainer: TrainerServer, agent: str
) -> None:
    path = trainer.services.settings.plugins_path / agent / "picky.py"
    path.parent.mkdir(parents=True)
    path.write_text("def accept_sample(sample): return sample.turns[0].reward > 5\n")
    try:
        deadline = time.monotonic() + 10
        while not (listed := trainer.http.get("/v1/hooks").json()["hooks"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (listed[0]["plugin"], listed[0]["agent"], listed[0]["calls"]) == (f"{agent}/picky", agent, 0)
        put(trainer, bodies(trainer, agent, 2))
        [now] = trainer.http.get("/v1/hooks").json()["hooks"]
        assert (now["hook"], now["calls"], now["failures"]) == ("accept_sample", 2, 0)
        assert trainer.http.get(f"/v1/agents/{agent}").json()["set_aside"] == 2
    finally:
        path.unlink()


def test_train_now_trains_less_than_a_batch_and_the_head_can_go_back(trainer: TrainerServer, agent: str) -> None:
    put(trainer, bodies(trainer, agent, 2))
    assert trainer.http.post(f"/v1/agents/{agent}/train").json() == {"started": True, "reason": None}
    deadline = time.monotonic() + 30
    while trainer.http.get(f"/v1/agents/{agent}").json()["head"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    status = trainer.http.post(f"/v1/agents/{agent}/head", json={"version": 0}).json()
    assert (status["head"], status["newest"]) == (0, 1)
    assert trainer.http.post(f"/v1/agents/{agent}/train").json()["reason"] == f"no sample of {agent} is waiting"
    missing = trainer.http.post(f"/v1/agents/{agent}/head", json={"version": 7})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_version")


def test_what_no_vllm_can_hold_is_reported_with_the_reason(trainer: TrainerServer, agent: str) -> None:
    put(trainer, bodies(trainer, agent, 1))
    trainer.http.post(f"/v1/agents/{agent}/train")
    while trainer.http.get(f"/v1/agents/{agent}").json()["newest"] != 1:
        time.sleep(0.02)
    reply = trainer.http.put("/v1/served", json={"versions": [f"{agent}@v1", f"{agent}@v2"]}).json()
    reasons = {refusal["id"]: refusal["reason"] for refusal in reply["failed"]}
    assert reply["held"] == []
    assert reasons[f"{agent}@v2"] == "this trainer never made it"
    assert "cannot be reached" in reasons[f"{agent}@v1"]
    assert [w.name for w in trainer.services.versions.served()] == [f"{agent}@v1"], "it stays wanted"
    trainer.http.put("/v1/served", json={"versions": [], "keep": [f"{agent}@v1"]})
    with trainer.services.store.read() as c:
        assert list(c.scalars(sa.select(kept.c.name))) == [f"{agent}@v1"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/v1/nowhere", None, 404, "Not Found"),
        ("DELETE", "/v1/samples", None, 405, "Method Not Allowed"),
        ("GET", "/v1/agents/nobody", None, 404, "no agent 'nobody'"),
        ("POST", "/v1/agents/nobody/train", None, 404, "no agent 'nobody'"),
        ("POST", "/v1/agents/nobody/head", '{"version": 0}', 404, "no agent 'nobody'"),
        ("PUT", "/v1/agents/Not%20a%20slug", '{"allowed": true}', 422, "agent"),
        ("PUT", "/v1/agents/..%2F..%2Fetc", '{"allowed": true}', 404, "Not Found"),
        ("PUT", "/v1/agents/alpha", '{"alowed": true}', 422, "alowed"),
        ("PUT", "/v1/agents/alpha", '{"batch_size": 0}', 422, "batch_size"),
        ("PUT", "/v1/agents/alpha", '{"allowed_for": 60}', 422, "send it with allowed: true"),
        ("PUT", "/v1/agents/alpha", "{", 422, "JSON"),
        ("POST", "/v1/samples", "{", 422, "no JSON"),
        ("POST", "/v1/samples", "[]", 422, "samples"),
        ("POST", "/v1/samples", '{"samples": []}', 422, "1 to 512"),
        ("POST", "/v1/samples", '{"samples": [{}]}', 422, "a sample needs an id"),
        ("POST", "/v1/samples", b"\xff\xfe", 422, "no JSON"),
        ("POST", "/v1/samples/recall", '{"trace_ids": []}', 422, "trace_ids"),
        ("GET", "/v1/versions?after=-1", None, 422, "after"),
        ("GET", "/v1/versions?after=99999999999999999999999", None, 422, "after"),
        ("GET", "/v1/versions?wait=1e9", None, 422, "wait"),
        ("PUT", "/v1/served", '{"versions": "alpha@v1"}', 422, "versions"),
    ],
)
def test_bad_requests_get_a_clear_error(
    trainer: TrainerServer, method: str, path: str, body: str | bytes | None, status: int, words: str
) -> None:
    headers = {"content-type": "application/json"} if body is not None else {}
    response = trainer.http.request(method, path, content=body, headers=headers)
    assert response.status_code == status
    assert words in error_of(response)["message"]


def test_a_body_above_the_limit_is_refused_before_it_is_read(trainer: TrainerServer) -> None:
    response = trainer.http.post("/v1/samples", content=b"x" * (2**20 + 1))
    assert response.status_code == 413
    assert "max_body_mib" in error_of(response)["message"]


def test_a_body_without_a_length_is_counted_as_it_comes(trainer: TrainerServer) -> None:
    response = trainer.http.post("/v1/samples", content=(b" " * 2**16 for _ in range(20)))
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_health_and_metrics_tell_what_runs(trainer: TrainerServer, agent: str) -> None:
    health = HealthReply.model_validate(trainer.http.get("/v1/health").json())
    assert health.device == "cpu"
    assert "torch" in health.versions
    put(trainer, bodies(trainer, agent, 1))
    text = trainer.http.get("/metrics").text
    assert f'metaclaw_trainer_agent_queued{{agent="{agent}"}} 1.0' in text
    assert 'metaclaw_trainer_vllm_up{url="http://127.0.0.1:9"} 0.0' in text


def test_every_route_is_in_the_openapi_document(trainer: TrainerServer) -> None:
    document = trainer.http.get("/openapi.json").json()
    assert document["paths"]["/v1/samples"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"/v1/versions", "/v1/served", "/v1/agents/{agent}/head", "/v1/lora/create"} <= set(document["paths"])


def test_the_answer_to_an_unforeseen_failure_shows_nothing_of_it(
    trainer: TrainerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(trainer.services.agents), "statuses", broken)
    response = trainer.http.get("/v1/agents")
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_the_sample_type_is_the_contract(trainer: TrainerServer, agent: str) -> None:
    [body] = bodies(trainer, agent, 1)
    assert isinstance(SampleBody.model_validate(body).sample(), Sample)
