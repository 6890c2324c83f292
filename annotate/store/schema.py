"""How a store is opened: its URL, its durability, and the version of its tables."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from align.annotate.store.tables import metadata, store_meta
from align.core.distribution import install_command
from align.core.errors import CorruptFile, InputError, StorageError, require_schema_version
from align.core.outputs import refuse_foreign_database
from align.core.redaction import secret_url, value_of

SCHEMA_VERSION = 5

EXAMPLES = "Write store.url=sqlite:///runs/annotations.db or store.url=postgresql+psycopg://user@host/name."

OTHER_STORE = "Name a store that align made, or a file that does not exist yet."

POOL = {"max_overflow": 60, "pool_timeout": 60}
"""More connections than a server has threads, so that each waits for the lock and none for a connection."""

LOCK = 0x616C69676E
"""PostgreSQL's advisory lock of the process that makes the tables."""


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
    engine = _engine(url, create)
    masked_url = _masked(engine.url)
    try:
        with explained(masked_url):
            _ready(engine, masked_url, create)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _engine(url: str, create: bool) -> Engine:
    """An engine whose transactions and durability are ours; the database has not been looked at."""
    parsed = _parse(url)
    masked_url = _masked(parsed)
    on_sqlite = parsed.get_backend_name() == "sqlite"
    if on_sqlite and parsed.database and parsed.database != ":memory:":
        plain = not parsed.database.startswith("file:")
        path = Path(parsed.database if plain else unquote(parsed.database.removeprefix("file:").partition("?")[0]))
        if not path.is_dir():  # SQLite says of a folder that it cannot open it
            refuse_foreign_database(path, "store.url", (store_meta.name,), OTHER_STORE, masked_url)
        if plain:
            _prepare_file(path, masked_url, create)
    try:
        in_memory = on_sqlite and parsed.database in (None, "", ":memory:")
        engine = create_engine(parsed, hide_parameters=True, **({} if in_memory else POOL))
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        remedy = f"{EXAMPLES} PostgreSQL needs: {install_command('postgres')}"
        raise InputError("store.url", masked_url, f"its driver is not installed ({error})", remedy) from error
    if on_sqlite:
        event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


@contextmanager
def explained(masked_url: str) -> Iterator[None]:
    """Turns what the database itself could not do into an `InputError` on `store.url`; never quotes SQL or contents."""
    try:
        yield
    except PoolTimeout as error:
        remedy = "Somebody holds it for long; send again what you sent."
        raise StorageError("store.url", masked_url, "every connection waits for the database", remedy) from error
    except OperationalError as error:
        remedy = "Check that it is reachable and writable, that the disk has room, and that nobody else holds it."
        raise StorageError("store.url", masked_url, f"the database refused ({error.orig})", remedy) from error
    except DatabaseError as error:
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            problem = f"not a SQLite database ({error.orig})"
            raise CorruptFile("store.url", masked_url, problem, OTHER_STORE) from error
        raise


def _parse(url: str) -> URL:
    try:
        return make_url(value_of(url))
    except (ArgumentError, ValueError) as error:  # the latter of a port that is no number
        raise InputError("store.url", url, "not a database URL", EXAMPLES) from error


def _masked(url: URL) -> str:
    """As others may read it: without its password, and without parameters that may hold one."""
    return secret_url(url.render_as_string(hide_password=False))


def _prepare_file(path: Path, masked_url: str, create: bool) -> None:
    if not create and not path.exists():
        raise InputError(
            "store.url", masked_url, "there is no store", "Fill one first with stage=sample, or check the path."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # it names people: for its user's eyes, and its log takes after it
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        remedy = "Choose a folder that you can write to."
        raise StorageError("store.url", masked_url, f"its folder cannot be made ({error.strerror})", remedy) from error


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


def _ready(engine: Engine, masked_url: str, create: bool) -> None:
    """Make the tables in an empty database; refuse any schema but this one."""
    with engine.connect() as connection, connection.begin():
        version = _version(connection, masked_url)
    if version is None:
        if not create:
            raise InputError("store.url", masked_url, "there is no store", "Fill one first with stage=sample.")
        with engine.connect().execution_options(writing=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            version = _version(connection, masked_url)  # again, under the lock: another process may have been first
            if version is None:
                metadata.create_all(connection)
                version = SCHEMA_VERSION
                connection.execute(insert(store_meta), {"id": 1, "schema_version": version})
    remedy = (
        "Export its votes with the version that wrote it: stage=annotate stage.action=export. Or fill a new store: "
        "stage=sample store.url=sqlite:///NEW.db"
    )
    require_schema_version(version, SCHEMA_VERSION, "store.url", masked_url, remedy)


def _version(connection: Connection, masked_url: str) -> int | None:
    """The schema's version; None in a database that holds no store yet."""
    found = set(inspect(connection).get_table_names())
    if store_meta.name in found:
        return connection.execute(select(store_meta.c.schema_version)).scalar() or 0
    # A SQLite file belongs to one program; a PostgreSQL database may hold others' tables, but not under our names.
    clash = found if connection.dialect.name == "sqlite" else found & set(metadata.tables)
    if clash:
        problem = f"the database belongs to another program (it holds the table {min(clash)})"
        raise InputError("store.url", masked_url, problem, "Give the store a database of its own.")
    return None
