"""What every section of the settings is made of."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Root of all sections: unknown names are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def resolve_secret(value: str | None) -> str | None:
    """``os.environ/NAME`` -> the variable's value, as LiteLLM writes it; anything else as it is.

    Raises:
        ValueError: if the variable is not set.
    """
    if value is None or not value.startswith("os.environ/"):
        return value
    name = value.removeprefix("os.environ/")
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]
