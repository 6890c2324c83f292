"""Digests of large files are remembered, and never believed of a file that changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from waiting import settles

from align.run import digests
from align.run.digests import cache_folder, file_digest, lookup_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: Any) -> Path:
    """A file that counts as large, last changed long ago as far as `SETTLED_S` is concerned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 4)
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def reads(monkeypatch: Any) -> list[Path]:
    """The files that are read."""
    found: list[Path] = []

    def reading(path: Path) -> str:
        found.append(path)
        return file_digest(path)

    monkeypatch.setattr(digests, "file_digest", reading)
    return found


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
    """Wait until a change gets another time than the last one of a file: the clock of a file system has ticks."""
    beside = path.with_name("tick")

    def ticked() -> bool:
        beside.write_bytes(b"")
        beside.chmod(0o600)
        return beside.stat().st_ctime_ns > path.stat().st_ctime_ns

    assert settles(ticked)


def test_a_file_edited_in_place_is_read_again(large: Path) -> None:
    """Same path, inode and size, and the time of modification put back: the time of change tells."""
    first, before = lookup_digest(large), os.stat(large)
    wait_for_a_tick(large)
    with large.open("r+b") as file:
        file.write(b"W")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(large)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert lookup_digest(large) == file_digest(large) != first


def test_what_changed_a_moment_ago_is_not_remembered(large: Path, reads: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 3600.0)
    lookup_digest(large)
    lookup_digest(large)
    assert reads == [large, large]


def test_what_changes_while_it_is_read_is_not_remembered(large: Path, monkeypatch: Any) -> None:
    def slow(path: Path) -> str:
        found = file_digest(path)
        wait_for_a_tick(path)
        path.write_bytes(b"altered")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", slow)
        lookup_digest(large)
    assert lookup_digest(large) == file_digest(large)


@pytest.mark.parametrize("entry", ["", "{", "[]", "null", '{"state": 3}', '{"state": []}'])
def test_a_broken_entry_costs_a_reading(large: Path, entry: str) -> None:
    lookup_digest(large)
    folder = cache_folder()
    assert folder is not None
    (found,) = folder.iterdir()
    assert json.loads(found.read_text())["sha256"] == file_digest(large)
    found.write_text(entry)
    assert lookup_digest(large) == file_digest(large)


def test_a_user_without_a_home_reads_each_time(large: Path, reads: list[Path], monkeypatch: Any) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(digests.Path, "home", no_home)
    assert lookup_digest(large) == lookup_digest(large)
    assert reads == [large, large]


def test_a_home_that_cannot_be_written_costs_a_reading(large: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert lookup_digest(large) == file_digest(large)
