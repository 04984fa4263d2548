"""The starter set, copied into an empty library, where it belongs to the owner like any other file."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from metaclaw_plugin.errors import SkillError
from metaclaw_plugin.skills.skill_file import SHARED

log = logging.getLogger(__name__)

STARTER = Path(__file__).parent / "starter"  # package data: one folder for each skill


def install_starter(root: Path) -> bool:
    """Put the starter set into ``root/_shared`` if there is none yet; True if it was put there.

    The folder appears whole: several processes may start at once, and the first one wins.

    Raises:
        SkillError: if the disk refuses.
    """
    target = root / SHARED
    if target.exists():
        return False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".starter-", dir=root) as temporary:
            copy = Path(shutil.copytree(STARTER, Path(temporary) / SHARED))
            copy.rename(target)
    except OSError as error:
        if target.exists():
            return False
        raise SkillError(
            f"cannot put the starter skills into {target}: {error.strerror or error}; "
            "make the folder writable, or set metaclaw.skills.starter: false"
        ) from error
    log.info("skills: the starter set is in %s; edit or remove what you like", target)
    return True
