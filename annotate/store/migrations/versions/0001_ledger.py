"""Prompts, candidates, annotators, and the ledger of what happened to them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "align_store",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
    )
    op.execute("INSERT INTO align_store (id, schema_version) VALUES (1, 1)")
    op.create_table(
        "prompts",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("messages", sa.Text, nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
    )
    op.create_table(
        "candidates",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("prompt_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("model_digest", sa.String(200), nullable=False),
        sa.Column("adapter_digest", sa.String(200), nullable=False),
        sa.Column("sampling", sa.Text, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["project", "prompt_id"], ["prompts.project", "prompts.id"], ondelete="CASCADE"),
        sa.UniqueConstraint("project", "prompt_id", "position"),
    )
    op.create_table(
        "annotators",
        sa.Column("project", sa.String(200), primary_key=True),
        sa.Column("pseudonym", sa.String(64), primary_key=True),
        sa.Column("identity", sa.String(320), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.UniqueConstraint("project", "identity"),
    )
    op.create_table(
        "ledger",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("project", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("item", sa.String(64)),
        sa.Column("annotator", sa.String(64)),
        sa.Column("key", sa.String(300)),
        sa.Column("retracts", sa.Integer, unique=True),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("prev_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.UniqueConstraint("project", "kind", "key"),
    )
    op.create_index("ledger_by_item", "ledger", ["project", "item", "kind", "annotator"])
    op.create_index("ledger_by_kind", "ledger", ["project", "kind", "seq"])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER ledger_no_{verb.lower()} BEFORE {verb} ON ledger "
                "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            )
