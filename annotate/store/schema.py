"""The annotation store's tables and how a database is opened.

Three erasable tables hold what people wrote and who they are; the ledger holds what happened to it. Every row has a
project. Leases, accounts and drafts will be tables beside these: nothing here reads or forbids them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    DDL,
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from align.errors import CorruptFile, InputError, StorageError

SCHEMA_VERSION = 1

EXAMPLES = "Write store.url=sqlite:///runs/annotations.db or store.url=postgresql+psycopg://user@host/name."

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

# No foreign keys: the ledger outlives the contents that it speaks of.
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
)

# A slip of the hand in a SQL shell should not rewrite history; an attacker drops the trigger, and meets the hashes.
for _verb in ("UPDATE", "DELETE"):
    _ddl = DDL(
        f"CREATE TRIGGER ledger_no_{_verb.lower()} BEFORE {_verb} ON ledger "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    )
    event.listen(ledger, "after_create", _ddl.execute_if(dialect="sqlite"))


def connect(url: str, create: bool = True) -> Engine:
    """An engine on the store at `url`, its tables made where they are missing.

    Args:
        url: a SQLAlchemy URL.
        create: make the database file and the tables if there are none; a reader says False.

    Raises:
        InputError: no URL, no driver, no store there, another program's database, another schema version.
        StorageError: the database cannot be reached or written.
        CorruptFile: the file is no SQLite database.
    """
    parsed = _parse(url)
    shown = parsed.render_as_string(hide_password=True)
    on_sqlite = parsed.get_backend_name() == "sqlite"
    if on_sqlite and parsed.database and parsed.database != ":memory:" and not parsed.database.startswith("file:"):
        _prepare_file(Path(parsed.database), shown, create)
    try:
        engine = create_engine(parsed, hide_parameters=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError("store.url", shown, f"its driver is not installed ({error})", EXAMPLES) from error
    if on_sqlite:
        event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin)
    try:
        with explained(shown):
            _migrate(engine, shown, create)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def explained(shown: str) -> Iterator[None]:
    """Turns what the database itself could not do into an `InputError` on `store.url`; never quotes SQL or contents."""
    try:
        yield
    except OperationalError as error:
        remedy = "Check that it is reachable and writable, that the disk has room, and that nobody else holds it."
        raise StorageError("store.url", shown, f"the database refused ({error.orig})", remedy) from error
    except DatabaseError as error:
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            remedy = "Name a store that align made, or a file that does not exist yet."
            raise CorruptFile("store.url", shown, f"not a SQLite database ({error.orig})", remedy) from error
        raise


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise InputError("store.url", url, "not a database URL", EXAMPLES) from error


def _prepare_file(path: Path, shown: str, create: bool) -> None:
    if not create and not path.exists():
        raise InputError(
            "store.url", shown, "there is no store", "Fill one first with stage=sample, or check the path."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Choose a folder that you can write to."
        raise StorageError("store.url", shown, f"its folder cannot be made ({error.strerror})", remedy) from error


LOCKED_S = 30
"""Seconds that a writer waits for another."""


def _configure_sqlite(connection, _record) -> None:
    # The driver's own transaction handling is off: `_begin` says BEGIN, and writers say BEGIN IMMEDIATE, so that
    # two of them queue at the start instead of failing at the first write.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={LOCKED_S * 1000}",  # first, for switching to WAL takes a lock itself
        "journal_mode=WAL",
        "synchronous=FULL",  # a vote that was acknowledged survives a power cut
        "foreign_keys=ON",
        "secure_delete=ON",  # an erased text is overwritten with zeros, not only unlinked
    ):
        _execute(connection, f"PRAGMA {pragma}")


def _execute(connection, statement: str) -> None:
    """Run a statement, again while the database is locked, for up to `LOCKED_S`: of two first connections that switch
    to WAL at once SQLite refuses one without waiting, whatever the busy timeout, for both hold a lock already."""
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            connection.execute(statement).close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin(connection) -> None:
    if connection.dialect.name == "sqlite":
        immediate = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _migrate(engine: Engine, shown: str, create: bool) -> None:
    """Makes the tables in an empty database; refuses any schema but this one."""
    with engine.connect() as connection, connection.begin():
        version = _version(connection, shown)
    if version is None:
        if not create:
            raise InputError("store.url", shown, "there is no store", "Fill one first with stage=sample.")
        with engine.connect().execution_options(writing=True) as connection, connection.begin():
            version = _version(connection, shown)  # again, under the lock: another process may have been first
            if version is None:
                metadata.create_all(connection)
                connection.execute(insert(store_meta).values(id=1, schema_version=SCHEMA_VERSION))
                version = SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        age, remedy = (
            ("a newer", "Upgrade align: pip install -U align.")
            if version > SCHEMA_VERSION
            else ("an older", "Read it with the align that wrote it, or begin a new store under another store.url.")
        )
        problem = f"the store has schema_version {version}, of {age} align; this one reads {SCHEMA_VERSION}"
        raise InputError("store.url", shown, problem, remedy)


def _version(connection: Connection, shown: str) -> int | None:
    """The schema's version; None in a database that holds no store yet."""
    found = set(inspect(connection).get_table_names())
    if store_meta.name in found:
        return connection.execute(select(store_meta.c.schema_version)).scalar_one()
    # A SQLite file belongs to one program; a PostgreSQL database may hold others' tables, but not under our names.
    clash = found if connection.dialect.name == "sqlite" else found & set(metadata.tables)
    if clash:
        problem = f"the database belongs to another program (it holds the table {min(clash)})"
        raise InputError("store.url", shown, problem, "Give the store a database of its own.")
    return None
