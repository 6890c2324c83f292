"""Digests of large files are cached, and never used for a file that changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from waiting import becomes_true

from align.run import digests
from align.run.digests import cache_folder, file_digest, lookup_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: Any) -> Path:
    """A file that counts as large and, by `SETTLED_S`, as unchanged for long enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 4)
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def reads(monkeypatch: Any) -> list[Path]:
    """The files that were read, one entry for each reading."""
    read_paths: list[Path] = []

    def record_read(path: Path) -> str:
        read_paths.append(path)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", record_read)
    return read_paths


def test_a_large_file_is_read_once(large: Path, reads: list[Path]) -> None:
    assert lookup_digest(large) == lookup_digest(large) == file_digest(large)
    assert reads == [large]


def test_a_small_one_each_time(large: Path, reads: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(digests, "LARGE", 100)
    assert lookup_digest(large) == lookup_digest(large)
    assert reads == [large, large]
    folder = cache_folder()
    assert folder is not None
    assert not folder.exists()


def wait_for_a_tick(path: Path) -> None:
    """Wait until a new change gets a later time than the file's last one, because a file system's clock has ticks."""
    probe = path.with_name("tick")

    def has_ticked() -> bool:
        probe.write_bytes(b"")
        probe.chmod(0o600)
        return probe.stat().st_ctime_ns > path.stat().st_ctime_ns

    assert becomes_true(has_ticked)


def test_a_file_edited_in_place_is_read_again(large: Path) -> None:
    """Path, inode, size and time of modification stay the same. Only the time of change differs."""
    first_digest = lookup_digest(large)
    before = os.stat(large)
    wait_for_a_tick(large)
    with large.open("r+b") as file:
        file.write(b"W")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(large)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert lookup_digest(large) == file_digest(large) != first_digest


def test_what_changed_a_moment_ago_is_not_remembered(large: Path, reads: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 3600.0)
    lookup_digest(large)
    lookup_digest(large)
    assert reads == [large, large]


def test_what_changes_while_it_is_read_is_not_remembered(large: Path, monkeypatch: Any) -> None:
    def read_and_alter(path: Path) -> str:
        digest = file_digest(path)
        wait_for_a_tick(path)
        path.write_bytes(b"altered")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", read_and_alter)
        lookup_digest(large)
    assert lookup_digest(large) == file_digest(large)


@pytest.mark.parametrize("entry", ["", "{", "[]", "null", '{"state": 3}', '{"state": []}'])
def test_a_broken_entry_costs_a_reading(large: Path, entry: str) -> None:
    lookup_digest(large)
    folder = cache_folder()
    assert folder is not None
    (entry_path,) = folder.iterdir()
    assert json.loads(entry_path.read_text())["sha256"] == file_digest(large)
    entry_path.write_text(entry)
    assert lookup_digest(large) == file_digest(large)


def test_a_user_without_a_home_reads_each_time(large: Path, reads: list[Path], monkeypatch: Any) -> None:
    def raise_no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(digests.Path, "home", raise_no_home)
    assert lookup_digest(large) == lookup_digest(large)
    assert reads == [large, large]


def test_a_home_that_cannot_be_written_costs_a_reading(large: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert lookup_digest(large) == file_digest(large)
