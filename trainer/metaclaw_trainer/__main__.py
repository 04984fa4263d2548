"""``python -m metaclaw_trainer --config FILE [--host H] [--port N]``: the trainer, in the foreground.

Whatever stops it from starting is one line on stderr and exit code 1. With ``--new-key``, ``--keys`` or
``--revoke-key`` it looks after its API keys and ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from metaclaw_hooks.errors import HooksError

from metaclaw_trainer.auth import KeyRing, refuse_open_bind
from metaclaw_trainer.errors import ModelLoadError, SettingsError, TrainerError
from metaclaw_trainer.freed_memory import keep_freed_memory
from metaclaw_trainer.settings import TrainerSettings, load_settings
from metaclaw_trainer.store import open_store

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until stopped; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        settings = load_settings(given.config)
        if given.new_key or given.keys or given.revoke_key:
            _look_after_keys(KeyRing(settings.keys_file), given)
            return 0
        changes = {"host": given.host, "port": given.port}
        settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
        _restart_with_devices(settings, arguments)
        refuse_open_bind(settings.host, KeyRing(settings.keys_file))
        listener = _bind(settings.host, settings.port)
        open_store(settings.store_url).close()
        _look_for_model(settings.base_model)
        logging.basicConfig(level=given.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        keep_freed_memory()
        from metaclaw_trainer.process import serve  # torch is imported here, after the cheap checks

        return serve(settings, listener)
    except (TrainerError, HooksError) as error:
        print(f"metaclaw trainer: {error}", file=sys.stderr)  # noqa: T201 - the one line for whoever started it
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metaclaw_trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="config file with a section metaclaw: (else $METACLAW_CONFIG)")
    parser.add_argument("--host", help="address to listen on; anything but loopback needs a key")
    parser.add_argument("--port", type=_port, help="port to listen on; 0: any free one")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--new-key", metavar="NAME", help="make an API key, print it once, and end")
    keys.add_argument("--keys", action="store_true", help="list the API keys, without their secrets, and end")
    keys.add_argument("--revoke-key", metavar="ID", help="make a key open nothing any more, and end")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def _look_after_keys(ring: KeyRing, given: argparse.Namespace) -> None:
    out = sys.stdout.write
    if given.new_key:
        key, secret = ring.add(given.new_key)
        out(f"{secret}\n")
        sys.stderr.write(f"key {key.id} ({key.name}); it is shown this once and kept nowhere\n")
    elif given.revoke_key:
        ring.revoke(given.revoke_key)
    else:
        for key in ring.entries():
            made = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(key.created_at))
            out(f"{key.id}  {made}  {'revoked' if key.revoked_at else 'works  '}  {key.name}\n")


def _restart_with_devices(settings: TrainerSettings, arguments: Sequence[str] | None) -> None:
    """A process gets its GPUs when it starts: begin again with them, before anything has looked for any."""
    if settings.devices is None or os.environ.get(_VISIBLE) == settings.devices:
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = [sys.executable, "-m", "metaclaw_trainer", *given]
    os.execve(sys.executable, command, {**os.environ, _VISIBLE: settings.devices})


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so that a port in use is known at once.

    Raises:
        SettingsError: if it cannot be taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port, or end what holds it"
        ) from error
    return listener


def _look_for_model(name: str) -> None:
    """See at once that a path leads to no model, without waiting for torch to say so.

    Raises:
        ModelLoadError: if nothing is set, or it looks like a folder and holds no model.
    """
    if not name:
        raise ModelLoadError("no base model: set metaclaw.base_model to a folder or a name on the model hub")
    folder = Path(name).expanduser()
    looks_like_a_path = folder.is_absolute() or name.startswith((".", "~")) or folder.exists()
    if looks_like_a_path and not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"cannot load the base model {name}: no config.json in that folder; set metaclaw.base_model to a folder "
            "with config.json and safetensors, or to a name on the model hub"
        )


if __name__ == "__main__":
    sys.exit(main())
