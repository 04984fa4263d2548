"""Settings of the console: the web pages."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from metaclaw_plugin.settings_section import Section, resolve_secret

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


class ConsoleSettings(Section):
    """The web pages: what every agent learned, as a page in LiteLLM's admin UI or by itself."""

    enabled: bool = Field(True, description="False: `metaclaw start` starts no console.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(4020, ge=1, le=65535, description="Port of the console.")
    key: str | None = Field(
        None, min_length=16, description="Console key; os.environ/NAME reads a variable; unset: made and kept in home."
    )
    admin_ui: list[str] = Field(
        default_factory=list,
        description="Origins of LiteLLM's admin UI that may show the console; empty: the gateway's port, on this host.",
    )
    plugin_name: str = Field("metaclaw", min_length=1, description="Its name in LiteLLM's `general_settings.plugins`.")
    salt_key: str | None = Field(
        None, min_length=1, description="LiteLLM's salt key, to read its claims; unset: LITELLM_SALT_KEY, if it is set."
    )
    session_hours: float = Field(8.0, gt=0, le=720, description="Hours after which one has to sign in again.")

    @field_validator("key", "salt_key")
    @classmethod
    def _from_environment(cls, value: str | None) -> str | None:
        return resolve_secret(value)

    @field_validator("admin_ui")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if _ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"{origin!r} is no origin such as https://litellm.example:4000 (no path, no slash)")
        return value
