"""Errors of the plugin. Each message says what failed, on what, and what to do."""

from __future__ import annotations


class MetaclawError(Exception):
    """Root of every error that ``metaclaw_plugin`` raises on purpose."""


class ConfigError(MetaclawError, ValueError):
    """The configuration cannot be used as it stands."""


class StoreError(MetaclawError):
    """The store did not answer, or refused."""


class UnknownAgentError(MetaclawError, LookupError):
    """No agent of that name."""


class AgentExistsError(MetaclawError):
    """An agent of that name is there already."""


class SkillError(MetaclawError, ValueError):
    """A skill file, or an edit of one, that cannot be accepted."""


class TrainerUnavailableError(MetaclawError, ConnectionError):
    """The trainer did not answer; what was to be sent stays queued."""


class ProcessError(MetaclawError):
    """A process could not be started, or died."""
