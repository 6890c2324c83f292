"""An open database: its URL and schema, one writer at a time, a view for each reader, and what an erasure leaves."""

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
from align.core.distribution import install_command
from align.core.errors import CorruptFile, InputError, StorageError, require_schema_version
from align.core.files import check_readable, has_file, open_regular
from align.core.outputs import refuse_foreign_database
from align.core.redaction import hide_password, reveal_secret

SCHEMA_VERSION = 5

EXAMPLES = "Write store.url=sqlite:///runs/annotations.db or store.url=postgresql+psycopg://user@host/name."

OTHER_STORE = "Name a store that align made, or a file that does not exist yet."

POOL = {"max_overflow": 60, "pool_timeout": 60}
"""More connections than a server has threads, so that each waits for the lock and none for a connection."""

LOCK = 0x616C69676E
"""PostgreSQL's advisory lock of the process that makes the tables."""


LOCKED_S = 30
"""Seconds that a writer waits for another."""


def connect(url: str, create: bool = True) -> Engine:
    """Return an engine on the store at `url`, its tables made where they are missing.

    Args:
        url: a SQLAlchemy URL.
        create: make the database file and the tables if there are none; a reader says False.

    Raises:
        InputError: no URL, no driver, no store there, another program's database, another schema version.
        StorageError: the database cannot be reached or written.
        CorruptFile: the file is no SQLite database.
    """
    try:
        parsed = make_url(reveal_secret(url))
    except (ArgumentError, ValueError) as error:  # the latter of a port that is no number
        raise InputError("store.url", url, "not a database URL", EXAMPLES) from error
    # As others may read it: without its password, and without parameters that may hold one.
    masked_url = hide_password(parsed.render_as_string(hide_password=False))
    engine = _create_engine(parsed, masked_url, create)
    try:
        with explained(masked_url):
            _prepare_tables(engine, masked_url, create)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _create_engine(url: URL, masked_url: str, create: bool) -> Engine:
    """Return an engine whose transactions and durability are ours; the database has not been looked at."""
    on_sqlite = url.get_backend_name() == "sqlite"
    name = url.database or ":memory:"
    in_memory = on_sqlite and name == ":memory:"
    if on_sqlite and not in_memory:
        plain = not name.startswith("file:")
        path = Path(name if plain else unquote(name.removeprefix("file:").partition("?")[0]))
        if not path.is_dir():  # SQLite says of a folder that it cannot open it
            refuse_foreign_database(path, "store.url", (store_meta.name,), OTHER_STORE, masked_url)
        if plain:
            _prepare_file(path, masked_url, create)
    try:
        engine = create_engine(url, hide_parameters=True, **({} if in_memory else POOL))
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        remedy = f"{EXAMPLES} PostgreSQL needs: {install_command('postgres')}"
        raise InputError("store.url", masked_url, f"its driver is not installed ({error})", remedy) from error
    if on_sqlite:
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_on_sqlite)
    return engine


@contextmanager
def explained(masked_url: str) -> Iterator[None]:
    """Turn what the database itself could not do into an `InputError` on `store.url`; never quote SQL or contents."""
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


def _prepare_file(path: Path, masked_url: str, create: bool) -> None:
    if not create and not path.exists():
        raise _missing_store(masked_url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # it names people: for its user's eyes, and its log takes after it
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        remedy = "Choose a folder that you can write to."
        raise StorageError("store.url", masked_url, f"its folder cannot be made ({error.strerror})", remedy) from error


def _missing_store(masked_url: str) -> InputError:
    remedy = "Fill one first with stage=sample, or check the path."
    return InputError("store.url", masked_url, "there is no store", remedy)


def _configure_sqlite(connection, _record) -> None:
    # The driver's own transaction handling is off: `_begin_on_sqlite` says BEGIN, and writers say BEGIN IMMEDIATE, so
    # that two of them queue at the start instead of failing at the first write.
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


def _begin_on_sqlite(connection) -> None:
    immediate = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _prepare_tables(engine: Engine, masked_url: str, create: bool) -> None:
    """Make the tables in an empty database; refuse any schema but this one."""
    with engine.connect() as connection, connection.begin():
        version = _read_version(connection, masked_url)
    if version is None:
        if not create:
            raise _missing_store(masked_url)
        with engine.connect().execution_options(writing=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            version = _read_version(connection, masked_url)  # again, under the lock: another may have been first
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
    """Return the schema's version; None in a database that holds no store yet."""
    names = set(inspect(connection).get_table_names())
    if store_meta.name in names:
        return connection.execute(select(store_meta.c.schema_version)).scalar() or 0
    # A SQLite file belongs to one program; a PostgreSQL database may hold others' tables, but not under our names.
    clash = names if connection.dialect.name == "sqlite" else names & set(metadata.tables)
    if clash:
        problem = f"the database belongs to another program (it holds the table {min(clash)})"
        raise InputError("store.url", masked_url, problem, "Give the store a database of its own.")
    return None


PATIENCE = 10
SERVING = 7861
"""PostgreSQL's number of the lock that a server holds on its database."""


class Connections:
    """Transactions and views of the threads of one process. What a thread begins inside another of its own joins it.

    Attributes:
        masked_url: the database's URL without the password.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # One view a read: what SQLite gives in any transaction, PostgreSQL only gives when asked. Its writers must not
        # ask: they would keep the view from before they waited for their turn.
        views = engine.dialect.name == "postgresql"
        self._readers = engine.execution_options(isolation_level="REPEATABLE READ") if views else engine
        self.masked_url = engine.url.render_as_string(hide_password=True)
        self._local = threading.local()
        self._to_empty = False

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction of the only writer: what is written inside commits together or not at all. Thousands of
        acts in one cost one fsync."""
        inherited = getattr(self._local, "writing", None)
        if inherited is not None:
            yield inherited
            return
        with explained(self.masked_url):
            with self._engine.connect().execution_options(writing=True) as connection, connection.begin():
                # SQLite's BEGIN IMMEDIATE already made this the only writer; PostgreSQL queues writers on this row.
                if self._engine.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCKED_S}s'")
                connection.execute(select(store_meta.c.id).with_for_update())
                self._local.writing = connection
                self._local.erased = False
                try:
                    yield connection
                finally:
                    self._local.writing = None
            self._to_empty |= self._local.erased
            if self._to_empty:
                self._to_empty = not self._remove_erased()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open one consistent view; within `transaction` it sees what was written so far."""
        inherited = getattr(self._local, "writing", None) or getattr(self._local, "reading", None)
        if inherited is not None:
            yield inherited
            return
        with explained(self.masked_url):
            with self._readers.connect() as connection, connection.begin():
                self._local.reading = connection
                try:
                    yield connection
                finally:
                    self._local.reading = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one who serves this store, until the end of the block or of the process.

        Raises:
            InputError: another process serves it.
        """
        if self._engine.dialect.name == "postgresql":
            lock = f"({SERVING}, hashtext(current_schema()))"  # a database may hold several stores
            with explained(self.masked_url), self._engine.connect() as connection:
                self._hold(lambda: connection.exec_driver_sql(f"SELECT pg_try_advisory_lock{lock}").scalar_one())
                connection.commit()  # the lock is the session's; an open transaction would keep rows from the vacuum
                try:
                    yield
                finally:
                    connection.invalidate()  # ends the session, and its lock with it
            return
        path = self._engine.url.database
        if not path or path == ":memory:":
            yield
            return
        # The locks of the database's own file are SQLite's. Nothing is written to this one.
        lock = Path(f"{path}.serving")
        if has_file(lock, "store.url", "Move it away."):
            check_readable(lock, "store.url", "Move it away.")
        with open(lock, "ab", opener=open_regular) as file:
            self._hold(lambda: _try_lock(file))
            yield

    def _hold(self, attempt: Callable[[], bool]) -> None:
        """Try for a moment: of a server that was killed the database may not know yet."""
        for tries in range(PATIENCE):
            if attempt():
                return
            time.sleep(0.2 if tries < PATIENCE - 1 else 0)
        remedy = "End that one first; one process serves every project of a store."
        raise InputError("store.url", self.masked_url, "another process serves it", remedy)

    def erased(self) -> None:
        """Note that this thread's transaction erased something."""
        self._local.erased = True

    @property
    def emptied(self) -> bool:
        """Whether nothing that was erased is left in the database's own log, which a reader (a backup) may hold; the
        next write tries again."""
        return not self._to_empty

    def _remove_erased(self) -> bool:
        """Overwrite what an erasure left where nothing points at it any more. Returns whether that could be done.

        SQLite keeps it in the write-ahead log, which a reader (a backup) holds: the next write tries again. PostgreSQL
        keeps it in the tables until they are vacuumed; its own log and its archives have a life of their own.
        """
        if self._engine.dialect.name == "sqlite":
            connection = self._engine.raw_connection()  # no BEGIN: a checkpoint cannot run inside a transaction
            try:
                return connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            finally:
                connection.close()
        outside = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        names = ", ".join(table.name for table in metadata.sorted_tables if table is not ledger)
        with outside.connect() as connection:
            connection.exec_driver_sql(f"VACUUM {names}")
        return True


def _try_lock(file: IO[Any]) -> bool:
    """Lock a file for this process, if no other has it. Returns whether it is ours."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
