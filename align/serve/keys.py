"""The key file: which tenants there are, by which keys they are known, and what they may do.

It holds SHA-256 of each key and never a key: a key is 256 random bits, for which nothing slower is needed, and a hash
is looked up in the same time whether it is there or not. It is readable by its owner alone, and is replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from align.aliases import NAME
from align.errors import AlignError, CorruptFile, InputError, StorageError, require, require_schema_version
from align.files import has_file
from align.outputs import replace_file
from align.run import json_object
from align.serve.events import log
from align.serve.identity import Allowed
from align.serve.tenants import Limits, Tenant

SCHEMA_VERSION = 1
PREFIX = "al-"
LONGEST = 200
"""Characters of a key that is looked at."""
ALL = "all"
REMEDY = "Restore it, or make a new one with stage.action=key."


class KeysUnreadable(AlignError):
    """The key file cannot be read, and nobody is let in. Status 503; the reason stands in the server's log."""


@dataclass(frozen=True, slots=True)
class Key:
    """Attributes:
    sha256: of the key, hex.
    created_at: ISO 8601, UTC.
    """

    sha256: str
    created_at: str

    @property
    def id(self) -> str:
        """What a key is called: the first digits of its hash, which say nothing of the key."""
        return self.sha256[:8]


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant, and the keys that it is known by."""

    tenant: Tenant
    keys: tuple[Key, ...]
    created_at: str


@dataclass(frozen=True, slots=True)
class Changed:
    """What `change_tenant` did.

    Attributes:
        key: a new key, which is kept nowhere; None where none was made.
        revoked: the ids of keys that were taken away.
    """

    account: Account
    new: bool
    key: str | None
    revoked: tuple[str, ...] = ()


class Keys:
    """Says who asks. Reads the file again when it has changed. Safe to share between threads.

    Attributes:
        reads: how often it was read.

    Raises:
        InputError: see `read_accounts`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.reads = path, 0
        self._lock = Lock()
        self._state: tuple[int, ...] | None = None
        self._unreadable = False
        state = stamp(path) if path.is_file() else ()  # before it is read: what is written meanwhile is read again
        self._take(read_accounts(path), state)

    def who(self, bearer: str) -> Tenant | None:
        """The tenant of a key; None where nobody has it.

        Raises:
            KeysUnreadable: the file cannot be read any more.
        """
        self.look()
        return self._by_hash.get(hashed(bearer)) if bearer.startswith(PREFIX) and len(bearer) <= LONGEST else None

    def look(self) -> None:
        """Read the file again, if it has changed.

        Raises:
            KeysUnreadable: it cannot be read any more.
        """
        with self._lock:
            try:
                if self._state != (state := stamp(self.path)):
                    self._take(read_accounts(self.path), state)
            except (AlignError, OSError) as error:
                problem = error.problem if isinstance(error, InputError) else "cannot be read"
                if not self._unreadable:
                    log.error("the key file %s; nobody is let in", problem.replace(str(self.path), "(path)"))
                self._unreadable, self._state = True, None
                raise KeysUnreadable("The server cannot read its keys. Try again later.") from error
            if self._unreadable:
                log.warning("the key file can be read again")
            self._unreadable = False

    def holds(self, key: str) -> bool:
        """Whether a key is one, as the file was last read.

        Args:
            key: its sha256, hex.
        """
        return key in self._by_hash

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """The tenants by name, as the file was last read."""
        return self._by_name

    def _take(self, accounts: Mapping[str, Account], state: tuple[int, ...]) -> None:
        self._by_hash, self._state = by_hash(accounts), state
        self._by_name = {name: account.tenant for name, account in accounts.items()}
        self.reads += 1


def change_tenant(
    path: Path,
    name: str,
    *,
    admin: bool | None = None,
    allow: Sequence[str] | None = None,
    limits: Mapping[str, int | None] = MappingProxyType({}),
    lift: Sequence[str] = (),
    revoke: str | None = None,
) -> Changed:
    """Make a tenant with its first key; change a known one's rights and limits, or take keys away; or, where nothing is
    to change, give it a further key.

    Args:
        path: the key file, made where it is not there.
        admin, allow, limits: what is None stays as it is; of a new tenant it is the default.
        lift: limits, `allow` among them, to take away.
        revoke: the id of a key, or `all`.

    Raises:
        InputError: a key or a tenant to change is not there, or the file cannot be used, see `read_accounts`.
        StorageError: the file cannot be written.
    """
    with writing(path) as accounts:
        known = accounts.get(name)
        given = {limit: value for limit, value in limits.items() if value is not None}
        if known is None and (lift or revoke):
            remedy = f"The tenants are {', '.join(sorted(accounts)) or '(none)'}."
            raise InputError("stage.tenant", name, "there is no such tenant", remedy)
        account = known or Account(Tenant(name), (), now())
        tenant = account.tenant
        if allow is not None or "allow" in lift:
            tenant = replace(tenant, allowed=Allowed(None if allow is None else frozenset(allow)))
        lifted: dict[str, Any] = {limit: None for limit in lift if limit != "allow"}
        tenant = replace(tenant, limits=replace(tenant.limits, **lifted, **given))
        tenant = tenant if admin is None else replace(tenant, admin=admin)
        revoked = tuple(key.id for key in account.keys if revoke in (key.id, ALL))
        problem, ids = "is no key of this tenant", ", ".join(key.id for key in account.keys) or "(none)"
        require(revoke in (None, ALL) or bool(revoked), "stage.revoke", revoke, problem, f"Its keys are {ids}.")
        keys = tuple(key for key in account.keys if key.id not in revoked)
        told = bool(given or lift or revoke) or admin is not None or allow is not None
        key = PREFIX + secrets.token_urlsafe(32) if known is None or not told else None
        keys += (Key(hashed(key), now()),) if key else ()
        accounts[name] = replace(account, tenant=tenant, keys=keys)
        return Changed(accounts[name], known is None, key, revoked)


def read_accounts(path: Path) -> dict[str, Account]:
    """The tenants of a key file, by name.

    Raises:
        InputError: there is no such file, or others than its owner may read or write it.
        CorruptFile: it is no key file.
    """
    field = "stage.keys"
    make = "Make one with stage.action=key stage.tenant=NAME."
    require(has_file(path, field, make), field, str(path), "there is no such key file", make)
    private = path.stat().st_mode & 0o077 == 0
    require(private, field, str(path), "others than its owner may read or write it", f"Run chmod 600 {path}.")
    found = json_object(path, field, REMEDY)
    require_schema_version(found.get("schema_version"), SCHEMA_VERSION, field, str(path), REMEDY)
    try:
        return {name: account_from(name, values) for name, values in found["tenants"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(field, str(path), "is no key file as stage.action=key writes it", REMEDY) from error


def account_from(name: str, values: Mapping[str, Any]) -> Account:
    """Raises: AttributeError, KeyError, TypeError, ValueError: it has another shape."""
    allow, limits = values["allow"], values["limits"]
    keys = tuple(Key(key["sha256"], key["created_at"]) for key in values["keys"])
    whole = (
        NAME.fullmatch(name) is not None
        and isinstance(values["admin"], bool)
        and (allow is None or (isinstance(allow, list) and all(isinstance(each, str) for each in allow)))
        and all(v is None or (type(v) is int and v >= (key != "token_budget")) for key, v in limits.items())
        and all(re.fullmatch("[0-9a-f]{64}", key.sha256) for key in keys)
    )
    if not whole:
        raise ValueError(name)
    allowed = Allowed(None if allow is None else frozenset(allow))
    return Account(Tenant(name, values["admin"], Limits(**limits), allowed), keys, str(values["created_at"]))


def as_json(account: Account) -> dict[str, Any]:
    """An account as the file has it."""
    tenant, names = account.tenant, account.tenant.allowed.names
    return {
        "keys": [asdict(key) for key in account.keys],
        "admin": tenant.admin,
        "allow": None if names is None else sorted(names),
        "limits": asdict(tenant.limits),
        "created_at": account.created_at,
    }


@contextmanager
def writing(path: Path) -> Iterator[dict[str, Account]]:
    """The tenants of a key file, to be changed. The file is replaced when the block ends without an error; two who
    change it do so one after the other.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            accounts = read_accounts(path) if has_file(path, "stage.keys", REMEDY) else {}
            yield accounts
            tenants = {name: as_json(account) for name, account in sorted(accounts.items())}
            text = json.dumps({"schema_version": SCHEMA_VERSION, "tenants": tenants}, indent=2) + "\n"
            replace_file(path, text.encode(), mode=0o600)
            os.fsync(folder)
        finally:
            os.close(folder)
    except InputError:
        raise
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise StorageError("stage.keys", str(path), problem, "Make it writable, or choose another file.") from error


def by_hash(accounts: Mapping[str, Account]) -> Mapping[str, Tenant]:
    return {
        key.sha256: replace(account.tenant, key=key.sha256) for account in accounts.values() for key in account.keys
    }


def hashed(key: str) -> str:
    """What is kept of a key. Half a character, which a header cannot hold, is hashed too."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def stamp(path: Path) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or written."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def in_words(account: Account) -> str:
    """A tenant's rights, limits and keys, for a terminal."""
    tenant = account.tenant
    names = tenant.allowed.names
    parts = ["every name" if names is None else "names " + (", ".join(sorted(names)) or "(none)")]
    limits = {field.name: getattr(tenant.limits, field.name) for field in fields(Limits)}
    parts += [f"{name} {value:,}" for name, value in limits.items() if value is not None]
    parts += ["may load and unload adapters"] if tenant.admin else []
    keys = ", ".join(f"{key.id} ({key.created_at})" for key in account.keys) or "none"
    return f"tenant {tenant.name}: {'; '.join(parts)}; keys: {keys}"
