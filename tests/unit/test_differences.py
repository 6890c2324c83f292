"""Differences between two runs, on manifests that were made to differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_runs import BASE, build_interval, write_run_folder

from align.core.errors import CorruptFile, InputError
from align.data.trained_ids import SCHEMA
from align.registry.differences import as_lines, find_differences
from align.registry.index import query_index
from align.run.manifest import Base


def compare_two_runs(root: Path, before: str, after: str) -> dict[str, Any]:
    records = query_index(root, lambda index: (index.record(before), index.record(after)))
    assert records[0] is not None and records[1] is not None  # noqa: PT018
    folders = tuple(root / record["stage"] / record["name"] for record in records if record)
    return find_differences(folders, records)  # type: ignore[arg-type]


def build_config(stage: str = "ppo", **stage_keys: Any) -> dict[str, Any]:
    return {
        "stage": {"name": stage, **stage_keys},
        "data": {"name": "chitchat"},
        "method": {"name": "qlora", "r": 8},
        "run": {"root": "runs", "name": "x"},
        "track": {"name": "none"},
        "seed": 0,
    }


def write_ids(folder: Path, ids: list[int | None]) -> Path:
    rows = [
        {
            "content_id": None if content_id is None else content_id.to_bytes(32, "big"),
            "question_ids": [],
            "project": None,
            "key_fingerprint": None,
        }
        for content_id in ids
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "trained_ids.parquet")
    return folder


def test_a_run_and_itself(tmp_path: Path) -> None:
    write_ids(write_run_folder(tmp_path, "ppo:a", {"init": "sft:s"}, metrics={"last_kl": 2.0}), [1, 2, 2])
    differences = compare_two_runs(tmp_path, "ppo:a", "ppo:a")
    assert differences.pop("data") == {"before": 3, "after": 3, "added": 0, "removed": 0, "unknown": 0}
    assert differences.pop("runs") == ["ppo:a", "ppo:a"]
    assert not any(differences.values())
    assert [*as_lines(compare_two_runs(tmp_path, "ppo:a", "ppo:a"))] == [
        "ppo:a → ppo:a",
        "rows to train on  3 → 3: the same rows",
    ]


def test_everything_that_may_differ(tmp_path: Path) -> None:
    changes = "diff --git a b\n+one\n-two\n"
    before_folder = write_run_folder(
        tmp_path,
        "ppo:a",
        {"init": "sft:s"},
        metrics={"last_score": 0.5, "last_kl": 2.0, "updates": 4},
        config=build_config(updates=4, lr=0.1),
        code="c1",
        commit="1",
        packages={"torch": "2.12", "trl": "1.16"},
        git={"commit": "g"},
    )
    after_folder = write_run_folder(
        tmp_path,
        "ppo:b",
        {"init": "sft:t"},
        base=Base("other", "/x", None, "f" * 64),
        status="failed",
        error="no\nluck",
        metrics={"last_score": 0.7, "last_kl": 2.0, "updates": 8, "data_root": "r"},
        day=3,
        config={**build_config(updates=8, lr=0.1), "track": {"name": "wandb"}, "run": {"root": "/else", "name": "y"}},
        code="c2",
        commit="1",
        packages={"torch": "2.13", "trl": "1.16", "peft": "0.21"},
        git={"commit": "g", "diff": changes},
        hardware={"device": "cuda", "dtype": "float32"},
    )
    write_run_folder(
        tmp_path, "eval:e", {"artifact": "ppo:a"}, metrics={"win_rate": build_interval(0.8, 0.7, 0.9), "kl": 3.0}
    )
    write_ids(before_folder, [1, 2, 2, 3, None])
    write_ids(after_folder, [2, 3, 4, 4])
    differences = compare_two_runs(tmp_path, "ppo:a", "ppo:b")
    assert json.loads(json.dumps(differences)) == differences
    assert differences["score"] == {"win_rate": [build_interval(0.8, 0.7, 0.9), None], "last_score": [0.5, 0.7]}
    assert differences["outcome"] == {"status": ["done", "failed"], "error": [None, "no\nluck"]}
    assert differences["metrics"] == {"updates": [4, 8], "kl": [3.0, None]}
    assert differences["settings"] == {"stage.updates": [4, 8]}
    assert [[value.partition(" ")[0] for value in pair] for pair in differences["inputs"].values()] == [
        ["sft:s", "sft:t"],
        ["pocket", "other"],
    ]
    assert differences["data"] == {"before": 5, "after": 4, "added": 2, "removed": 2, "unknown": 1}
    assert differences["code"] == {"code": ["c1", "c2"], "changes": [None, changes]}
    assert differences["packages"] == {"torch": ["2.12", "2.13"], "peft": [None, "0.21"]}
    assert differences["hardware"] == {"device": ["cpu", "cuda"]}
    assert differences["cost"] == {"minutes": [30.0, None], "device": ["cpu", "cuda"]}
    assert differences["other_settings"] == {"track.name": ["none", "wandb"]}
    lines = [*as_lines(differences)]
    assert all(line.isprintable() for line in lines)
    assert lines[:4] == [
        "ppo:a → ppo:b",
        "win_rate    0.8 [0.7, 0.9] (n=200) → –",
        "last_score  0.5 → 0.7",
        "status  done → failed",
    ]
    assert "rows to train on  5 → 4: 2 added, 2 removed; for 1 row this is unknown" in lines
    assert "  changes  – → 3 lines" in lines
    assert "  and 1 more, which only one has or matter less: stage.format=json" in lines
    heads = [line for line in lines[5:] if not line.startswith(" ")]
    assert [head.partition("  ")[0] for head in heads] == [
        "figures",
        "settings",
        "made from",
        "rows to train on",
        "code",
        "packages",
        "hardware",
        "cost",
        "other settings, which do not affect the result",
    ]


def test_another_spelling_of_an_input_is_no_difference(tmp_path: Path) -> None:
    for name, init in (("a", "sft:s"), ("b", "/runs/sft/s")):
        write_run_folder(tmp_path, f"ppo:{name}", {"init": "sft:s"}, config={**build_config(), "init": init})
    differences = compare_two_runs(tmp_path, "ppo:a", "ppo:b")
    assert not any(differences[key] for key in ("settings", "inputs", "other_settings"))


def test_data_sets_are_compared_by_what_is_seen(tmp_path: Path) -> None:
    for name, rows in (("a", [(1, 1), (2, 3)]), ("b", [(2, 1), (3, 1)])):
        folder = write_run_folder(tmp_path, f"data:{name}", base=None)
        ids = [content_id.to_bytes(32, "big") for content_id, count in rows for _ in range(count)]
        table = pa.table({"content_id": pa.array(ids, pa.binary(32))})
        for i in range(2):
            pq.write_table(table.slice(2 * i, 2), folder / "artifact" / f"train-0000{i}-of-00002.parquet")
    assert compare_two_runs(tmp_path, "data:a", "data:b")["data"] == {
        "before": 4,
        "after": 2,
        "added": 1,
        "removed": 3,
        "unknown": 0,
    }


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    write_run_folder(tmp_path, "sft:a")
    (write_run_folder(tmp_path, "ppo:bad") / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="belong to different stages"):
        compare_two_runs(tmp_path, "ppo:a", "sft:a")
    with pytest.raises(InputError, match=r"stage\.runs=ppo:bad: cannot be read: .*is not JSON"):
        compare_two_runs(tmp_path, "ppo:a", "ppo:bad")
    assert compare_two_runs(tmp_path, "ppo:a", "ppo:a")["data"] is None  # no file lists its rows
    (tmp_path / "ppo" / "a" / "trained_ids.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFile, match=r"trained_ids\.parquet: cannot be read"):
        compare_two_runs(tmp_path, "ppo:a", "ppo:a")


def test_the_base_counts(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:a", base=BASE)
    write_run_folder(tmp_path, "sft:b", base=Base(BASE.id, BASE.path, None, "0" * 64))
    assert [*compare_two_runs(tmp_path, "sft:a", "sft:b")["inputs"]] == ["base"]
