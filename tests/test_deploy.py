"""The files for containers and systemd hold together: services, volumes, health checks, users, the shared config."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from metaclaw_plugin.cli.main import app
from metaclaw_plugin.cli.service import unit
from metaclaw_plugin.doctor.configuration import look_at_configuration
from metaclaw_plugin.doctor.finding import Level
from metaclaw_plugin.settings import load_settings
from scripts.check_image import unpinned
from scripts.check_sbom import pins

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OURS = ("gateway", "worker", "trainer", "vllm", "console")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))


def test_every_process_of_the_house_is_a_service(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*OURS, "postgres"}


@pytest.mark.parametrize("name", [*OURS, "postgres"])
def test_each_service_is_watched_and_starts_after_what_it_needs(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["healthcheck"]["test"]
    assert service["restart"] == "unless-stopped"
    for needed, how in service.get("depends_on", {}).items():
        assert needed in compose["services"]
        assert how == {"condition": "service_healthy"}
    for volume in service["volumes"]:
        source = re.split(r":(?=/)", volume)[0]
        if source.startswith("./"):
            assert (DEPLOY / source).exists()
        elif not source.startswith("${"):
            assert source in compose["volumes"]


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_our_commands_without_rights(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["command"] == ["metaclaw", name]
    assert typer.main.get_command(app).get_command(None, name) is not None  # type: ignore[attr-defined]
    assert service["cap_drop"] == ["ALL"]
    dockerfile = DEPLOY.parent / service["build"]["dockerfile"]
    users = re.findall(r"^USER (\S+)", dockerfile.read_text(), re.MULTILINE)
    assert users == ["metaclaw"]


def test_only_gateway_and_console_are_reachable_and_from_this_machine_alone(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:4000:4000"], "console": ["127.0.0.1:4020:4020"]}


def test_no_secret_stands_in_the_files(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "KEY" in name:
                assert value.startswith("${")


@pytest.mark.parametrize("dockerfile", ["Dockerfile.gateway", "Dockerfile.trainer"])
def test_images_copy_what_is_there(dockerfile: str) -> None:
    text = (DEPLOY / dockerfile).read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        first, *rest = sources.split()
        if first.startswith("--from="):
            assert first.removeprefix("--from=") in stages
            continue
        for source in (first, *rest):
            assert (ROOT / source).exists(), source


def test_the_trainers_image_installs_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r"\.\[([^\]]+)\]", (DEPLOY / "Dockerfile.trainer").read_text())
    for extra in installed.replace("${VLLM}", "vllm").split(","):
        assert extra in extras


def unhashed(dockerfile: str) -> list[str]:
    """Commands of pip that may fetch something that no lock has a hash of: a package, or what builds one."""
    lines = re.findall(r"^RUN (.+)$", dockerfile.replace("\\\n", " "), re.MULTILINE)
    commands = [part.strip() for line in lines for part in re.split(r"&&|;", line)]
    asked = [part for part in commands if re.search(r"\bpip3? (install|wheel|download)\b", part)]
    assert asked
    return [
        part
        for part in asked
        if "--no-index" not in part and not ("--require-hashes" in part and "--only-binary :all:" in part)
    ]


def test_all_that_the_gateways_image_installs_has_a_hash_in_a_lock() -> None:
    text = (DEPLOY / "Dockerfile.gateway").read_text()
    assert unhashed(text) == []
    assert set(re.findall(r"-r (\S+)", text)) == {"build.lock", "gateway.lock"}
    loose = (
        text + "RUN useradd x && pip install '.[gateway]' && pip check\nRUN pip install --require-hashes -r a.lock\n"
    )
    assert unhashed(loose) == ["pip install '.[gateway]'", "pip install --require-hashes -r a.lock"]


def test_what_is_installed_beside_the_lock_is_noticed() -> None:
    lock = "a-b==1.0 \\\n    --hash=sha256:00\n"
    rows = [
        {"name": "A_b", "version": "1.0"},
        {"name": "pip", "version": "23"},
        {"name": "metaclaw-plugin", "version": "0"},
    ]
    assert unpinned(json.dumps(rows), lock) == []
    rows += [{"name": "hatchling", "version": "2"}, {"name": "a-b", "version": "1.1"}]
    assert unpinned(json.dumps(rows), lock) == ["hatchling 2", "a-b 1.1"]


def test_the_shared_config_is_well_and_names_the_services(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METACLAW_TRAINER_KEY", "x")
    monkeypatch.setenv("METACLAW_VLLM_KEY", "y")
    path = DEPLOY / "litellm_config.yaml"
    settings = load_settings(path)
    wrong = [f for f in look_at_configuration(settings, path) if f.level is Level.FAILURE]
    assert wrong == []
    for url in (settings.vllm.url, settings.rl.remote_url):
        assert re.split(r"[/:]+", url)[1] in compose["services"]
    assert "@postgres/" in str(settings.store.url)
    assert settings.vllm.api_key == "y"  # it listens for the other containers, and so for the whole network of them


def locked(name: str) -> dict[str, set[str]]:
    """Package -> versions of a lock; each with a hash."""
    found: dict[str, set[str]] = {}
    for (package, version), hashes in pins((DEPLOY / name).read_text(encoding="utf-8")).items():
        assert hashes, package
        found.setdefault(package, set()).add(version)
    return found


@pytest.mark.parametrize("lock", ["gateway.lock", "build.lock"])
def test_a_lock_pins_what_the_project_asks_for_and_hashes_all_of_it(lock: str) -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = whole["project"]["optional-dependencies"]
    asked = {
        "gateway.lock": [*whole["project"]["dependencies"], *extras["gateway"], *extras["postgres"]],
        "build.lock": whole["build-system"]["requires"],
    }
    pinned = locked(lock)
    for wanted in map(Requirement, asked[lock]):
        versions = pinned.get(wanted.name.replace("_", "-").lower(), set())
        assert versions, f"{wanted.name} is not in deploy/{lock}: make lock"
        assert all(wanted.specifier.contains(one) for one in versions), f"{wanted}: locked is {versions}: make lock"


def test_the_systemd_unit_escapes_what_systemd_would_read() -> None:
    text = unit("/opt/my env/python", Path("/etc/100%/config.yaml"), Path("/data"))
    assert 'ExecStart="/opt/my env/python" -m metaclaw_plugin.cli.main start --config "/etc/100%%/config.yaml"' in text
    assert 'Environment="METACLAW_HOME=/data"' in text
