"""Tenants of a server with their rights and limits, and the file of their API keys."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from align.core.aliases import NAME
from align.core.errors import AlignError, CorruptFile, InputError, StorageError, require, require_schema_version
from align.core.files import has_file
from align.core.outputs import replace_file
from align.run import read_json_object
from align.serve import operator_log
from align.serve.errors import KeysUnreadable


@dataclass(frozen=True, slots=True)
class Limits:
    """A tenant's limits on rate, concurrency and total tokens; None for no limit.

    Attributes:
        requests_per_minute: requests, averaged over a minute.
        tokens_per_minute: tokens of prompts and answers, averaged over a minute.
        concurrency: answers at once.
        token_budget: tokens of prompts and answers in all.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    token_budget: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant of the server, with its rights and limits.

    Attributes:
        admin: whether it may load and unload adapters.
        allow: the names of models that it may use; None for all.
        key: sha256 of the key of the present request, hex; empty without a key file.
    """

    name: str
    admin: bool = False
    limits: Limits = field(default_factory=Limits)
    allow: frozenset[str] | None = None
    key: str = field(default="", compare=False, repr=False)


LOCAL = Tenant("local", admin=True)
"""The tenant of every request to a server without a key file, which listens on the loopback interface only."""


SCHEMA_VERSION = 1
PREFIX = "al-"
LONGEST = 200
"""Maximum characters of an API key; longer ones are refused without hashing."""
ALL = "all"
REMEDY = "Restore it, or make a new one with stage.action=key."


@dataclass(frozen=True, slots=True)
class Key:
    """A tenant's API key as it is stored: by its hash only.

    Attributes:
        sha256: of the key, hex.
        created_at: ISO 8601, UTC.
    """

    sha256: str
    created_at: str

    @property
    def id(self) -> str:
        """First 8 digits of the hash, which do not reveal the key."""
        return self.sha256[:8]


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """An entry of the key file: a tenant and the hashes of its API keys."""

    tenant: Tenant
    keys: tuple[Key, ...]
    created_at: str


@dataclass(frozen=True, slots=True)
class TenantChange:
    """A change made to a tenant in the key file: its new entry, and the keys that were created and revoked.

    Attributes:
        key: the new key, which is stored nowhere. None if no key was created.
        revoked: ids of the keys that were revoked.
    """

    entry: TenantKeys
    is_new: bool
    key: str | None
    revoked: tuple[str, ...] = ()


class KeyFile:
    """The tenants and API keys of a key file, reloaded when the file changes. Safe to share between threads.

    Attributes:
        tenants: by their names, as the file was last read.
        reads: how often the file was read.

    Raises:
        InputError: see `read_key_file`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads = 0
        self._lock = Lock()
        self._state: tuple[int, ...] | None = None
        self._unreadable = False
        state = (
            read_file_stamp(path) if path.is_file() else ()
        )  # taken first: a change during the read leads to a reload
        self._set_tenants(read_key_file(path), state)

    def find_tenant(self, bearer: str) -> Tenant | None:
        """Return the tenant that an API key belongs to, or None for an unknown key.

        Raises:
            KeysUnreadable: the file can no longer be read.
        """
        self.reload_if_changed()
        return self._by_hash.get(hash_key(bearer)) if bearer.startswith(PREFIX) and len(bearer) <= LONGEST else None

    def reload_if_changed(self) -> None:
        """Read the key file again if it has changed, or raise KeysUnreadable if it cannot be read."""
        with self._lock:
            try:
                if self._state != (state := read_file_stamp(self.path)):
                    self._set_tenants(read_key_file(self.path), state)
            except (AlignError, OSError) as error:
                problem = error.problem if isinstance(error, InputError) else "cannot be read"
                if not self._unreadable:
                    operator_log.error(
                        "the key file %s; all requests are refused", problem.replace(str(self.path), "(path)")
                    )
                self._unreadable = True
                self._state = None
                raise KeysUnreadable from error
            if self._unreadable:
                operator_log.warning("the key file can be read again")
            self._unreadable = False

    def has_key(self, key: str) -> bool:
        """Return whether the key file held an API key when it was last read.

        Args:
            key: its sha256, hex.
        """
        return key in self._by_hash

    def _set_tenants(self, tenants: Mapping[str, TenantKeys], state: tuple[int, ...]) -> None:
        self._by_hash = {
            key.sha256: replace(entry.tenant, key=key.sha256) for entry in tenants.values() for key in entry.keys
        }
        self._state = state
        self.tenants = {name: entry.tenant for name, entry in tenants.items()}
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
) -> TenantChange:
    """Create a tenant with its first API key in the key file, or change a tenant's rights, limits and keys there.

    Adds a key if nothing else is to change.

    Args:
        path: the key file, created if it is missing.
        admin, allow, limits: None keeps the present value, or the default for a new tenant.
        lift: limits to remove; `allow` is one.
        revoke: the id of a key, or `all`.

    Raises:
        InputError: a key or a tenant to change does not exist, or the file cannot be used, see `read_key_file`.
        StorageError: the file cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with edit_key_file(path) as tenants:
        existing = tenants.get(name)
        new_limits = {limit: value for limit, value in limits.items() if value is not None}
        if existing is None and (lift or revoke):
            remedy = f"The tenants are {', '.join(sorted(tenants)) or '(none)'}."
            raise InputError("stage.tenant", name, "there is no such tenant", remedy)
        entry = existing or TenantKeys(Tenant(name), (), now)
        tenant = entry.tenant
        if allow is not None or "allow" in lift:
            tenant = replace(tenant, allow=None if allow is None else frozenset(allow))
        lifted: dict[str, Any] = {limit: None for limit in lift if limit != "allow"}
        tenant = replace(tenant, limits=replace(tenant.limits, **lifted, **new_limits))
        tenant = tenant if admin is None else replace(tenant, admin=admin)
        revoked = tuple(key.id for key in entry.keys if revoke in (key.id, ALL))
        problem = "is no key of this tenant"
        ids = ", ".join(key.id for key in entry.keys) or "(none)"
        require(revoke in (None, ALL) or bool(revoked), "stage.revoke", revoke, problem, f"Its keys are {ids}.")
        keys = tuple(key for key in entry.keys if key.id not in revoked)
        changes = bool(new_limits or lift or revoke) or admin is not None or allow is not None
        key = PREFIX + secrets.token_urlsafe(32) if existing is None or not changes else None
        keys += (Key(hash_key(key), now),) if key else ()
        tenants[name] = replace(entry, tenant=tenant, keys=keys)
        return TenantChange(tenants[name], existing is None, key, revoked)


def read_key_file(path: Path) -> dict[str, TenantKeys]:
    """Read a key file, and return tenant name → its rights, limits and the hashes of its API keys.

    Raises:
        InputError: the file is missing, or users other than its owner may read or write it.
        CorruptFile: it is not a key file.
    """
    field = "stage.keys"
    make = "Make one with stage.action=key stage.tenant=NAME."
    require(has_file(path, field, make), field, str(path), "there is no such key file", make)
    private = path.stat().st_mode & 0o077 == 0
    require(private, field, str(path), "others than its owner may read or write it", f"Run chmod 600 {path}.")
    content = read_json_object(path, field, REMEDY)
    require_schema_version(content.get("schema_version"), SCHEMA_VERSION, field, str(path), REMEDY)
    try:
        return {name: parse_tenant_keys(name, values) for name, values in content["tenants"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(field, str(path), "is no key file as stage.action=key writes it", REMEDY) from error


def parse_tenant_keys(name: str, values: Mapping[str, Any]) -> TenantKeys:
    """Convert a tenant's JSON entry in the key file to a TenantKeys.

    Raises AttributeError, KeyError, TypeError or ValueError if it is malformed.
    """
    allow = values["allow"]
    limits = values["limits"]
    keys = tuple(Key(key["sha256"], key["created_at"]) for key in values["keys"])
    is_valid = (
        NAME.fullmatch(name) is not None
        and isinstance(values["admin"], bool)
        and (allow is None or (isinstance(allow, list) and all(isinstance(each, str) for each in allow)))
        and all(v is None or (type(v) is int and v >= (key != "token_budget")) for key, v in limits.items())
        and all(re.fullmatch("[0-9a-f]{64}", key.sha256) for key in keys)
    )
    if not is_valid:
        raise ValueError(name)
    tenant = Tenant(name, values["admin"], Limits(**limits), None if allow is None else frozenset(allow))
    return TenantKeys(tenant, keys, str(values["created_at"]))


def to_json(entry: TenantKeys) -> dict[str, Any]:
    """Convert a tenant and its keys to the JSON entry of the key file."""
    tenant = entry.tenant
    return {
        "keys": [asdict(key) for key in entry.keys],
        "admin": tenant.admin,
        "allow": None if tenant.allow is None else sorted(tenant.allow),
        "limits": asdict(tenant.limits),
        "created_at": entry.created_at,
    }


@contextmanager
def edit_key_file(path: Path) -> Iterator[dict[str, TenantKeys]]:
    """Yield tenant name → entry of a key file for changes in place, and write the file at the end of the block.

    Nothing is written if the block raises. A lock serialises concurrent changes.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            tenants = read_key_file(path) if has_file(path, "stage.keys", REMEDY) else {}
            yield tenants
            content = {name: to_json(entry) for name, entry in sorted(tenants.items())}
            text = json.dumps({"schema_version": SCHEMA_VERSION, "tenants": content}, indent=2) + "\n"
            replace_file(path, text.encode(), mode=0o600)
            os.fsync(folder)
        finally:
            os.close(folder)
    except InputError:
        raise
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise StorageError("stage.keys", str(path), problem, "Make it writable, or choose another file.") from error


def hash_key(key: str) -> str:
    """Return the sha256 of an API key in hex. Lone surrogates, which no header can hold, are hashed too."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_file_stamp(path: Path) -> tuple[int, int, int, int]:
    """Return a file's inode, size in bytes, and modification and change times in ns, to detect a change of it."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
