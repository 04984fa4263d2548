"""A vLLM that does not share the trainer's disk: adapters come over HTTP, and are the trainer's own for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from metaclaw_hooks.types import AdapterVersion
from metaclaw_hooks.wire import SampleBody, VersionsReply
from metaclaw_trainer.errors import VllmRefusedError
from metaclaw_trainer.vllm_client import VllmClient

from metaclaw_plugin.adapter_files import fetch_adapter
from metaclaw_plugin.errors import AdapterFilesError
from metaclaw_plugin.exporting import export_version
from tests.trainer.engine_parts import as_sampled, random_sample, tiny_settings
from tests.trainer_server import TrainerServer, serving
from tests.vllm_server import VllmProcess

AGENT = "far-away"
ELSEWHERE = "/no/such/machine/trainer/adapters/far-away/v1"  # a path of the trainer's machine


@pytest.fixture(scope="module")
def trainer(
    tiny_model: Path, tiny_vllm: VllmProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrainerServer]:
    """A trainer where the vLLM looks for one; it knows of no vLLM itself."""
    settings = tiny_settings(tiny_model, tmp_path_factory.mktemp("home"), batch_size=2, poll_interval=0.02)
    with serving(settings.model_copy(update={"vllm_urls": []}), tiny_vllm.trainer_port) as server:
        yield server


@pytest.fixture(scope="module")
def version(trainer: TrainerServer) -> AdapterVersion:
    """A trained version of that trainer."""
    made = [random_sample(seed, rewards=(reward,), agent=AGENT) for seed, reward in ((1, 1.0), (2, -1.0))]
    samples = [SampleBody.of(one).model_dump() for one in as_sampled(trainer.services.engine, made)]
    trainer.http.put(f"/v1/agents/{AGENT}", json={"allowed": True}).raise_for_status()
    trainer.http.post("/v1/samples", json={"samples": samples}).raise_for_status()
    found = trainer.http.get("/v1/versions", params={"wait": 60}).raise_for_status()
    return VersionsReply.model_validate(found.json()).versions[0].version()


@pytest.mark.vllm
def test_a_vllm_elsewhere_fetches_loads_answers_and_forgets(tiny_vllm: VllmProcess, version: AdapterVersion) -> None:
    client = VllmClient(tiny_vllm.url)
    client.load(version.name, ELSEWHERE)
    try:
        held = {model.name: model.root for model in client.models()}
        assert held[version.name] == ELSEWHERE, "the trainer must know it for its own"
        (drawn,) = client.sample(version.name, [1, 2, 3], max_tokens=4)
        assert len(drawn.token_ids) == 4
        client.load(version.name, ELSEWHERE)  # loading what is loaded is no error
    finally:
        client.unload(version.name)
    mirrored = list(tiny_vllm.log.with_suffix("").rglob("adapter_model.safetensors"))
    assert mirrored == [], "an unloaded adapter's copy goes"
    client.close()


@pytest.mark.vllm
def test_what_the_trainer_does_not_have_is_refused_with_its_words(
    tiny_vllm: VllmProcess, trainer: TrainerServer
) -> None:
    client = VllmClient(tiny_vllm.url)
    with pytest.raises(VllmRefusedError, match=r"this trainer has no files of far-away@v99"):
        client.load("far-away@v99", ELSEWHERE.replace("v1", "v99"))
    client.close()


def test_an_export_on_another_machine_is_what_the_trainer_made(
    trainer: TrainerServer, version: AdapterVersion, tmp_path: Path
) -> None:
    import dataclasses

    far = dataclasses.replace(version, path=ELSEWHERE)
    export_version(far, tmp_path / "out", trainer.url, {})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(version.path) / name).read_bytes()


@pytest.mark.parametrize("name", ["far-away@v1/../../../keys.json", "..%2f..%2fkeys.json", "other@v1"])
def test_only_files_of_adapters_are_given_away(trainer: TrainerServer, version: AdapterVersion, name: str) -> None:
    for file in ("adapter_config.json", "manifest.json", "../adapter_config.json"):
        assert trainer.http.get(f"/v1/adapters/{name}/{file}").status_code in (404, 422)


def test_bytes_that_were_changed_on_the_way_are_not_kept(trainer: TrainerServer, version: AdapterVersion) -> None:
    good = trainer.http.get(f"/v1/adapters/{version.name}/adapter_config.json")
    assert good.headers["x-sha256"]
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=b"{}", headers=good.headers))
    folder = Path(version.path).parent / "copy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "Client", lambda **given: _Wire(transport, **given))
        with pytest.raises(AdapterFilesError, match="damaged on its way"):
            fetch_adapter(trainer.url, {}, version.name, folder)
    assert not folder.exists()


class _Wire(httpx.Client):
    """A client on a wire that changes what it carries."""

    def __init__(self, transport: httpx.BaseTransport, **given: object) -> None:
        super().__init__(transport=transport, **given)  # type: ignore[arg-type]
