"""Errors of the contract. Each message says what failed, on what, and what to do."""

from __future__ import annotations


class HooksError(Exception):
    """Root of every error raised by ``metaclaw_hooks``."""


class InvalidNameError(HooksError, ValueError):
    """A name that is not a slug, or an adapter name that is not ``agent@vN``."""


class InvalidRewardError(HooksError, ValueError):
    """A reward that is not a finite number in [-1, 1] with a source."""


class InvalidSampleError(HooksError, ValueError):
    """A sample whose token ids, spans and log-probabilities do not fit together."""


class PluginLoadError(HooksError, ImportError):
    """A plugin that could not be imported or registered; the others are loaded all the same."""


class HookFailedError(HooksError):
    """One call of one plugin's hook failed: it raised, ran out of time, or returned what the hook may not return."""


class UnknownHookError(HooksError, LookupError):
    """A call of a hook that the seam does not have."""
