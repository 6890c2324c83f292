"""Files of a data set: a folder, a pattern or a folder that `datasets` saved. Paths without rows are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from row_formats import PACKERS, WRITERS, iter_numbered_rows, write_row_file

from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.data.read.files import list_data_files
from align.data.read.rows import iter_rows
from align.data.sets.forget import delete_replaced_data_set
from align.data.sources import build_files_input

GOOD = b'{"text": "a"}\n'
ROWS = [{"messages": [{"role": "user", "content": f"ä{i}"}], "n": i, "flag": i % 2 == 0} for i in range(11)]


def number_rows(records: list[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(records, start=1))


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path: Path) -> None:
    names = ["b-00001.jsonl", "a/x.csv", "b-00000.parquet.gz", "b-00002.json.zst"]
    contents = {name: [{"prompt": f"{name}{i}", "completion": "b"} for i in range(4)] for name in names}
    for name, records in contents.items():
        kind = name.split(".")[1]
        ending = f".{name.split('.')[2]}" if name.count(".") > 1 else ""
        writer = {"jsonl": "d.jsonl", "csv": "d.csv", "parquet": "d.parquet", "json": "array.json"}[kind]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PACKERS[ending](WRITERS[writer](records)))
    for ignored in (".hidden.jsonl", "README.md", "dataset_info.json"):
        (tmp_path / ignored).write_text("{")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_text("{")
    ordered = sorted(names)
    assert [path.relative_to(tmp_path).as_posix() for path in list_data_files(tmp_path)] == ordered
    all_records = [row for name in ordered for row in contents[name]]
    assert list(iter_numbered_rows(tmp_path)) == number_rows(all_records)
    for skip in (1, 4, 6, 15, 16):
        assert list(iter_numbered_rows(tmp_path, skip=skip)) == number_rows(all_records)[skip:]
    assert [path.name for path in list_data_files(f"{tmp_path}/b-*")] == ordered[1:]
    assert list_data_files(f"{tmp_path}/**/*.csv") == [tmp_path / "a/x.csv"]
    third = next(row for row in iter_rows(tmp_path, skip=6))
    assert (third.number, third.where, third.name) == (7, f"{tmp_path}/b-00000.parquet.gz, row 3", "b-00000:3")


def test_files_have_one_digest_over_them_in_their_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_row_file(tmp_path, "d.jsonl", [{"text": name}]).rename(tmp_path / name)
    folder_digest = build_files_input(str(tmp_path), "data.path").digest
    assert build_files_input(f"{tmp_path}/*.jsonl", "data.path").digest == folder_digest
    assert (
        build_files_input(f"{tmp_path}/a.*", "data.path").digest
        == build_files_input(f"{tmp_path}/a.jsonl", "").digest
        != folder_digest
    )
    write_row_file(tmp_path, "d.jsonl", [{"text": "b"}]).rename(tmp_path / "b.jsonl")
    assert build_files_input(str(tmp_path), "data.path").digest != folder_digest


def test_a_bad_row_of_a_shard_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(GOOD * 3)
    (tmp_path / "1.jsonl").write_bytes(GOOD + b"no\n")
    *_, last = iter_rows(tmp_path)
    assert last.error is not None
    assert (last.number, last.error.field) == (5, f"{tmp_path}/1.jsonl, row 2")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent.jsonl", "no such file"),
        ("absent/*.jsonl", "matches no file"),
        ("*.md", "matches no file"),
        ("empty", "is a folder without"),
        ("loop", "is a loop of links"),
        ("in/self.jsonl", "is a loop of links"),
        ("in", "is a loop of links"),
        ("in/*.jsonl", "is a loop of links"),
        ("splits", r"splits \(test, train\)"),
        ("here.jsonl/x", "no such file"),
        ("", "names no file"),
        ("pipe", "is a pipe"),
        ("x" * 300, "File name too long"),
        ("a\0b", "is no path"),
        ("closed/a.jsonl", "no such file"),
    ],
)
def test_a_path_to_nothing_is_told(tmp_path: Path, name: str, problem: str) -> None:
    for folder in ("empty", "loop", "in", "splits"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("a")
    (tmp_path / "here.jsonl").write_bytes(GOOD)
    (tmp_path / "loop" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    (tmp_path / "in" / "self.jsonl").symlink_to(tmp_path / "in" / "self.jsonl")
    for split in ("train", "test"):
        (tmp_path / "splits" / f"{split}-00000-of-00001.jsonl").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=problem) as caught:
        list(iter_numbered_rows(f"{tmp_path}/{name}" if name else "", "stage.path"))
    assert caught.value.field == "stage.path"
    assert caught.value.exit_status == 2


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "one" / "link").symlink_to(tmp_path / "other")
    assert [path.name for path in list_data_files(tmp_path / "one")] == ["a.jsonl"]


def test_a_data_set_that_was_saved_is_read_as_it_was(tmp_path: Path) -> None:
    saved = Dataset.from_list(ROWS).shuffle(seed=3)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert [data for _, data in iter_numbered_rows(tmp_path / "one")] == list(saved)
    assert list(iter_numbered_rows(tmp_path / "one", skip=5)) == number_rows(list(saved))[5:]
    parts = DatasetDict(train=saved, test=saved.select([0]))
    parts.save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match=r"several parts \(test, train\)"):
        list(iter_numbered_rows(tmp_path / "two"))
    assert [data for _, data in iter_numbered_rows(tmp_path / "two" / "test")] == [saved[0]]
    shard = sorted((tmp_path / "one").glob("*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CorruptFile, match=shard.name):
        list(iter_numbered_rows(tmp_path / "one"))
    shard.unlink()
    with pytest.raises(CorruptFile, match="is missing"):
        list(iter_numbered_rows(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(CorruptFile, match="lists no files"):
        list(iter_numbered_rows(tmp_path / "one"))


SHARD = "train-00000-of-00001.parquet"


def write_data_run(place: Path) -> Path:
    """Write a run that made a data set of one shard. Returns its artifact folder."""
    (place / "artifact").mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    (place / "artifact" / "data.json").write_text('{"sources": []}')
    write_row_file(place / "artifact", "d.parquet", ROWS).rename(place / "artifact" / SHARD)
    return place / "artifact"


@pytest.mark.parametrize(
    "name",
    ["", "artifact", "artifact/*.parquet", "artifact/*", "*/*.json", "../*/artifact/*", "..", f"artifact/{SHARD}"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_data_set_that_another_one_replaced_is_told(tmp_path: Path, name: str, whole: bool) -> None:
    """A replaced data set is refused even if its files still exist because the command that deletes them was killed."""
    artifact = write_data_run(tmp_path / "data" / "old")
    shard = (artifact / SHARD).read_bytes()
    delete_replaced_data_set(artifact, {"by": "data:new", "reason": "1 row was forgotten", "folder": "runs/data/new"})
    assert not (artifact / SHARD).exists()
    if not whole:
        (artifact / SHARD).write_bytes(shard)
    with pytest.raises(MissingArtifact, match=r"replaced by data:new: 1 row was forgotten.*runs/data/new") as caught:
        list_data_files(f"{tmp_path}/data/old/{name}", "stage.sources.old")
    assert caught.value.field == "stage.sources.old"


def test_a_data_set_without_its_files_is_no_folder_of_rows(tmp_path: Path) -> None:
    artifact = write_data_run(tmp_path / "data" / "x")
    assert [file.name for file in list_data_files(artifact.parent)] == [SHARD]
    (artifact / SHARD).unlink()
    for folder in (artifact, artifact.parent):
        with pytest.raises(CorruptFile, match="is a data set without a file of rows"):
            list_data_files(folder)


def test_rows_of_ones_own_may_lie_in_a_data_json(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(GOOD)
    assert [data for _, data in iter_numbered_rows(tmp_path)] == [{"text": "a"}]
