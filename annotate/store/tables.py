"""The annotation store's tables.

The erasable ones hold what people wrote and who they are; the ledger holds what happened to it, and is never changed.
What stands in `work`, `leases` and `drafts` says who judges what next: all of it can be lost without losing a vote.
Every row of these has a project; users are the whole store's, and `members` says what they may do where.
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


def project_key() -> Column[str]:
    return Column("project", String(200), primary_key=True)


def required(name: str, *what: Any, **options: Any) -> Column[Any]:
    return Column(name, *what, nullable=False, **options)


store_meta = Table(
    "align_store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    required("schema_version", Integer),
)

prompts = Table(
    "prompts",
    metadata,
    project_key(),
    Column("id", String(64), primary_key=True),
    required("messages", Text),  # canonical JSON of [{role, content}, …]
    required("salt", String(64)),
)

candidates = Table(
    "candidates",
    metadata,
    project_key(),
    Column("id", String(64), primary_key=True),
    required("prompt_id", String(64)),
    required("position", Integer),  # 0 … K-1, as sampled; never the order shown to a person
    required("text", Text),
    required("model_digest", String(200)),
    required("adapter_digest", String(200)),
    required("sampling", Text),  # canonical JSON
    required("ended", Boolean),  # True: ended with EOS; False: cut at the length limit
    required("salt", String(64)),
    ForeignKeyConstraint(["project", "prompt_id"], ["prompts.project", "prompts.id"], ondelete="CASCADE"),
    UniqueConstraint("project", "prompt_id", "position"),
)

annotators = Table(
    "annotators",
    metadata,
    project_key(),
    Column("pseudonym", String(64), primary_key=True),  # random, so that it says nothing once the identity is gone
    required("identity", String(320)),
    required("salt", String(64)),
    UniqueConstraint("project", "identity"),
)

# No foreign keys: the ledger outlives the contents that it speaks of. A trigger refuses to change it: a slip of the
# hand in a SQL shell should not rewrite history; an attacker drops the trigger, and meets the hashes.
ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    required("project", String(200)),
    required("kind", String(20)),
    Column("item", String(64)),
    Column("annotator", String(64)),
    Column("key", String(300)),
    Column("retracts", Integer, unique=True),
    required("created_at", String(40)),
    required("payload", Text),
    required("prev_hash", String(64)),
    required("hash", String(64)),
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
    required("settings", Text),  # canonical JSON of `Settings`
    required("state", String(10)),  # open, paused or closed
)

# Content ids of the project's rows in data sets are made under it. Nobody can say any more whose they are once it is
# gone: an erased text cannot be guessed and looked for.
keys = Table(
    "project_keys",
    metadata,
    project_key(),
    required("key", String(64)),  # 32 random bytes, hex
)

guidelines = Table(
    "guidelines",
    metadata,
    project_key(),
    Column("version", Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, …
    required("text", Text),  # Markdown
)

remarks = Table(
    "remarks",
    metadata,
    project_key(),
    Column("seq", Integer, primary_key=True, autoincrement=False),  # of the vote that it goes with
    required("item", String(64)),
    required("annotator", String(64)),
    required("content", Text),  # canonical JSON of {rationale, demonstration}
    required("salt", String(64)),
)

# SQLite takes a partial index where the query says its condition in the same words; `test_gold_and_repeats` asks its
# planner.
LEFT = text("wanted > judged + leased")

# One row an item. The two counters are what the ledger and the open leases say, kept so that the next item is found
# without counting; `restore` counts anew.
work = Table(
    "work",
    metadata,
    project_key(),
    Column("item", String(64), primary_key=True),
    required("wanted", Integer),  # people who are to judge it; 0 for a gold item
    required("judged", Integer),  # standing rankings by people, neither gold nor repeated
    required("leased", Integer),  # open leases, likewise
    required("shuffle", Float(53)),  # in [0, 1), a function of the id: the random order
    required("priority", Float(53)),  # higher goes first where the project says so
    required("gold", Boolean),  # its answer is known: asked of everyone, to see how they judge
    Index("work_by_shuffle", "project", "shuffle", sqlite_where=LEFT, postgresql_where=LEFT),
    Index("work_by_priority", "project", text("priority DESC"), "shuffle", sqlite_where=LEFT, postgresql_where=LEFT),
    Index("work_gold", "project", "shuffle", sqlite_where=text("gold = 1"), postgresql_where=text("gold")),
)

leases = Table(
    "leases",
    metadata,
    Column("token", String(64), primary_key=True),
    required("project", String(200)),
    required("annotator", String(64)),
    required("number", Integer),  # the annotator's 0th, 1st, 2nd, …
    required("item", String(64)),
    required("purpose", String(10)),  # work, gold, repeat or review
    required("k", Integer),  # how many candidates
    required("turn", Integer),  # the annotator's 0th, 1st, 2nd, … of so many
    required("shown", Text),  # canonical JSON: candidate ids as they stand on the screen
    required("state", String(10)),  # open, judged, expired or returned
    required("granted_at", Float(53)),  # seconds since 1970, by the queue's clock
    required("expires_at", Float(53)),
    Column("vote", Integer),  # the seq of the vote it led to
    UniqueConstraint("project", "annotator", "number"),
    Index("leases_by_item", "project", "item", "annotator"),
    Index("leases_by_state", "project", "state", "expires_at"),
    Index("leases_of_annotator", "project", "annotator", "state", "number"),
    Index("leases_by_turn", "project", "annotator", "k", "turn"),
)

drafts = Table(
    "drafts",
    metadata,
    project_key(),
    Column("item", String(64), primary_key=True),
    Column("annotator", String(64), primary_key=True),
    Column("purpose", String(10), primary_key=True),
    required("content", Text),  # canonical JSON
)

users = Table(
    "users",
    metadata,
    Column("id", String(32), primary_key=True),
    required("name", String(320), unique=True),  # the identity of their annotator in every project
    required("password", Text),  # an argon2 hash
    required("created_at", Float(53)),
)

members = Table(
    "members",
    metadata,
    project_key(),
    Column("user", String(32), ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    required("role", String(10)),  # annotator, reviewer or admin
)

# Of sessions and invitations the token's SHA-256: whoever reads the database can use neither.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    required("user", String(32), ForeignKey("users.id", ondelete="CASCADE")),
    required("expires_at", Float(53)),
    Index("sessions_of_user", "user"),
)

invitations = Table(
    "invitations",
    metadata,
    Column("digest", String(64), primary_key=True),
    required("project", String(200)),
    required("role", String(10)),
    required("name", String(320)),  # whom it is for; empty: whoever has it chooses a name
    required("made_by", String(32)),  # a user; empty: the operator of the server
    required("expires_at", Float(53)),
)
