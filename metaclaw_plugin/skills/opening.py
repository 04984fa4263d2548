"""A library that fills itself, keeps itself fresh, and can be searched: what a serving process opens once."""

from __future__ import annotations

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.embedding import load_embedder
from metaclaw_plugin.skills.install import install_starter
from metaclaw_plugin.skills.library import Library, Watcher
from metaclaw_plugin.skills.retrieval import Retriever


def open_library(settings: Settings) -> Library:
    """The library of these settings, with the starter set in it if it is empty and that is wanted.

    Raises:
        SkillError: if the starter set cannot be written.
    """
    if settings.skills.starter:
        install_starter(settings.skills_path)
    return Library(settings.skills_path)


def open_skills(settings: Settings) -> tuple[Library, Retriever]:
    """The library, watched from now on in a thread of its own, and the retriever over it.

    Raises:
        ConfigError: if the embedder that the settings name cannot be loaded.
        SkillError: if the starter set cannot be written.
    """
    library = open_library(settings)
    retriever = Retriever(library, settings.skills, load_embedder(settings.skills))
    Watcher(library, settings.skills.reload_interval, retriever.embed_new).start()
    return library, retriever
