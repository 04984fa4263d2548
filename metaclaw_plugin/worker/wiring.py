"""The worker's plugins: built-in rewards as the settings say, installed packages, and the owner's folder."""

from __future__ import annotations

from metaclaw_hooks.plugins import Plugins, create_plugin_manager

from metaclaw_plugin.settings import Settings

WORKER_HOOKS = ("score_trace", "combine_rewards", "accept_adapter", "adapter_published")


def load_plugins(settings: Settings) -> Plugins:
    """Load everything that the worker may call."""
    return create_plugin_manager(settings.hooks_path, settings.hooks.timeout, wanted=WORKER_HOOKS)
