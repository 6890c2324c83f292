"""Damaged run folders and damaged indexes: runs are still listed, with the reason."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import (
    BEGAN,
    find_record,
    query_records,
    query_refs,
    rebuild_records,
    write_run_folder,
    write_two_policies,
)

from align.core.errors import InputError
from align.registry.formatting import as_csv, as_json, as_table, iter_details
from align.registry.index import INDEX, Index
from align.registry.record import make_record
from align.run.manifest import FILE, read_manifest


def test_why_a_manifest_cannot_be_read_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason may be missing rights or a newer manifest, so the unchanged file is read again later."""
    write_two_policies(tmp_path)

    def raise_error(folder: Path) -> None:
        raise InputError("schema_version", 3, "is of another version", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr("align.registry.index.read_manifest", raise_error)
        assert find_record(tmp_path, "ppo:first")["status"] == "unreadable"
    assert find_record(tmp_path, "ppo:first")["status"] == "done"
    assert find_record(tmp_path, "ppo:first")["evaluation"] == "eval:one"


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"value": None, "low": None, "high": None},
        {"value": "x", "low": 0, "high": 1},
        {"value": 10**400, "low": 0, "high": 1},
        True,
        "0.5",
        [1],
    ],
)
def test_a_figure_of_an_odd_shape_is_no_score(tmp_path: Path, shape: Any) -> None:
    write_run_folder(tmp_path, "dpo:p", metrics={"win_rate": shape, "accuracy": 0.7, "last_kl": shape})
    record = find_record(tmp_path, "dpo:p")
    assert (record["score"], record["kl"]) == ({"name": "accuracy", "value": 0.7}, None)
    assert [*as_table([record], ["run", "metrics.win_rate"], BEGAN)]
    assert [*iter_details(record)]


def test_text_that_is_half_a_character(tmp_path: Path) -> None:
    path = write_run_folder(tmp_path, "ppo:p") / FILE
    changes = {"status": "failed", "metrics": {"judge": "\ud800", "\udfff": 1}, "error": "\ud800"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    record = find_record(tmp_path, "ppo:p")
    assert record["metrics"] == {"judge": "\\ud800", "\\udfff": 1}
    assert "".join([*as_json([record], []), *as_csv([record], [])]).encode()


def test_a_manifest_that_is_no_file_and_a_deep_configuration(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    (tmp_path / "ppo" / "first" / "artifact" / "adapter_config.json").write_text("[" * 100_000)
    (tmp_path / "ppo" / "second" / FILE).unlink()
    os.mkfifo(tmp_path / "ppo" / "second" / FILE)
    assert "r" not in find_record(tmp_path, "ppo:first")["method"]
    assert "is no file" in find_record(tmp_path, "ppo:second")["error"]


def test_a_stage_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two_policies(tmp_path)
    scandir = os.scandir

    def refuse_eval_folder(path: Any) -> Any:
        if Path(path).name == "eval":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("align.registry.index.os.scandir", refuse_eval_folder)
    with pytest.raises(InputError, match=r"run\.root=.*eval: cannot be listed \(Permission denied\)"):
        query_records(tmp_path)


def test_nothing_is_left_in_a_folder_that_holds_no_runs(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    assert query_records(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:p", metrics={"last_kl": float("nan"), "many": [1.0, float("inf")]})
    assert find_record(tmp_path, "ppo:p")["metrics"] == {"last_kl": None, "many": [1.0, None]}


def test_an_index_that_other_code_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two_policies(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "align.registry.index.make_record", lambda folder, manifest: {**make_record(folder, manifest), "x": 1}
        )
        patch.setattr("align.registry.index.compute_version", lambda: 5)
        assert find_record(tmp_path, "ppo:first")["x"] == 1
    assert "x" not in find_record(tmp_path, "ppo:first")


def test_a_folder_whose_name_is_no_text_is_left_out(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    folder = os.fsencode(tmp_path) + b"/ppo/\xff\xfe"
    os.mkdir(folder)
    Path(os.fsdecode(folder), FILE).write_bytes((tmp_path / "ppo" / "first" / FILE).read_bytes())
    with Index(tmp_path) as index:
        assert (len(index.names()), len(index.unnamed)) == (7, 1)


def edit_manifest(**values: Any) -> Any:
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:100], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (lambda text: "\x00\xff", "is not JSON"),
        (lambda text: "[]", "is a list"),
        (edit_manifest(schema_version=99), "has schema_version 99, and this version of align reads 2"),
        (edit_manifest(schema_version=None), "is not a run's manifest"),
        (edit_manifest(times={"started": 3}), "times.* is missing, or of another kind"),
        (edit_manifest(metrics=[]), "metrics is missing"),
        (edit_manifest(stage="dpo"), "manifest.json is that of dpo:first; this folder is ppo:first"),
        (edit_manifest(base={"id": "x"}), "base is missing, or of another kind"),
        (edit_manifest(config={"data": {}, "method": {}, "stage": 3}), "config.stage"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path, change: Any, says: str) -> None:
    write_two_policies(tmp_path)
    path = tmp_path / "ppo" / "first" / FILE
    text = path.read_text()
    path.write_text(change(text))
    record = find_record(tmp_path, "ppo:first")
    assert record["status"] == "unreadable"
    assert says in record["error"]
    assert len(query_refs(tmp_path, {})) == 7
    path.write_text(text)
    assert find_record(tmp_path, "ppo:first")["status"] == "done"


@pytest.mark.parametrize("times", [{"started": "yesterday"}, {}, {"started": "", "finished": "x"}])
def test_times_that_say_nothing(tmp_path: Path, times: dict[str, str]) -> None:
    write_run_folder(tmp_path, "ppo:p", times=times, status="failed", error="cut off")
    assert find_record(tmp_path, "ppo:p")["cost"]["minutes"] is None


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    times = {"started": BEGAN.isoformat(), "finished": (BEGAN - timedelta(hours=3)).isoformat()}
    write_run_folder(tmp_path, "ppo:p", times=times)
    assert find_record(tmp_path, "ppo:p")["cost"]["minutes"] is None


def test_half_deleted_folders_and_files_that_are_none(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    (tmp_path / "ppo" / "empty").mkdir()
    (tmp_path / "ppo" / "file").write_text("x")
    (tmp_path / "ppo" / "second" / "artifact" / "adapter_config.json").unlink()
    (tmp_path / "notes" / "x").mkdir(parents=True)
    (tmp_path / "notes" / "x" / FILE).write_text("{}")
    (tmp_path / "reward" / "loop").symlink_to("loop")
    assert len(query_refs(tmp_path, {})) == 7
    with Index(tmp_path, rebuild=True) as index:
        record = index.record("ppo:second")
    assert record is not None
    assert "r" not in record["method"]
    (tmp_path / "ppo" / "first" / "artifact" / "adapter_config.json").write_text("[3]")
    assert "r" not in next(item for item in rebuild_records(tmp_path) if item["run"] == "ppo:first")["method"]


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def torn(path: Path) -> None:
    """Overwrite pages in the middle with random bytes."""
    data = bytearray(path.read_bytes())
    data[4096:12288] = os.urandom(8192)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def another_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("pragma user_version = 999")
        db.execute("drop table makes")
        db.execute("create table more (a int)")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_sql(sql: str) -> Any:
    """Return a function that damages rows of the index, which shows only when they are read."""

    def harm(path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.execute(sql)

    harm.__name__ = sql
    return harm


INSIDE = [
    "update runs set record = '{' where run = 'eval:one'",
    "update runs set record = null where run = 'eval:one'",
    "update runs set record = '[]' where run = 'eval:one'",
    "update runs set record = '{}' where run = 'eval:one'",
    "update runs set record = '{run: 1}' where run = 'eval:one'",
    "update runs set record = '5'",
    "update runs set record = cast(x'22ff22' as text) where run = 'eval:one'",
    "update runs set stamp = cast(x'ff' as text) where run = 'eval:one'",
    "update runs set run = cast(x'ff' as text) where run = 'eval:one'",
    "update runs set own = '[]' where run = 'ppo:first'",
]


@pytest.mark.parametrize("harm", [garbage, torn, cut, another_version, empty, os.unlink, *map(damage_by_sql, INSIDE)])
def test_an_index_that_is_damaged_is_made_again(tmp_path: Path, harm: Any) -> None:
    write_two_policies(tmp_path)
    expected = query_records(tmp_path)
    harm(tmp_path / INDEX)
    write_run_folder(tmp_path, "ppo:new", {"init": "ppo:first"}, day=20)
    expected = [
        record | ({"children": [*record["children"], "ppo:new"]} if record["run"] == "ppo:first" else {})
        for record in expected
    ]
    began = time.monotonic()
    assert [record["run"] for record in query_records(tmp_path)] == sorted(
        [*(record["run"] for record in expected), "ppo:new"]
    )
    assert query_records(tmp_path)[:4] == expected[:4]
    assert time.monotonic() - began < 15  # no lock is waited for
    with sqlite3.connect(tmp_path / INDEX) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_root_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root has an outdated index, then no index, then a damaged one."""
    write_two_policies(tmp_path)
    expected = query_records(tmp_path)
    write_run_folder(tmp_path, "ppo:new", day=20)
    before = (tmp_path / INDEX).read_bytes()
    connect = sqlite3.connect

    def read_only(path: Any, **options: Any) -> sqlite3.Connection:
        if path == tmp_path / INDEX:
            return connect(f"file:{path}?mode=ro", **options, uri=True)
        return connect(path, **options)

    monkeypatch.setattr("align.registry.index.sqlite3.connect", read_only)
    with Index(tmp_path) as index:
        assert (index.path, index.changed) == (None, 1)
        assert len(index.names()) == len(expected) + 1
    assert (tmp_path / INDEX).read_bytes() == before
    (tmp_path / INDEX).unlink()
    with Index(tmp_path) as index:
        assert (index.path, index.changed) == (None, len(expected) + 1)
    (tmp_path / INDEX).write_bytes(b"no database at all" * 100)
    with Index(tmp_path) as index:
        assert (index.path, index.changed) == (None, len(expected) + 1)
    assert not (tmp_path / INDEX).exists()


BOTH = """
import sys
from pathlib import Path
from align.registry.index import Index
for _ in range(20):
    with Index(Path(sys.argv[1]), rebuild=sys.argv[2] == "rebuild") as index:
        assert index.path is not None
        assert len(index.names()) == 60, len(index.names())
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    for i in range(60):
        write_run_folder(tmp_path, f"sft:{i}")
    command = [sys.executable, "-c", BOTH, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, mode], stderr=subprocess.PIPE, text=True) for mode in ("rebuild", "ask", "ask")
    ]
    assert [process.communicate()[1] for process in processes] == [""] * 3


def test_a_run_that_was_killed_is_interrupted_and_one_at_work_is_running(tmp_path: Path) -> None:
    import fcntl

    for name in ("killed", "at-work"):
        write_run_folder(tmp_path, f"ppo:{name}", status="running", times={"started": BEGAN.isoformat()})
    lock = os.open(tmp_path / "ppo" / "at-work", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert {record["name"]: record["status"] for record in query_records(tmp_path)} == {
        "killed": "interrupted",
        "at-work": "running",
    }
    assert query_refs(tmp_path, {"status": "interrupted"}) == ["ppo:killed"]
    os.close(lock)
    assert query_refs(tmp_path, {"status": "interrupted"}) == ["ppo:at-work", "ppo:killed"]


def test_asking_changes_no_folder(tmp_path: Path) -> None:
    write_two_policies(tmp_path)

    def read_files() -> set[tuple[Path, bytes]]:
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != INDEX)
        return {(path, path.read_bytes()) for path in files}

    before = read_files()
    query_records(tmp_path)
    rebuild_records(tmp_path)
    assert read_files() == before
    assert read_manifest(tmp_path / "ppo" / "first").done
