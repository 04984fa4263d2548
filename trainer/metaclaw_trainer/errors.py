"""Errors of the trainer. Each message says what failed, on what, and what to do."""

from __future__ import annotations


class TrainerError(Exception):
    """Root of every error that ``metaclaw_trainer`` raises on purpose."""


class SettingsError(TrainerError, ValueError):
    """The configuration cannot be used as it stands."""


class EngineError(TrainerError):
    """The model could not do what was asked."""


class ModelLoadError(EngineError):
    """The base model could not be loaded."""


class UnknownAdapterError(EngineError, LookupError):
    """No adapter of that key is in the engine."""


class AdapterExistsError(EngineError):
    """An adapter of that key is there already."""


class WrongThreadError(EngineError):
    """The model was touched by a thread that does not own it."""


class EngineStoppedError(EngineError):
    """The engine's thread has ended; nothing more is taken."""


class OutOfMemoryError(EngineError, MemoryError):
    """The device has too little memory for this; the adapter and its optimiser are as they were."""


class NonFiniteError(EngineError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; no step was taken."""


class InvalidDatumError(TrainerError, ValueError):
    """A datum whose lengths, token ids or numbers cannot be trained on."""


class UnknownLossError(TrainerError, LookupError):
    """No loss of that name."""


class AdvantageError(TrainerError, ValueError):
    """Advantages that do not fit the batch."""


class TeacherError(TrainerError):
    """A teacher that cannot be asked, or whose vocabulary is not the student's."""


class CheckpointError(TrainerError):
    """A checkpoint could not be written or read."""


class CheckpointRefusedError(CheckpointError, ValueError):
    """A checkpoint that does not fit, or is not what was written; the reason is in the message."""


class UnknownVersionError(CheckpointError, LookupError):
    """No checkpoint of that version on this machine."""


class StoreError(TrainerError):
    """The trainer's store did not answer, or refused."""


class QueueFullError(TrainerError):
    """An agent has as many samples waiting as it may; send them again later."""


class UnknownAgentError(TrainerError, LookupError):
    """No agent of that name has ever sent a sample or a setting."""


class UnknownSessionError(TrainerError, LookupError):
    """No training session of that id is open here."""


class TooManySessionsError(TrainerError):
    """As many training sessions are open as may be."""


class ConflictError(TrainerError):
    """What was asked does not fit the state that things are in."""


class BadSamplingError(TrainerError, ValueError):
    """A request for samples that no sampler can answer."""


class KeyFileError(TrainerError, ValueError):
    """The file of API keys cannot be read or written, or holds none where one is needed."""


class VllmUnavailableError(TrainerError, ConnectionError):
    """A vLLM did not answer."""


class VllmSilentError(VllmUnavailableError):
    """A vLLM did not answer in time; it may be at work on the request still."""


class VllmRefusedError(TrainerError):
    """A vLLM answered with an error; ``status`` is its HTTP status, ``None`` for an answer that made no sense."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
