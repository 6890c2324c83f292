"""The annotation store's tables.

The erasable ones hold what people wrote and who they are; the ledger holds what happened to it, and is never changed.
What stands in `work`, `leases` and `drafts` says who judges what next: all of it can be lost without losing a vote.
Every row of these has a project; users are the whole store's, and `members` says what they may do where.
"""

from __future__ import annotations

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

store_meta = Table(
    "align_store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
)

prompts = Table(
    "prompts",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("messages", Text, nullable=False),  # canonical JSON of [{role, content}, …]
    Column("salt", String(64), nullable=False),
)

candidates = Table(
    "candidates",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("prompt_id", String(64), nullable=False),
    Column("position", Integer, nullable=False),  # 0 … K-1, as sampled; never the order shown to a person
    Column("text", Text, nullable=False),
    Column("model_digest", String(200), nullable=False),
    Column("adapter_digest", String(200), nullable=False),
    Column("sampling", Text, nullable=False),  # canonical JSON
    Column("ended", Boolean, nullable=False),  # True: ended with EOS; False: cut at the length limit
    Column("salt", String(64), nullable=False),
    ForeignKeyConstraint(["project", "prompt_id"], ["prompts.project", "prompts.id"], ondelete="CASCADE"),
    UniqueConstraint("project", "prompt_id", "position"),
)

annotators = Table(
    "annotators",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("pseudonym", String(64), primary_key=True),  # random, so that it says nothing once the identity is gone
    Column("identity", String(320), nullable=False),
    Column("salt", String(64), nullable=False),
    UniqueConstraint("project", "identity"),
)

# No foreign keys: the ledger outlives the contents that it speaks of. A trigger refuses to change it: a slip of the
# hand in a SQL shell should not rewrite history; an attacker drops the trigger, and meets the hashes.
ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("project", String(200), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("item", String(64)),
    Column("annotator", String(64)),
    Column("key", String(300)),
    Column("retracts", Integer, unique=True),
    Column("created_at", String(40), nullable=False),
    Column("payload", Text, nullable=False),
    Column("prev_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
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
    Column("settings", Text, nullable=False),  # canonical JSON of `Settings`
    Column("state", String(10), nullable=False),  # open, paused or closed
)

# Content ids of the project's rows in data sets are made under it. Nobody can say any more whose they are once it is
# gone: an erased text cannot be guessed and looked for.
keys = Table(
    "project_keys",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("key", String(64), nullable=False),  # 32 random bytes, hex
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, …
    Column("text", Text, nullable=False),  # Markdown
)

remarks = Table(
    "remarks",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),  # of the vote that it goes with
    Column("item", String(64), nullable=False),
    Column("annotator", String(64), nullable=False),
    Column("content", Text, nullable=False),  # canonical JSON of {rationale, demonstration}
    Column("salt", String(64), nullable=False),
)

# SQLite takes a partial index where the query says its condition in the same words; `test_gold_and_repeats` asks its
# planner.
LEFT = text("wanted > judged + leased")

# One row an item. The two counters are what the ledger and the open leases say, kept so that the next item is found
# without counting; `restore` counts anew.
work = Table(
    "work",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("item", String(64), primary_key=True),
    Column("wanted", Integer, nullable=False),  # people who are to judge it; 0 for a gold item
    Column("judged", Integer, nullable=False),  # standing rankings by people, neither gold nor repeated
    Column("leased", Integer, nullable=False),  # open leases, likewise
    Column("shuffle", Float(53), nullable=False),  # in [0, 1), a function of the id: the random order
    Column("priority", Float(53), nullable=False),  # higher goes first where the project says so
    Column("gold", Boolean, nullable=False),  # its answer is known: asked of everyone, to see how they judge
    Index("work_by_shuffle", "project", "shuffle", sqlite_where=LEFT, postgresql_where=LEFT),
    Index("work_by_priority", "project", text("priority DESC"), "shuffle", sqlite_where=LEFT, postgresql_where=LEFT),
    Index("work_gold", "project", "shuffle", sqlite_where=text("gold = 1"), postgresql_where=text("gold")),
)

leases = Table(
    "leases",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("project", String(200), nullable=False),
    Column("annotator", String(64), nullable=False),
    Column("number", Integer, nullable=False),  # the annotator's 0th, 1st, 2nd, …
    Column("item", String(64), nullable=False),
    Column("purpose", String(10), nullable=False),  # work, gold, repeat or review
    Column("k", Integer, nullable=False),  # how many candidates
    Column("turn", Integer, nullable=False),  # the annotator's 0th, 1st, 2nd, … of so many
    Column("shown", Text, nullable=False),  # canonical JSON: candidate ids as they stand on the screen
    Column("state", String(10), nullable=False),  # open, judged, expired or returned
    Column("granted_at", Float(53), nullable=False),  # seconds since 1970, by the queue's clock
    Column("expires_at", Float(53), nullable=False),
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
    Column("project", String(200), primary_key=True),
    Column("item", String(64), primary_key=True),
    Column("annotator", String(64), primary_key=True),
    Column("purpose", String(10), primary_key=True),
    Column("content", Text, nullable=False),  # canonical JSON
)

users = Table(
    "users",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(320), nullable=False, unique=True),  # the identity of their annotator in every project
    Column("password", Text, nullable=False),  # an argon2 hash
    Column("created_at", Float(53), nullable=False),
)

members = Table(
    "members",
    metadata,
    Column("project", String(200), primary_key=True),
    Column("user", String(32), ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(10), nullable=False),  # annotator, reviewer or admin
)

# Of sessions and invitations the token's SHA-256: whoever reads the database can use neither.
sessions = Table(
    "sessions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("user", String(32), ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Index("sessions_of_user", "user"),
)

invitations = Table(
    "invitations",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("project", String(200), nullable=False),
    Column("role", String(10), nullable=False),
    Column("name", String(320), nullable=False),  # whom it is for; empty: whoever has it chooses a name
    Column("made_by", String(32), nullable=False),  # a user; empty: the operator of the server
    Column("expires_at", Float(53), nullable=False),
)
