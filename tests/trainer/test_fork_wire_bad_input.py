"""The wire of the fork against input that is wrong, and all routes against input that makes no sense."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metaclaw_trainer.errors import OutOfMemoryError

from tests.trainer.engine_parts import tiny_settings
from tests.trainer_server import TrainerServer, serving

NAN = float("nan")


@pytest.fixture(scope="module")
def trainer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerServer]:
    home = tmp_path_factory.mktemp("home")
    wanted = tiny_settings(tiny_model, home, max_body_mib=4, max_sessions=40, vllm_urls=["http://127.0.0.1:9"])
    with serving(wanted) as server:
        yield server


def post(trainer: TrainerServer, route: str, /, **body: Any) -> httpx.Response:
    return trainer.http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})


def code(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    return str(error["code"])


@pytest.fixture
def session(trainer: TrainerServer) -> Iterator[str]:
    made = post(trainer, "/v1/lora/create", base_model=trainer.services.settings.base_model, rank=4)
    yield made.json()["session_id"]
    trainer.http.delete(f"/v1/lora/{made.json()['session_id']}")


def datum(**changes: Any) -> dict[str, Any]:
    good = {
        "model_input_tokens": [5, 6, 7],
        "target_tokens": [6, 7, 8],
        "logprobs": [0.0, -1.0, -1.0],
        "advantages": [0.0, 1.0, 1.0],
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": [0.0, NAN, -1.0]}, "finite"),
        ({"advantages": [0.0, float("inf"), 1.0]}, "finite"),
        ({"logprobs": [0.0, -1.0]}, "datum 0: lengths disagree"),
        ({"target_tokens": [6, 7, 10**8]}, "outside the base model's vocabulary"),
        ({"model_input_tokens": [5, -1, 7]}, "greater than or equal to 0"),
        ({"model_input_tokens": [5, 6.5, 7]}, "integer"),
        ({"logprobs": [0.0] * 3, "advantages": [0.0] * 3}, "the response is empty"),
        ({"model_input_tokens": []}, "at least 1 item"),
        ({k: [1] * 100_000 for k in datum()}, "max_sample_tokens"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_datum_is_refused_and_the_gradient_is_as_it_was(
    trainer: TrainerServer, session: str, changes: dict[str, Any], words: str
) -> None:
    def step(*datums: dict[str, Any]) -> dict[str, Any]:
        for one in datums:
            post(trainer, "/v1/train/forward_backward", session_id=session, datums=[one])
        moved = post(trainer, "/v1/train/optim_step", session_id=session, learning_rate=1e-12).json()
        return {"norm": moved["grad_norm"], "loss": moved["avg_loss"]}

    alone = step(datum())
    refused = post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum(**changes)])
    assert code(refused, 422) in {"invalid_request", "invalid_datum"}
    assert words in refused.json()["error"]["message"]
    assert step(datum(**changes), datum()) == pytest.approx(alone, rel=1e-4)


def test_unknown_things_are_named(trainer: TrainerServer, session: str) -> None:
    body = {"session_id": session, "datums": [datum()], "loss_fn": "magic"}
    assert code(post(trainer, "/v1/train/forward_backward", **body), 422) == "unknown_loss"
    for path, rest in (
        ("/v1/train/forward_backward", {"datums": [datum()]}),
        ("/v1/train/optim_step", {}),
        ("/v1/weights/save", {}),
        ("/v1/checkpoint/save", {"name": "x"}),
        ("/v1/checkpoint/load", {"path": "x"}),
        ("/v1/sample", {"tokens": [1]}),
    ):
        assert code(post(trainer, path, session_id="0" * 32, **rest), 404) == "unknown_session"
        assert code(post(trainer, path, session_id="../../etc", **rest), 422) == "invalid_request"
    assert code(trainer.http.delete(f"/v1/lora/{'0' * 32}"), 404) == "unknown_session"


def test_a_step_without_a_gradient_and_a_checkpoint_with_one_are_refused(trainer: TrainerServer, session: str) -> None:
    assert code(post(trainer, "/v1/train/optim_step", session_id=session), 409) == "conflict"
    post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum()])
    assert code(post(trainer, "/v1/checkpoint/save", session_id=session, name="x"), 409) == "conflict"
    for rate in (0, -1, 2, NAN):
        assert code(post(trainer, "/v1/train/optim_step", session_id=session, learning_rate=rate), 422)
    assert post(trainer, "/v1/train/optim_step", session_id=session).json()["step"] == 1


@pytest.mark.law(9)
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".", "..", ".hidden", "a\x00b", "a" * 64, "é", "x\n"])
def test_a_name_that_could_be_a_path_never_becomes_one(trainer: TrainerServer, session: str, name: str) -> None:
    assert code(post(trainer, "/v1/weights/save", session_id=session, name=name), 422) == "invalid_request"
    assert code(post(trainer, "/v1/checkpoint/save", session_id=session, name=name), 422) == "invalid_request"


@pytest.mark.law(9)
def test_a_path_that_this_server_never_gave_is_refused(trainer: TrainerServer, session: str, tmp_path: Path) -> None:
    mine = Path(post(trainer, "/v1/checkpoint/save", session_id=session, name="mine").json()["path"])
    weights = post(trainer, "/v1/weights/save", session_id=session).json()["adapter_path"]
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in mine.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    for path in (copied, mine / "..", f"{mine}/", mine.parent / "." / mine.name / "..", weights, "/etc", "x"):
        answer = post(trainer, "/v1/checkpoint/load", session_id=session, path=str(path))
        assert code(answer, 404) == "unknown_version"
    assert post(trainer, "/v1/checkpoint/load", session_id=session, path=str(mine)).json() == {
        "status": "ok",
        "step": 0,
    }


def test_a_checkpoint_that_was_changed_is_refused_and_the_session_is_as_it_was(
    trainer: TrainerServer, session: str
) -> None:
    post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum()])
    post(trainer, "/v1/train/optim_step", session_id=session)
    path = Path(post(trainer, "/v1/checkpoint/save", session_id=session, name="mine").json()["path"])
    file = path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    refused = post(trainer, "/v1/checkpoint/load", session_id=session, path=str(path))
    assert code(refused, 409) == "checkpoint_refused"
    assert "sha256 differs" in refused.json()["error"]["message"]
    post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum()])
    assert post(trainer, "/v1/train/optim_step", session_id=session).json()["step"] == 2


def test_running_out_of_memory_is_survived_and_said(
    trainer: TrainerServer, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metaclaw_trainer.lora_engine as room

    def greedy(*_: object) -> None:
        raise OutOfMemoryError("the device is full")

    with monkeypatch.context() as patched:
        patched.setattr(room, "score", greedy)
        failed = post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum()])
        assert code(failed, 503) == "out_of_memory"
    assert post(trainer, "/v1/train/forward_backward", session_id=session, datums=[datum()]).status_code == 200
    assert post(trainer, "/v1/train/optim_step", session_id=session).status_code == 200


def test_another_base_model_and_too_many_sessions_are_refused(trainer: TrainerServer) -> None:
    other = post(trainer, "/v1/lora/create", base_model="Qwen/Qwen3-4B", rank=4)
    assert code(other, 409) == "conflict"
    assert code(post(trainer, "/v1/lora/create", rank=0), 422) == "invalid_request"
    assert code(post(trainer, "/v1/lora/create", rank=10_000), 422) == "invalid_request"
    opened = []
    while (answer := post(trainer, "/v1/lora/create", rank=1)).status_code == 200:
        opened.append(answer.json()["session_id"])
    assert code(answer, 429) == "too_many_sessions"
    assert len(opened) == 40
    for session_id in opened:
        assert trainer.http.delete(f"/v1/lora/{session_id}").status_code == 200
    assert not [key for key in trainer.services.engine.call(lambda e: e.adapters()) if key.startswith("_run_")]


@pytest.mark.law(4)
def test_a_session_belongs_to_the_key_that_opened_it(trainer: TrainerServer) -> None:
    ring = trainer.services.keys
    try:
        headers = [{"authorization": f"Bearer {ring.add(name)[1]}"} for name in ("one", "two")]
        body = {"base_model": "", "rank": 2}
        made = trainer.http.post("/v1/lora/create", json=body, headers=headers[0]).json()["session_id"]
        save = {"session_id": made, "name": "mine"}
        assert trainer.http.post("/v1/checkpoint/save", json=save, headers=headers[1]).status_code == 404
        path = trainer.http.post("/v1/checkpoint/save", json=save, headers=headers[0]).json()["path"]
        other = trainer.http.post("/v1/lora/create", json=body, headers=headers[1]).json()["session_id"]
        load = {"session_id": other, "path": path}
        assert trainer.http.post("/v1/checkpoint/load", json=load, headers=headers[1]).status_code == 404
        assert trainer.services.runs.newest_weights("two", None) is None
        for session_id, header in ((made, headers[0]), (other, headers[1])):
            assert trainer.http.delete(f"/v1/lora/{session_id}", headers=header).status_code == 200
    finally:
        ring.path.unlink()


def test_without_a_vllm_samples_are_503_and_say_why(trainer: TrainerServer) -> None:
    assert code(post(trainer, "/v1/sample", tokens=[1, 2]), 503) == "vllm_unavailable"
    assert code(post(trainer, "/v1/chat/completions", messages=[]), 503) == "vllm_unavailable"
    assert code(post(trainer, "/v1/chat/completions", model="x"), 422) == "bad_sampling"
    assert code(post(trainer, "/v1/sample", tokens=[]), 422) == "invalid_request"
    assert code(post(trainer, "/v1/sample", tokens=[1], temperature=NAN), 422) == "invalid_request"


_scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_skipped = {"/metrics"}


def _operations(trainer: TrainerServer) -> list[tuple[str, str, list[str]]]:
    document = trainer.http.get("/openapi.json").json()
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = document["components"]["schemas"].get(content.get("$ref", "").split("/")[-1], content)
            found.append((method.upper(), path, sorted(schema.get("properties", {}))))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_request_whatever_makes_a_route_fail(trainer: TrainerServer, data: st.DataObject) -> None:
    method, path, fields = data.draw(st.sampled_from([o for o in _operations(trainer) if o[1] not in _skipped]))
    segment = st.text(st.characters(codec="utf-8", exclude_characters="/?#%\\"), min_size=1, max_size=12)
    for name in ("agent", "session_id"):
        if f"{{{name}}}" in path:
            path = path.replace(f"{{{name}}}", data.draw(segment | st.sampled_from(["alpha", "0" * 32])))
    put = trainer.http.put("/v1/agents/alpha", json={"allowed": False})  # one that is there
    assert put.status_code == 200
    known = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, _json))
    body = data.draw(st.none() | known | _json | st.binary(max_size=30))
    content = (
        body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode("utf-8", "surrogatepass")
    )
    try:
        url = httpx.URL(trainer.url).copy_with(path=path)
    except httpx.InvalidURL:
        return
    query = {"after": str(data.draw(_scalars)), "wait": "0"} if path == "/v1/versions" else None
    headers = {"content-type": "application/json"}
    response = trainer.http.request(method, url, content=content, params=query, headers=headers)
    assert response.status_code < 500 or response.json()["error"]["code"] == "vllm_unavailable", response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "code"}


def test_the_trainer_still_works_after_all_that(trainer: TrainerServer) -> None:
    assert trainer.http.get("/v1/health").status_code == 200
    made = post(trainer, "/v1/lora/create", rank=2).json()["session_id"]
    losses = itertools.islice(
        iter(
            lambda: post(trainer, "/v1/train/forward_backward", session_id=made, datums=[datum()]).json()["loss"], None
        ),
        2,
    )
    first, second = losses
    assert first == second
