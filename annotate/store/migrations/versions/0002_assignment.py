"""Projects with settings and guidelines, remarks, and who judges what next."""

import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
    )
    op.create_table(
        "guidelines",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "remarks",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("item", sa.String(64), nullable=False),
        sa.Column("annotator", sa.String(64), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
    )
    op.create_table(
        "work",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("item", sa.String(64), primary_key=True),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("judged", sa.Integer, nullable=False),
        sa.Column("leased", sa.Integer, nullable=False),
        sa.Column("shuffle", sa.Float(53), nullable=False),
        sa.Column("priority", sa.Float(53), nullable=False),
        sa.Column("gold", sa.Boolean, nullable=False),
    )
    left = sa.text("wanted > judged + leased")
    for name, columns in (("shuffle", ["shuffle"]), ("priority", [sa.text("priority DESC"), "shuffle"])):
        op.create_index(f"work_by_{name}", "work", ["project", *columns], sqlite_where=left, postgresql_where=left)
    op.create_index(
        "work_gold", "work", ["project", "shuffle"], sqlite_where=sa.text("gold = 1"), postgresql_where=sa.text("gold")
    )
    op.create_index("ledger_by_annotator", "ledger", ["project", "annotator", "kind"])
    op.create_table(
        "leases",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("project", sa.String(200), nullable=False),
        sa.Column("annotator", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("item", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(10), nullable=False),
        sa.Column("k", sa.Integer, nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("shown", sa.Text, nullable=False),
        sa.Column("guidelines", sa.Integer),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("granted_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
        sa.Column("vote", sa.Integer),
        sa.UniqueConstraint("project", "annotator", "number"),
    )
    op.create_index("leases_by_item", "leases", ["project", "item", "annotator"])
    op.create_index("leases_by_state", "leases", ["project", "state", "expires_at"])
    op.create_index("leases_of_annotator", "leases", ["project", "annotator", "state", "number"])
    op.create_index("leases_by_turn", "leases", ["project", "annotator", "k", "turn"])
    op.create_table(
        "drafts",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("item", sa.String(64), primary_key=True),
        sa.Column("annotator", sa.String(64), primary_key=True),
        sa.Column("purpose", sa.String(10), primary_key=True),
        sa.Column("content", sa.Text, nullable=False),
    )
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION align_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
            "FOR EACH STATEMENT EXECUTE FUNCTION align_append_only()"
        )
    fill(connection)
    op.execute("UPDATE align_store SET schema_version = 2")


def fill(connection: sa.Connection) -> None:
    """A project for every one that the ledger speaks of, with the settings that leave all as it was, and a row of work
    for every item that is still there."""
    rows = connection.execute(
        sa.text("SELECT seq, project, kind, item, retracts, payload FROM ledger ORDER BY seq")
    ).all()
    gone = {row.retracts for row in rows}
    judged: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.kind == "ranking" and row.seq not in gone and json.loads(row.payload)["source"] == "human":
            judged[row.project, row.item] = judged.get((row.project, row.item), 0) + 1
    for project in sorted({row.project for row in rows}):
        connection.execute(
            sa.text("INSERT INTO projects (name, settings, state) VALUES (:project, '{}', 'open')"),
            {"project": project},
        )
    for project, item in connection.execute(sa.text("SELECT project, id FROM prompts")).all():
        shuffle = int(hashlib.sha256(item.encode()).hexdigest()[:13], 16) / 16**13
        connection.execute(
            sa.text(
                "INSERT INTO work (project, item, wanted, judged, leased, shuffle, priority, gold) "
                "VALUES (:project, :item, 1, :judged, 0, :shuffle, 0, :gold)"
            ),
            {
                "project": project,
                "item": item,
                "judged": judged.get((project, item), 0),
                "shuffle": shuffle,
                "gold": False,
            },
        )
