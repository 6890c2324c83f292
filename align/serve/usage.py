"""Tenants' usage of their token budgets, in a database that counts each request exactly once even if the server is
killed.

The protocol for each request:

1. `reserve` reserves tokens before anything is computed, so that concurrent requests cannot spend the same budget.
2. `record_sent` records tokens before they are sent to the client. A streamed answer calls it before each chunk.
3. `settle` moves a request from the reservations to the totals, in one transaction, before the last chunk of its answer
   is sent. It counts its arguments, but at least what was recorded as sent. A request is settled once: settling a
   request without a reservation counts nothing.
4. The reservations of a server that has died are settled by what was recorded as sent, when the next server opens the
   file.

Everything a client has received is counted, because it was recorded before. A chunk that was recorded but not yet sent
when the server was killed is counted too, at most one per request. Tokens that were computed but not recorded are not
counted, and were not received. No request is counted twice, because settling removes its reservation.

This holds if the process is killed. If the machine loses power, the last moments may be lost: the file is not synced
after each token.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from align.core.errors import InputError, StorageError
from align.core.outputs import refuse_foreign_database
from align.serve.errors import BudgetSpent, UsageUnwritable
from align.serve.tenants import Tenant

LOCK_TIMEOUT_S = 0.5
"""Seconds that a request waits while another server locks the usage file. All other requests wait."""
OPEN_TIMEOUT_S = 10.0
"""Seconds that a starting server waits while another server locks the usage file."""
LOCK = ".lock"
MOVE_AWAY = "Move it away, or name another key file: usage is counted beside that."
TABLES = """
CREATE TABLE IF NOT EXISTS totals (
    tenant TEXT PRIMARY KEY, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS reservations (
    request TEXT PRIMARY KEY, tenant TEXT NOT NULL, server TEXT NOT NULL, tokens INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS reservations_of_tenant ON reservations (tenant);
"""
SETTLE = """
INSERT INTO totals SELECT tenant, 1, prompt_tokens, completion_tokens FROM reservations WHERE request = ?
ON CONFLICT (tenant) DO UPDATE SET requests = requests + 1,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""
RECORD = """
UPDATE reservations SET prompt_tokens = max(prompt_tokens, ?), completion_tokens = max(completion_tokens, ?)
WHERE request = ?
"""


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """A tenant's counts of requests and tokens used, and of tokens reserved for requests in progress.

    Attributes:
        requests: number of settled requests.
        prompt_tokens, completion_tokens: tokens of settled requests.
        reserved: tokens reserved for requests in progress.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def compute_remaining(self, budget: int) -> int:
        """Return the tokens of `budget` that are neither used nor reserved, at least 0."""
        return max(0, budget - self.tokens - self.reserved)


class UsageDatabase:
    """An SQLite file that counts the tokens that each tenant has used and reserved. A context manager.

    Threads may share an object, and servers a file. Opening it settles the reservations of servers that have ended.

    Raises:
        StorageError: the file cannot be written, or is not a usage file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = secrets.token_hex(8)
        self._lock = Lock()
        try:
            refuse_foreign_database(path, "stage.keys", ("totals", "reservations"), MOVE_AWAY)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would create it readable by others
            self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            enable_write_ahead_log(self._db)
            with self._transaction() as db:  # serialises servers that start at the same time
                for statement in TABLES.split(";"):
                    db.execute(statement)
                self._alive = os.open(self._lock_file(self.server), os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._alive, fcntl.LOCK_EX)
                self._settle_dead_servers(db)
        except InputError as error:
            problem = f"usage cannot be counted there ({error.problem})"
            raise StorageError("stage.keys", str(path), problem, MOVE_AWAY) from error
        except (OSError, sqlite3.Error, UsageUnwritable) as error:
            problem = f"usage cannot be counted there ({getattr(error, 'strerror', None) or error})"
            raise StorageError("stage.keys", str(path), problem, "Make it writable, or move it away.") from error

    def __enter__(self) -> UsageDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and delete this server's lock file.

        Open reservations are settled by what was recorded as sent when the database is opened again.
        """
        with self._lock:
            self._db.close()
            self._lock_file(self.server).unlink(missing_ok=True)
            os.close(self._alive)

    def reserve(self, tenant: Tenant, request_id: str, tokens: int) -> None:
        """Reserve tokens of a tenant's budget for a request, or raise BudgetSpent if fewer tokens are left.

        Args:
            request_id: a unique id.
            tokens: maximum tokens of its prompts and answers.

        Raises:
            BudgetSpent: the tenant's budget has fewer tokens left.
        """
        with self._transaction() as db:
            budget = tenant.limits.token_budget
            used = query_usage(db, tenant.name)
            if budget is not None and tokens > (remaining := used.compute_remaining(budget)):
                raise BudgetSpent(budget, remaining)
            row = (request_id, tenant.name, self.server, tokens)
            db.execute("INSERT INTO reservations (request, tenant, server, tokens) VALUES (?, ?, ?, ?)", row)

    def record_sent(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Store the token counts of requests whose next chunk is about to be sent to the client.

        Args:
            counts: request → prompt tokens, and completion tokens including the chunk to be sent.
        """
        with self._transaction() as db:
            db.executemany(RECORD, [(prompt, completion, request) for request, (prompt, completion) in counts.items()])

    def settle(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> bool:
        """Add a request's tokens to its tenant's total and delete its reservation, or return False if it has none.

        Adds at least the tokens that were recorded as sent.
        """
        with self._transaction() as db:
            db.execute(RECORD, (prompt_tokens, completion_tokens, request_id))
            return settle_reservation(db, request_id)

    def read_usage(self, tenant: str) -> TenantUsage:
        """Return a tenant's used requests and tokens, and its reserved tokens; zeros for an unknown tenant."""
        with self._transaction() as db:
            return query_usage(db, tenant)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection in a transaction, which commits at the end of the block and rolls back if it raises.

        Raises UsageUnwritable in place of SQLite's errors.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise UsageUnwritable from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _settle_dead_servers(self, db: sqlite3.Connection) -> None:
        """Settle the reservations of ended servers: add their used tokens to the totals, and delete the reservations
        and the servers' lock files."""
        for request, server in db.execute("SELECT request, server FROM reservations").fetchall():
            if server != self.server and has_server_ended(self._lock_file(server)):
                settle_reservation(db, request)
        for file in self.path.parent.glob(f"{glob.escape(self.path.name)}.{'[0-9a-f]' * 16}{LOCK}"):
            if file != self._lock_file(self.server) and has_server_ended(file):
                file.unlink()

    def _lock_file(self, server: str) -> Path:
        """Return the path of the file that a server keeps locked while it runs.

        The system unlocks it if the server is killed.
        """
        return self.path.with_name(f"{self.path.name}.{server}{LOCK}")


def build_usage_path(keys: Path) -> Path:
    """Return the path of a key file's usage database, which lies beside it and is named `KEYS.usage.db`."""
    return keys.with_name(f"{keys.name}.usage.db")


def read_usage_of_tenants(keys: Path, tenants: Sequence[str]) -> dict[str, TenantUsage]:
    """Return tenant → usage, read from the database beside a key file; zeros if there is no database yet.

    Raises:
        StorageError: the file cannot be read.
    """
    path = build_usage_path(keys)
    if not path.is_file():
        return {tenant: TenantUsage() for tenant in tenants}
    with UsageDatabase(path) as usage:
        return {tenant: usage.read_usage(tenant) for tenant in tenants}


def enable_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switch an SQLite database to write-ahead logging, and retry for `OPEN_TIMEOUT_S` seconds while it is locked.

    A commit then survives the death of the process, and is synced to the disk later. Switching needs an exclusive
    lock, for which SQLite does not wait on its own.
    """
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    db.execute("PRAGMA synchronous = NORMAL")


def has_server_ended(lock_file: Path) -> bool:
    """Return whether a server has ended: its lock file is missing, or no process locks it."""
    try:
        descriptor = os.open(lock_file, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def settle_reservation(db: sqlite3.Connection, request_id: str) -> bool:
    """Add the tokens in a request's reservation to its tenant's total, and delete the reservation.

    Returns False, and adds nothing, if the request has no reservation.
    """
    was_reserved = db.execute(SETTLE, (request_id,)).rowcount == 1
    db.execute("DELETE FROM reservations WHERE request = ?", (request_id,))
    return was_reserved


def query_usage(db: sqlite3.Connection, tenant: str) -> TenantUsage:
    """Read a tenant's totals and the sum of its reserved tokens from the database, in the caller's transaction."""
    total = db.execute("SELECT requests, prompt_tokens, completion_tokens FROM totals WHERE tenant = ?", (tenant,))
    requests, prompt, completion = total.fetchone() or (0, 0, 0)
    reserved = db.execute("SELECT coalesce(sum(tokens), 0) FROM reservations WHERE tenant = ?", (tenant,)).fetchone()
    return TenantUsage(requests, prompt, completion, reserved[0])
