"""What one gateway process consists of, made once. LiteLLM executes the callback by path; what lasts lives here."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from functools import cache

from metaclaw_hooks.plugins import HookStats, create_plugin_manager
from metaclaw_hooks.watching import FolderWatch
from sqlalchemy.engine import Engine

from metaclaw_plugin.gateway.metrics import Metrics
from metaclaw_plugin.gateway.process import this_process
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.opening import open_skills
from metaclaw_plugin.store.hook_counters import add_hook_stats

logger = logging.getLogger(__name__)

HOOKS = ("select_skills", "redact_trace")  # the hooks that a gateway calls
_FIRST_WORDS = {"role": "user", "content": "Good morning"}
_FLUSH_TIME = 10.0  # seconds that a process has, at its end, to store what is queued


def create_gateway(settings: Settings, engine: Engine) -> Gateway:
    """Put a gateway together."""
    library, retriever = open_skills(settings)
    retriever.select("", [_FIRST_WORDS])  # builds its index now, or the first request would wait for that
    plugins = create_plugin_manager(settings.hooks_path, settings.hooks.request_timeout, wanted=HOOKS)
    FolderWatch(plugins, report=lambda fresh: _count(engine, fresh)).start()
    return Gateway(
        settings=settings,
        engine=engine,
        library=library,
        retriever=retriever,
        plugins=plugins,
        metrics=Metrics(),
    )


def _count(engine: Engine, fresh: Mapping[tuple[str, str], HookStats]) -> None:
    with engine.begin() as c:
        add_hook_stats(c, fresh)


@cache
def process_gateway() -> Gateway:
    """The gateway of this process."""
    held = this_process()
    gateway = create_gateway(held.settings, held.engine)
    atexit.register(_flush, gateway)
    return gateway


def _flush(gateway: Gateway) -> None:
    if not gateway.close(_FLUSH_TIME):
        logger.error("traces were still queued %g s after the gateway was told to stop; they are lost", _FLUSH_TIME)
