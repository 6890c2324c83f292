"""An open database: one writer at a time, readers with a view each, and what an erasure leaves behind emptied."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, select

from align.annotate.store.schema import LOCKED_S, explained
from align.annotate.store.tables import (
    annotators,
    candidates,
    drafts,
    guidelines,
    invitations,
    keys,
    leases,
    members,
    prompts,
    remarks,
    sessions,
    store_meta,
    users,
)
from align.core.errors import InputError
from align.core.files import check_readable, has_file, open_regular

ERASABLE = (
    prompts, candidates, annotators, remarks, drafts, leases, users, members, sessions, invitations, guidelines, keys,
)  # fmt: skip

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

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction of the only writer: what is written inside commits together or not at all. Thousands of acts in
        one cost one fsync."""
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
                self._local.writing, self._local.erased = connection, False
                try:
                    yield connection
                finally:
                    self._local.writing = None
            self._to_empty |= self._local.erased
            if self._to_empty:
                self._to_empty = not self._emptied()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view; within `writing` it sees what was written so far."""
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
        """As the only one who serves this store, until the end of the block or of the process.

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
            self._hold(lambda: is_locked(file))
            yield

    def _hold(self, attempt: Callable[[], bool]) -> None:
        """Tries for a moment: of a server that was killed the database may not know yet."""
        for tries in range(PATIENCE):
            if attempt():
                return
            time.sleep(0.2 if tries < PATIENCE - 1 else 0)
        remedy = "End that one first; one process serves every project of a store."
        raise InputError("store.url", self.masked_url, "another process serves it", remedy)

    def erased(self) -> None:
        """Says that this thread's transaction erased something."""
        self._local.erased = True

    @property
    def emptied(self) -> bool:
        """Whether nothing that was erased is left in the database's own log; the next write tries again."""
        return not self._to_empty

    def _emptied(self) -> bool:
        """Overwrites what an erasure left where nothing points at it any more; whether that could be done.

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
        names = ", ".join(table.name for table in ERASABLE)
        with outside.connect() as connection:
            connection.exec_driver_sql(f"VACUUM {names}")
        return True


def is_locked(file: IO[Any]) -> bool:
    """Locks a file for this process, if no other has it; whether it is ours."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
