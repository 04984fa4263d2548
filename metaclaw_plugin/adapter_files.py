"""The two files of an adapter version, fetched from the trainer over HTTP."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import httpx
from metaclaw_hooks.wire import ADAPTER_FILES, SHA256_HEADER

from metaclaw_plugin.errors import AdapterFilesError

TIMEOUT = httpx.Timeout(120.0, connect=5.0)  # seconds without a byte


def fetch_adapter(url: str, headers: Mapping[str, str], name: str, folder: Path) -> None:
    """Write the files of ``name`` (``agent@vN``) into the new folder ``folder``, whole or not at all.

    Args:
        url: root URL of the trainer.
        headers: of each request; they carry its key.

    Raises:
        AdapterFilesError: if the trainer does not answer or has no such version, or what came is damaged.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        with httpx.Client(base_url=url, headers=dict(headers), timeout=TIMEOUT, trust_env=False) as http:
            for file in ADAPTER_FILES:
                _fetch(http, f"/v1/adapters/{quote(name, safe='@')}/{file}", partial / file)
        partial.rename(folder)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AdapterFilesError(
            f"{name} could not be fetched from the trainer at {url} ({type(error).__name__}); is it running?"
        ) from error
    except OSError as error:
        raise AdapterFilesError(f"{name} could not be written to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(http: httpx.Client, path: str, target: Path) -> None:
    digest = hashlib.sha256()
    with http.stream("GET", path) as answer, target.open("wb") as file:
        if answer.status_code != 200:
            answer.read()
            raise AdapterFilesError(f"the trainer answered {path} with {answer.status_code}: {answer.text[:300]}")
        for chunk in answer.iter_bytes():
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != answer.headers.get(SHA256_HEADER):
        raise AdapterFilesError(f"what the trainer sent as {path} was damaged on its way; it will be fetched again")
