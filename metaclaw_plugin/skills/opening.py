"""A library that fills itself, keeps itself fresh, and can be searched: what a serving process opens once."""

from __future__ import annotations

import logging

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.embedding import load_embedder
from metaclaw_plugin.skills.install import install_starter
from metaclaw_plugin.skills.library import Library, Watcher
from metaclaw_plugin.skills.retrieval import Retriever

log = logging.getLogger(__name__)


def open_library(settings: Settings) -> Library:
    """The library of these settings, with the starter set in it if it is empty and that is wanted.

    A folder that cannot be written is no reason not to serve: that is logged, and the library is what there is.
    """
    if settings.skills.starter:
        try:
            install_starter(settings.skills_path)
        except SkillError as error:
            log.error("skills: %s", error)
    return Library(settings.skills_path)


def open_skills(settings: Settings) -> tuple[Library, Retriever]:
    """The library, watched from now on in a thread of its own, and the retriever over it.

    Raises:
        ConfigError: if the embedder that the settings name cannot be loaded.
    """
    library = open_library(settings)
    retriever = Retriever(library, settings.skills, load_embedder(settings.skills))
    Watcher(library, settings.skills.reload_interval, retriever.embed_new).start()
    return library, retriever
