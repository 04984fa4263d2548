"""LiteLLM's own command with the named points in it: ``python -m tests.faults.at_point --config ...``.

uvicorn starts its workers by importing this module again in each, so they have the points too.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults import points

points.install(Path(os.environ[points.FOLDER_ENV]), "gateway", points.GATEWAY_POINTS)

if __name__ == "__main__":
    from litellm.proxy.proxy_cli import run_server

    run_server()
