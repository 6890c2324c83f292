"""The tables of an annotation store.

Texts and identities lie in erasable tables; the ledger records what happened to them, and is never changed. `work` and
`leases` serve to assign items, and `drafts` hold judgements that were not sent: no vote is lost with them. All rows
belong to a project but users, which belong to the whole store; `members` holds their roles by project.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    DDL,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    text,
)

metadata = MetaData()


def project_column() -> Column[str]:
    return Column("project", String(200), primary_key=True)


def required_column(name: str, *column_arguments: Any, **options: Any) -> Column[Any]:
    return Column(name, *column_arguments, nullable=False, **options)


store_meta = Table(
    "align_store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    required_column("schema_version", Integer),
)

prompts = Table(
    "prompts",
    metadata,
    project_column(),
    Column("id", String(64), primary_key=True),
    required_column("messages", Text),  # canonical JSON of [{role, content}, …]
    required_column("salt", String(64)),
)

candidates = Table(
    "candidates",
    metadata,
    project_column(),
    Column("id", String(64), primary_key=True),
    required_column("prompt_id", String(64)),
    required_column("position", Integer),  # 0 … K-1, as sampled; never the order shown to a person
    required_column("text", Text),
    required_column("model_digest", String(200)),
    required_column("adapter_digest", String(200)),
    required_column("sampling", Text),  # canonical JSON
    required_column("ended", Boolean),  # True if it ended with EOS, False if it was cut at the length limit
    required_column("salt", String(64)),
    ForeignKeyConstraint(["project", "prompt_id"], ["prompts.project", "prompts.id"], ondelete="CASCADE"),
    UniqueConstraint("project", "prompt_id", "position"),
)

annotators = Table(
    "annotators",
    metadata,
    project_column(),
    Column("pseudonym", String(64), primary_key=True),  # random, so that it says nothing once the identity is erased
    required_column("identity", String(320)),
    required_column("salt", String(64)),
    UniqueConstraint("project", "identity"),
)

# No foreign keys: the ledger outlives the contents that it mentions. A trigger guards against accidental changes, such
# as in a SQL shell. An attacker can drop the trigger, but changed rows no longer fit the chain of hashes.
ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    required_column("project", String(200)),
    required_column("kind", String(20)),
    Column("item", String(64)),
    Column("annotator", String(64)),
    Column("key", String(300)),
    Column("retracts", Integer, unique=True),
    required_column("created_at", String(40)),
    required_column("payload", Text),
    required_column("prev_hash", String(64)),
    required_column("hash", String(64)),
    UniqueConstraint("project", "kind", "key"),
    Index("ledger_by_item", "project", "item", "kind", "annotator"),
    Index("ledger_by_kind", "project", "kind", "seq"),
    Index("ledger_by_annotator", "project", "annotator", "kind"),
)
REFUSE_ON_SQLITE = "CREATE TRIGGER {} BEFORE {} ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
APPEND_ONLY = [
    ("sqlite", REFUSE_ON_SQLITE.format("ledger_no_update", "UPDATE")),
    ("sqlite", REFUSE_ON_SQLITE.format("ledger_no_delete", "DELETE")),
    (
        "postgresql",
        (
            "CREATE FUNCTION align_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$"
        ),
    ),
    (
        "postgresql",
        (
            "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
            "FOR EACH STATEMENT EXECUTE FUNCTION align_append_only()"
        ),
    ),
]
for dialect, statement in APPEND_ONLY:
    event.listen(ledger, "after_create", DDL(statement).execute_if(dialect=dialect))

projects = Table(
    "projects",
    metadata,
    Column("name", String(200), primary_key=True),
    required_column("settings", Text),  # canonical JSON of `ProjectSettings`
    required_column("state", String(10)),  # open, paused or closed
)

# The content ids of the project's rows in data sets are keyed hashes. Once the key is erased, an id can no longer be
# matched with a guessed text.
project_keys = Table(
    "project_keys",
    metadata,
    project_column(),
    required_column("key", String(64)),  # 32 random bytes, hex
)

guidelines = Table(
    "guidelines",
    metadata,
    project_column(),
    Column("version", Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, …
    required_column("text", Text),  # Markdown
)

remarks = Table(
    "remarks",
    metadata,
    project_column(),
    Column("seq", Integer, primary_key=True, autoincrement=False),  # of its vote
    required_column("item", String(64)),
    required_column("annotator", String(64)),
    required_column("content", Text),  # canonical JSON of {rationale, demonstration}
    required_column("salt", String(64)),
)

# SQLite uses a partial index only if the query repeats its condition literally; `test_gold_and_repeats` checks the
# query plan.
WANTS_VOTES = text("wanted > judged + leased")

# One row per item. The counters repeat what the ledger and the open leases hold, so that the next item is found without
# counting; `restore_store` recounts them.
work = Table(
    "work",
    metadata,
    project_column(),
    Column("item", String(64), primary_key=True),
    required_column("wanted", Integer),  # number of people who are to judge it; 0 for a gold item
    required_column("judged", Integer),  # standing rankings by people, without gold and repeats
    required_column("leased", Integer),  # open leases, likewise
    required_column("shuffle", Float(53)),  # in [0, 1), a function of the id: the random order
    required_column("priority", Float(53)),  # higher goes first if the project's order is `priority`
    required_column("gold", Boolean),  # has a known answer, and is given to everyone to measure them
    Index("work_by_shuffle", "project", "shuffle", sqlite_where=WANTS_VOTES, postgresql_where=WANTS_VOTES),
    Index(
        "work_by_priority",
        "project",
        text("priority DESC"),
        "shuffle",
        sqlite_where=WANTS_VOTES,
        postgresql_where=WANTS_VOTES,
    ),
    Index("work_gold", "project", "shuffle", sqlite_where=text("gold = 1"), postgresql_where=text("gold")),
)

leases = Table(
    "leases",
    metadata,
    Column("token", String(64), primary_key=True),
    required_column("project", String(200)),
    required_column("annotator", String(64)),
    required_column("number", Integer),  # counts the annotator's leases from 0
    required_column("item", String(64)),
    required_column("purpose", String(10)),  # work, gold, repeat or review
    required_column("k", Integer),  # number of candidates
    required_column("turn", Integer),  # counts the annotator's leases with k candidates from 0
    required_column("shown", Text),  # canonical JSON: candidate ids in their order on the screen
    required_column("state", String(10)),  # open, judged, expired or returned
    required_column("granted_at", Float(53)),  # seconds since 1970, by the queue's clock
    required_column("expires_at", Float(53)),
    Column("vote", Integer),  # seq of the vote that ended it
    UniqueConstraint("project", "annotator", "number"),
    Index("leases_by_item", "project", "item", "annotator"),
    Index("leases_by_state", "project", "state", "expires_at"),
    Index("leases_of_annotator", "project", "annotator", "state", "number"),
    Index("leases_by_turn", "project", "annotator", "k", "turn"),
)

drafts = Table(
    "drafts",
    metadata,
    project_column(),
    Column("item", String(64), primary_key=True),
    Column("annotator", String(64), primary_key=True),
    Column("purpose", String(10), primary_key=True),
    required_column("content", Text),  # canonical JSON
)

users = Table(
    "users",
    metadata,
    Column("id", String(32), primary_key=True),
    required_column("name", String(320), unique=True),  # also the annotator's identity in every project
    required_column("password", Text),  # an argon2 hash
    required_column("created_at", Float(53)),
)

members = Table(
    "members",
    metadata,
    project_column(),
    Column("user", String(32), ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    required_column("role", String(10)),  # annotator, reviewer or admin
)

# Sessions and invitations are stored by the SHA-256 of their token, so that a reader of the database cannot use them.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    required_column("user", String(32), ForeignKey("users.id", ondelete="CASCADE")),
    required_column("expires_at", Float(53)),
    Index("sessions_of_user", "user"),
)

invitations = Table(
    "invitations",
    metadata,
    Column("digest", String(64), primary_key=True),
    required_column("project", String(200)),
    required_column("role", String(10)),
    required_column("name", String(320)),  # the person's; empty if the holder chooses one
    required_column("made_by", String(32)),  # a user's id; empty for the operator of the server
    required_column("expires_at", Float(53)),
)
