"""The connection to an annotation database: its URL and schema, transactions of one writer, consistent reads, and the
removal of erased data from the database's files."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import unquote

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from align.annotate.store.tables import ledger, metadata, store_meta
from align.core.distribution import build_install_command
from align.core.errors import CorruptFile, InputError, StorageError, require_schema_version
from align.core.files import has_file, open_regular, require_readable
from align.core.outputs import refuse_foreign_database
from align.core.redaction import hide_password, reveal_secret

SCHEMA_VERSION = 5

EXAMPLES = "Write store.url=sqlite:///runs/annotations.db or store.url=postgresql+psycopg://user@host/name."

OTHER_STORE = "Name a store that align made, or a file that does not exist yet."

POOL = {"max_overflow": 60, "pool_timeout": 60}
"""SQLAlchemy's pool settings: more connections than threads, so that a thread waits for the lock, not a connection."""

CREATION_LOCK = 0x616C69676E
"""Key of PostgreSQL's advisory lock, held by the process that creates the tables."""
LOCKED_S = 30
"""Maximum seconds that a writer waits for another writer."""
SERVING_ATTEMPTS = 10
"""Number of attempts to become the only server of a store, 0.2 s apart."""
SERVING_LOCK = 7861
"""Key of PostgreSQL's advisory lock that a server holds on its database."""


def open_store_engine(url: str, create_if_missing: bool = True) -> Engine:
    """Return a SQLAlchemy engine for the annotation store at `url`, and create the tables in an empty database.

    Args:
        url: a SQLAlchemy URL.
        create_if_missing: whether to create the database file and the tables if they do not exist. Readers pass False.

    Raises:
        InputError: not a URL, no driver, no store at the URL, another program's database, or another schema version.
        StorageError: the database cannot be reached or written.
        CorruptFile: the file is not a SQLite database.
    """
    try:
        parsed = make_url(reveal_secret(url))
    except (ArgumentError, ValueError) as error:  # ValueError: the port is not a number
        raise InputError("store.url", url, "not a database URL", EXAMPLES) from error
    # For messages: without the password, and without parameters that may hold one.
    masked_url = hide_password(parsed.render_as_string(hide_password=False))
    engine = _create_engine(parsed, masked_url, create_if_missing)
    try:
        with translate_database_errors(masked_url):
            _create_or_check_tables(engine, masked_url, create_if_missing)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _create_engine(url: URL, masked_url: str, create: bool) -> Engine:
    """Create a SQLAlchemy engine with the store's settings of transactions and durability, without connecting yet.

    A missing SQLite file is created, if `create` is True, or raises InputError.
    """
    is_sqlite = url.get_backend_name() == "sqlite"
    name = url.database or ":memory:"
    is_in_memory = is_sqlite and name == ":memory:"
    if is_sqlite and not is_in_memory:
        is_plain_path = not name.startswith("file:")
        path = Path(name if is_plain_path else unquote(name.removeprefix("file:").partition("?")[0]))
        if not path.is_dir():  # SQLite itself reports that it cannot open a folder
            refuse_foreign_database(path, "store.url", (store_meta.name,), OTHER_STORE, masked_url)
        if is_plain_path:
            _prepare_file(path, masked_url, create)
    try:
        engine = create_engine(url, hide_parameters=True, **({} if is_in_memory else POOL))
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        remedy = f"{EXAMPLES} PostgreSQL needs: {build_install_command('postgres')}"
        raise InputError("store.url", masked_url, f"its driver is not installed ({error})", remedy) from error
    if is_sqlite:
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_on_sqlite)
    return engine


@contextmanager
def translate_database_errors(masked_url: str) -> Iterator[None]:
    """Convert SQLAlchemy's errors in a `with` block to StorageError or CorruptFile, without SQL or contents in them.

    Errors of other kinds are passed on.
    """
    try:
        yield
    except PoolTimeout as error:
        remedy = "The database has been locked for long. Repeat the request."
        raise StorageError("store.url", masked_url, "every connection waits for the database", remedy) from error
    except OperationalError as error:
        remedy = (
            "Check that it is reachable and writable, that the disk has room, and that no other program has locked it."
        )
        raise StorageError("store.url", masked_url, f"the database refused ({error.orig})", remedy) from error
    except DatabaseError as error:
        if "not a database" in str(error.orig) or "malformed" in str(error.orig):
            problem = f"not a SQLite database ({error.orig})"
            raise CorruptFile("store.url", masked_url, problem, OTHER_STORE) from error
        raise


def _prepare_file(path: Path, masked_url: str, create: bool) -> None:
    if not create and not path.exists():
        raise _build_missing_store_error(masked_url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # readable by its owner alone, for it holds names; its log gets the same mode
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        remedy = "Choose a folder that you can write to."
        raise StorageError("store.url", masked_url, f"its folder cannot be made ({error.strerror})", remedy) from error


def _build_missing_store_error(masked_url: str) -> InputError:
    remedy = "Fill one first with stage=sample, or check the path."
    return InputError("store.url", masked_url, "there is no store", remedy)


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling is off: `_begin_on_sqlite` sends BEGIN, or BEGIN IMMEDIATE for a writer, so
    # that two writers queue at the start instead of failing at the first write.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={LOCKED_S * 1000}",  # first, because switching to WAL takes a lock itself
        "journal_mode=WAL",
        "synchronous=FULL",  # an acknowledged vote survives a power cut
        "foreign_keys=ON",
        "secure_delete=ON",  # an erased text is overwritten with zeros, not only unlinked
    ):
        _execute_when_unlocked(connection, f"PRAGMA {pragma}")


def _execute_when_unlocked(connection: sqlite3.Connection, statement: str) -> None:
    """Run an SQL statement on SQLite, and repeat it while the database is locked, for up to `LOCKED_S` seconds.

    If two first connections switch to WAL at once, both hold a lock already, and SQLite refuses one of them without
    waiting for the busy timeout.
    """
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            connection.execute(statement).close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_on_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _create_or_check_tables(engine: Engine, masked_url: str, create: bool) -> None:
    """Create the tables in an empty database, or raise InputError for any schema version but this one.

    If `create` is False, an empty database raises InputError.
    """
    with engine.connect() as connection, connection.begin():
        version = _read_version(connection, masked_url)
    if version is None:
        if not create:
            raise _build_missing_store_error(masked_url)
        with engine.connect().execution_options(writing=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(CREATION_LOCK)))
            version = _read_version(connection, masked_url)  # again: another process may have been first
            if version is None:
                metadata.create_all(connection)
                version = SCHEMA_VERSION
                connection.execute(insert(store_meta), {"id": 1, "schema_version": version})
    remedy = (
        "Export its votes with the version that wrote it: stage=annotate stage.action=export. Or fill a new store: "
        "stage=sample store.url=sqlite:///NEW.db"
    )
    require_schema_version(version, SCHEMA_VERSION, "store.url", masked_url, remedy)


def _read_version(connection: Connection, masked_url: str) -> int | None:
    """Return the schema version of the store in a database, or None if the database holds no store yet.

    Raises InputError if the database belongs to another program.
    """
    names = set(inspect(connection).get_table_names())
    if store_meta.name in names:
        return connection.execute(select(store_meta.c.schema_version)).scalar() or 0
    # A SQLite file belongs to one program; a PostgreSQL database may hold others' tables, but not under our names.
    foreign_tables = names if connection.dialect.name == "sqlite" else names & set(metadata.tables)
    if foreign_tables:
        problem = f"the database belongs to another program (it holds the table {min(foreign_tables)})"
        raise InputError("store.url", masked_url, problem, "Give the store a database of its own.")
    return None


class StoreConnections:
    """Transactions and consistent reads of an annotation store by the threads of one process.

    A block opened inside another of the same thread joins it.

    Attributes:
        masked_url: the database's URL without the password.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A read must see one snapshot. Any transaction of SQLite does; on PostgreSQL it takes REPEATABLE READ. Writers
        # must not set it: they would keep the snapshot from before they waited for the lock.
        is_postgresql = engine.dialect.name == "postgresql"
        self._readers = engine.execution_options(isolation_level="REPEATABLE READ") if is_postgresql else engine
        self.masked_url = engine.url.render_as_string(hide_password=True)
        self._local = threading.local()
        self._has_erased_remains = False

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a write transaction as a `with` block, and yield its connection. Only one is open at a time per store.

        Its writes commit together or not at all. Thousands of writes in one transaction cost one fsync.
        """
        outer = getattr(self._local, "writing", None)
        if outer is not None:
            yield outer
            return
        with translate_database_errors(self.masked_url):
            with self._engine.connect().execution_options(writing=True) as connection, connection.begin():
                # On SQLite, BEGIN IMMEDIATE already locked out other writers. On PostgreSQL, writers queue on this row.
                if self._engine.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCKED_S}s'")
                connection.execute(select(store_meta.c.id).with_for_update())
                self._local.writing = connection
                self._local.has_erased = False
                try:
                    yield connection
                finally:
                    self._local.writing = None
            self._has_erased_remains |= self._local.has_erased
            if self._has_erased_remains:
                self._has_erased_remains = not self._overwrite_erased()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a consistent read as a `with` block, and yield its connection. All reads in it see one snapshot.

        Inside `transaction` it sees what was written so far.
        """
        outer = getattr(self._local, "writing", None) or getattr(self._local, "reading", None)
        if outer is not None:
            yield outer
            return
        with translate_database_errors(self.masked_url):
            with self._readers.connect() as connection, connection.begin():
                self._local.reading = connection
                try:
                    yield connection
                finally:
                    self._local.reading = None

    @contextmanager
    def serve_exclusively(self) -> Iterator[None]:
        """Hold the store's server lock during a `with` block, so that only one process at a time serves the store.

        Raises:
            InputError: another process serves the store.
        """
        if self._engine.dialect.name == "postgresql":
            lock = f"({SERVING_LOCK}, hashtext(current_schema()))"  # a database may hold several stores
            with translate_database_errors(self.masked_url), self._engine.connect() as connection:
                self._wait_for_serving_lock(
                    lambda: connection.exec_driver_sql(f"SELECT pg_try_advisory_lock{lock}").scalar_one()
                )
                connection.commit()  # the session keeps the lock; an open transaction would block VACUUM
                try:
                    yield
                finally:
                    connection.invalidate()  # ends the session, and its lock with it
            return
        path = self._engine.url.database
        if not path or path == ":memory:":
            yield
            return
        # SQLite locks the database file itself, so that we lock another file. Nothing is written to it.
        lock = Path(f"{path}.serving")
        if has_file(lock, "store.url", "Move it away."):
            require_readable(lock, "store.url", "Move it away.")
        with open(lock, "ab", opener=open_regular) as file:
            self._wait_for_serving_lock(lambda: _try_lock(file))
            yield

    def _wait_for_serving_lock(self, try_lock: Callable[[], bool]) -> None:
        """Call `try_lock` for up to two seconds until it takes the server's lock, or raise InputError.

        The database may not know yet that the previous server was killed.
        """
        for attempt in range(SERVING_ATTEMPTS):
            if try_lock():
                return
            time.sleep(0.2 if attempt < SERVING_ATTEMPTS - 1 else 0)
        remedy = "Stop it first: one process serves all projects of a store."
        raise InputError("store.url", self.masked_url, "another process serves it", remedy)

    def note_erasure(self) -> None:
        """Mark this thread's open transaction as an erasure, so that erased data are overwritten after its commit."""
        self._local.has_erased = True

    @property
    def is_erasure_complete(self) -> bool:
        """True once all erased data are overwritten in the database's files.

        A reader, such as a backup, may hold SQLite's log; the next write tries again.
        """
        return not self._has_erased_remains

    def _overwrite_erased(self) -> bool:
        """Overwrite erased data that the database's files still hold, and return whether that could be done.

        SQLite keeps them in the write-ahead log, which a reader, such as a backup, may hold: the next write tries
        again. PostgreSQL keeps them in the tables until they are vacuumed. Its own log and archives are outside our
        reach.
        """
        if self._engine.dialect.name == "sqlite":
            connection = self._engine.raw_connection()  # no BEGIN: a checkpoint cannot run inside a transaction
            try:
                return connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            finally:
                connection.close()
        autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        names = ", ".join(table.name for table in metadata.sorted_tables if table is not ledger)
        with autocommit.connect() as connection:
            connection.exec_driver_sql(f"VACUUM {names}")
        return True


def _try_lock(file: IO[Any]) -> bool:
    """Try to lock a file exclusively by `flock` without waiting, and return whether it is locked."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
