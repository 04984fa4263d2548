"""How the gateway process is started: LiteLLM's own command, told where our settings are."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.settings import CONFIG_ENV, HOME_ENV, Settings

METRICS_ENV = "PROMETHEUS_MULTIPROC_DIR"  # where the workers' counters meet
MASTER_KEY_ENV = "LITELLM_MASTER_KEY"
KEEP_ALIVE = 75  # seconds: more than clients keep an idle connection, or they would use one that is being closed
_MEMORY = Path("/dev/shm")  # Linux's file system in memory

# Nothing leaves the machine that the owner did not configure, and LiteLLM's banner stays off the log.
_QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",  # a public page would fetch them from LiteLLM's site
    "LITELLM_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
}


def gateway_command(settings: Settings, config_path: Path) -> tuple[list[str], Mapping[str, str]]:
    """Arguments and environment of the gateway process; the environment holds all of the present one."""
    gateway = settings.gateway
    argv = [sys.executable, "-m", "litellm.proxy.proxy_cli", "--config", str(config_path)]
    argv += ["--host", gateway.host, "--port", str(gateway.port), "--telemetry", "False"]
    argv += ["--keepalive_timeout", str(KEEP_ALIVE)]
    if gateway.workers > 1:
        # Several workers start slowly on a busy machine; without this LiteLLM kills them while they do.
        argv += ["--num_workers", str(gateway.workers), "--timeout_worker_healthcheck", "120"]
    env = dict(os.environ) | _QUIET | {CONFIG_ENV: str(config_path), HOME_ENV: str(settings.home)}
    if gateway.workers > 1:
        env[METRICS_ENV] = str(_metrics_folder(settings.home))
    # LiteLLM does not start without a master key. Where the owner set none, nobody shall know it; a key that the
    # config file sets goes before this one.
    env.setdefault(MASTER_KEY_ENV, "sk-" + secrets.token_urlsafe(32))
    return argv, env


def _metrics_folder(home: Path, memory: Path = _MEMORY) -> Path:
    """An empty folder for the counters of a gateway's processes, in memory where there is such a place.

    The counters are files that are mapped into memory, and grow as they are written: on a disk that is full, the kernel
    ends the process (SIGBUS). They count from the gateway's start, so nothing is lost with them.

    Raises:
        ProcessError: if it cannot be made.
    """
    name = f"metaclaw-{os.geteuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}"
    for folder in (memory / name, home / "gateway-metrics"):
        try:
            if folder.parent == memory and not memory.is_dir():
                continue
            if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.geteuid()):
                continue  # where everybody may write, somebody else was first
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            if folder.parent != home:
                continue
            reason = f"cannot make {folder}: {error.strerror}; check the permissions of METACLAW_HOME"
            raise ProcessError(reason) from error
        return folder
    raise ProcessError(f"{folder} is a link, or somebody else's; remove it")
