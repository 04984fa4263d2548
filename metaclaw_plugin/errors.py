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


class TrainerFullError(TrainerUnavailableError):
    """The trainer has no room for more samples of one agent now; there may be room for those of others."""


class TrainerRefusedError(MetaclawError):
    """The trainer answered, and will not do what was asked; asking again changes nothing."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # of its HTTP answer


class ProcessError(MetaclawError):
    """A process could not be started, or died."""


class UnknownVersionError(MetaclawError, LookupError):
    """No adapter version of that name."""


class VersionStateError(MetaclawError):
    """An adapter version cannot go from the state that it is in to the one asked for."""


class UnknownKeyError(MetaclawError, LookupError):
    """No key of that id."""


class UnknownTraceError(MetaclawError, LookupError):
    """No trace of that id, or none that this caller may see."""


class UnknownSessionError(MetaclawError, LookupError):
    """No session of that id, or none that this caller may see."""


class ForbiddenAgentError(MetaclawError, PermissionError):
    """The key does not act for the agent that the request names."""


class ExportError(MetaclawError):
    """An adapter version could not be written out."""


class AdapterFilesError(MetaclawError):
    """The files of an adapter version could not be fetched from the trainer."""


class TrainingNotStartedError(MetaclawError):
    """The trainer has nothing to train the agent on."""


class SamplerUnavailableError(MetaclawError, ConnectionError):
    """vLLM did not answer, or lacks an adapter for now; to be tried again."""


class SamplerRefusedError(MetaclawError):
    """vLLM answered, but not with what was asked for."""


class CalendarError(MetaclawError):
    """A calendar that cannot be read, or is none."""


class BackupError(MetaclawError):
    """A backup could not be written, or is none that can be restored."""


class LitellmAdminError(MetaclawError):
    """LiteLLM's admin API did not answer, or refused."""


class ClaimError(MetaclawError, PermissionError):
    """What was shown to sign in to the console does not count."""
