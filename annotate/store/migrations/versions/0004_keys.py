"""A key a project, under which its rows in data sets have their ids."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "project_keys",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("key", sa.String(64), nullable=False),
    )
    connection = op.get_bind()
    known = sa.text("SELECT project FROM ledger UNION SELECT name FROM projects")
    for project in sorted(connection.execute(known).scalars()):
        connection.execute(
            sa.text("INSERT INTO project_keys (project, key) VALUES (:project, :key)"),
            {"project": project, "key": secrets.token_hex(32)},
        )
    op.execute("UPDATE align_store SET schema_version = 4")
