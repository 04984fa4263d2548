"""Write the alembic revision that makes the store what ``metaclaw_plugin/store/schema.py`` says.

    python scripts/new_migration.py "Add the column x to traces"
    python scripts/new_migration.py --first      # write 0001 anew; only before the first release

Afterwards set HEAD in metaclaw_plugin/store/migrations/__init__.py to the new revision, and read what was written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

MIGRATIONS = Path(__file__).resolve().parent.parent / "metaclaw_plugin" / "store" / "migrations"


def main() -> None:
    """Compare an empty SQLite database, migrated so far, with the schema."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("message", nargs="?", help="what changes, in a few words")
    parser.add_argument("--first", action="store_true", help="write the first revision anew")
    given = parser.parse_args()
    if given.first == bool(given.message):
        parser.error("give either a message or --first")
    if given.first:
        for old in (MIGRATIONS / "versions").glob("*.py"):
            old.unlink()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    engine = sa.create_engine("sqlite://")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        number = len(list(ScriptDirectory.from_config(config).walk_revisions())) + 1
        command.revision(config, given.message or "Initial tables", autogenerate=True, rev_id=f"{number:04}")
    for written in (MIGRATIONS / "versions").glob(f"{number:04}_*.py"):
        text = written.read_text(encoding="utf-8")
        for digit, name in (("1", "true"), ("0", "false")):  # SQLite's spelling, which PostgreSQL refuses
            text = text.replace(
                f"sa.Boolean(), server_default=sa.text('{digit}')", f"sa.Boolean(), server_default=sa.{name}()"
            )
        written.write_text(text, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(written)], check=True)
        subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "--fix", str(written)], check=True)


if __name__ == "__main__":
    main()
