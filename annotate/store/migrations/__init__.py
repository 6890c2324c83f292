"""How a store's tables come to be, one alembic revision a step: a new store takes all of them, an older one the rest.

A store says in `align_store.schema_version` which revision it has reached; alembic's own note lies in
`align_alembic_version`, so that it disturbs nobody else's in a shared PostgreSQL database.
"""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect

logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every step

VERSION_TABLE = "align_alembic_version"
FIRST = "0001"


def upgrade(connection: Connection, known: int | None) -> None:
    """Brings the tables up to date, within the connection's transaction.

    Args:
        known: the store's schema version; None where there is no store yet. The first version knew no alembic.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    if known is not None and not inspect(connection).has_table(VERSION_TABLE):
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
