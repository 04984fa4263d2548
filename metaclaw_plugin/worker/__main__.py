"""``python -m metaclaw_plugin.worker``: the worker's process; the config file is named by METACLAW_CONFIG."""

from __future__ import annotations

import logging
import sys

from metaclaw_plugin.errors import MetaclawError
from metaclaw_plugin.settings import load_settings
from metaclaw_plugin.worker.loop import main

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every poll of the trainer

if __name__ == "__main__":
    try:
        main(load_settings())
    except MetaclawError as error:
        sys.exit(f"metaclaw worker: {error}")
