"""The key file: it contains no key, others cannot read it, and a running server sees its changes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core.errors import CorruptFile, InputError, StorageError
from align.core.outputs import replace_file
from align.core.redaction import redact
from align.serve.errors import KeysUnreadable
from align.serve.tenants import KeyFile, Limits, Tenant, change_tenant, hash_key, read_key_file
from align.stages.serve import describe_tenant


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "keys.json"


def create_key(path: Path, name: str = "acme", **changes) -> str:
    key = change_tenant(path, name, **changes).key
    assert key is not None
    return key


def test_a_tenant_is_known_by_its_key(path: Path) -> None:
    key = create_key(path, allow=["support"], limits={"tokens_per_minute": 50, "concurrency": None}, admin=True)
    other_key = create_key(path, "other")
    keys = KeyFile(path)
    tenant = keys.find_tenant(key)
    assert tenant is not None
    assert (tenant.name, tenant.admin, tenant.limits) == ("acme", True, Limits(tokens_per_minute=50))
    assert tenant.allow == {"support"}
    assert keys.find_tenant(other_key) == Tenant("other")
    assert re.fullmatch(r"al-[\w-]{43}", key)


@pytest.mark.parametrize("bearer", ["", "al-", "al-" + "x" * 43, "x" * 10**6, "é", "\udc00", "al-\udc00", "\0"])
def test_nobody_is_known_by_anything_else(path: Path, bearer: str) -> None:
    key = create_key(path)
    keys = KeyFile(path)
    assert keys.find_tenant(bearer) is None
    for near in (key[:-1], key + "x", key.upper(), " " + key, key[3:], hash_key(key), "al-" + hash_key(key)):
        assert keys.find_tenant(near) is None


def test_no_key_is_written_and_others_cannot_read_the_file(path: Path) -> None:
    key = create_key(path)
    text = path.read_text()
    assert key not in text
    assert key[3:] not in text
    assert hash_key(key) in text
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [p.name for p in path.parent.iterdir()] == ["keys.json"]


def test_a_key_is_masked_wherever_it_is_written_for_people(path: Path) -> None:
    key = create_key(path)
    assert redact(f"Authorization: {key}, and {key}.") == "Authorization: al-***, and al-***."
    assert redact("final-answer and al-short") == "final-answer and al-short"


def test_what_is_not_said_stays_and_a_key_is_made_only_where_nothing_is_said(path: Path) -> None:
    first = create_key(path, limits={"token_budget": 10, "concurrency": 2}, allow=["a"])
    change = change_tenant(path, "acme", limits={"concurrency": 3})
    assert (change.key, change.is_new) == (None, False)
    second = create_key(path)
    keys = KeyFile(path)
    assert keys.find_tenant(first) == keys.find_tenant(second)
    tenant = keys.find_tenant(first)
    assert tenant is not None
    assert tenant.limits == Limits(token_budget=10, concurrency=3)
    lifted_tenant = change_tenant(path, "acme", lift=["allow", "token_budget"]).entry.tenant
    assert (lifted_tenant.limits, lifted_tenant.allow) == (Limits(concurrency=3), None)
    assert change_tenant(path, "acme", admin=True).entry.tenant.admin
    assert change_tenant(path, "acme", admin=False).key is None
    assert change_tenant(path, "acme", allow=[]).entry.tenant.allow == frozenset()


def test_keys_are_revoked_by_their_id(path: Path) -> None:
    first = create_key(path)
    second = create_key(path)
    keys = KeyFile(path)
    change = change_tenant(path, "acme", revoke=hash_key(first)[:8])
    assert (change.revoked, change.key) == ((hash_key(first)[:8],), None)
    assert keys.find_tenant(first) is None
    assert keys.find_tenant(second) is not None
    change_tenant(path, "acme", revoke="all")
    assert keys.find_tenant(second) is None
    assert read_key_file(path)["acme"].keys == ()
    assert first not in describe_tenant(change.entry)


@pytest.mark.parametrize(
    ("name", "more", "field"),
    [
        ("nobody", {"revoke": "all"}, "stage.tenant"),
        ("nobody", {"lift": ["allow"]}, "stage.tenant"),
        ("acme", {"revoke": "00000000"}, "stage.revoke"),
    ],
)
def test_a_mistake_changes_nothing(path: Path, name: str, more: dict, field: str) -> None:
    create_key(path)
    old_text = path.read_text()
    with pytest.raises(InputError) as caught:
        change_tenant(path, name, **more)
    assert caught.value.field == field
    assert path.read_text() == old_text


def test_a_running_server_sees_each_change(path: Path) -> None:
    first = create_key(path)
    keys = KeyFile(path)
    for budget in range(1, 30):  # faster than the file system's clock
        change_tenant(path, "acme", limits={"token_budget": budget})
        tenant = keys.find_tenant(first)
        assert tenant is not None
        assert tenant.limits.token_budget == budget


def test_a_file_that_cannot_be_read_lets_nobody_in_until_it_can(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = create_key(path)
    keys = KeyFile(path)
    text = path.read_text()
    for spoil in (lambda: path.unlink(), lambda: path.write_text("{"), lambda: os.chmod(path, 0o640)):
        spoil()
        for _ in range(2):
            with pytest.raises(KeysUnreadable) as caught:
                keys.find_tenant(key)
            assert str(path) not in str(caught.value)
        replace_file(path, text.encode(), mode=0o600)
        assert keys.find_tenant(key) is not None
    # Once each, for any number of requests.
    assert [record.levelname for record in caplog.records] == [
        "ERROR",
        "WARNING",
    ] * 3
    assert str(path) not in caplog.text


def test_whether_a_key_is_still_one(path: Path) -> None:
    first = create_key(path)
    second = create_key(path)
    keys = KeyFile(path)
    key_hashes = [tenant.key for key in (first, second) if (tenant := keys.find_tenant(key)) is not None]
    assert key_hashes == [hash_key(first), hash_key(second)]
    change_tenant(path, "acme", revoke=hash_key(first)[:8])
    keys.reload_if_changed()
    assert [keys.has_key(key_hash) for key_hash in key_hashes] == [False, True]
    assert (keys.tenants.keys(), keys.reads) == ({"acme"}, 2)


WHOLE = {"keys": [], "admin": False, "allow": None, "limits": {}, "created_at": "2026"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"schema_version": 2, "tenants": {}}',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "tenants": []}',
        b'{"schema_version": 1, "tenants": {"a": {}}}',
        *(
            json.dumps({"schema_version": 1, "tenants": {"a": WHOLE | spoilt}}).encode()
            for spoilt in (
                {"admin": 1},
                {"admin": "false"},
                {"allow": "a"},
                {"allow": [1]},
                {"limits": {"x": 1}},
                {"limits": None},
                {"limits": {"concurrency": 0}},
                {"limits": {"token_budget": -1}},
                {"limits": {"concurrency": True}},
                {"limits": {"concurrency": 1.5}},
                {"keys": [{"sha256": "ab", "created_at": ""}]},
                {"keys": [3]},
                {"keys": [{"sha256": "AB" * 32, "created_at": ""}]},
            )
        ),
        json.dumps({"schema_version": 1, "tenants": {"a b": WHOLE}}).encode(),
    ],
)
def test_a_file_that_is_none_is_refused_and_not_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    for use in (lambda: KeyFile(path), lambda: change_tenant(path, "acme")):
        with pytest.raises((CorruptFile, InputError)) as caught:
            use()
        assert caught.value.field == "stage.keys"
    assert path.read_bytes() == content


def test_a_whole_file_written_by_hand_is_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"schema_version": 1, "tenants": {"a": WHOLE}}))
    path.chmod(0o600)
    assert read_key_file(path)["a"].tenant == Tenant("a")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(path: Path, mode: int) -> None:
    create_key(path)
    path.chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        KeyFile(path)
    with pytest.raises(InputError, match="chmod 600"):
        change_tenant(path, "acme")


def test_no_file_and_no_place_for_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such key file"):
        KeyFile(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        change_tenant(tmp_path / "file" / "keys.json", "acme")


def test_many_who_change_it_at_once_lose_nothing(path: Path) -> None:
    created_keys: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: created_keys.append(create_key(path, f"t{i % 4}"))) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = KeyFile(path)
    assert sorted(tenant.name for key in created_keys if (tenant := keys.find_tenant(key))) == sorted(
        f"t{i % 4}" for i in range(16)
    )


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(sorted(Limits.__dataclass_fields__)), st.one_of(st.none(), st.integers(1))))
def test_limits_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, limits: dict) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key = create_key(path, limits=limits)
    tenant = KeyFile(path).find_tenant(key)
    assert tenant is not None
    assert tenant.limits == Limits(**limits)


def test_it_needs_no_torch() -> None:
    names = ("model_names", "adapter_folders", "startup", "tenants", "rate_limits", "usage")
    code = f"import {', '.join(f'align.serve.{name}' for name in names)}, sys; print(*sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy"} & set(completed.stdout.split())
