"""``python -m metaclaw_plugin.console [--port N]``: the console's process."""

from __future__ import annotations

import argparse
import logging
import sys

import uvicorn

from metaclaw_plugin.console.app import create_app
from metaclaw_plugin.errors import MetaclawError
from metaclaw_plugin.settings import find_config, load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the console.")
    parser.add_argument("--port", type=int, help="Port to listen on; unset: the configured one.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = find_config()
        settings = load_settings(config)
        app = create_app(settings, config)
    except MetaclawError as error:
        sys.stderr.write(f"metaclaw console: {error}\n")
        return 1
    port = options.port or settings.console.port
    # No access log: paths name agents and conversations, and nobody reads it.
    uvicorn.run(
        app, host=settings.console.host, port=port, access_log=False, log_config=None, timeout_graceful_shutdown=3
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
