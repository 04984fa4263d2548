"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Config file; unset: $METACLAW_CONFIG, else litellm_config.yaml in METACLAW_HOME.",
        show_default=False,
    ),
]
Port = Annotated[
    int | None,
    typer.Option("--port", min=1, max=65535, help="Port to listen on; unset: the configured one.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
