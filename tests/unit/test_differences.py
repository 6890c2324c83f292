"""What differs between two runs, on manifests that were made to differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from portfolio import BASE, interval, made

from align.core.errors import CorruptFile, InputError
from align.data.trained_ids import SCHEMA
from align.registry.differences import as_lines, find_differences
from align.registry.index import query_index
from align.run.manifest import Base


def between(root: Path, one: str, other: str) -> dict[str, Any]:
    records = query_index(root, lambda index: (index.record(one), index.record(other)))
    assert records[0] is not None and records[1] is not None  # noqa: PT018
    folders = tuple(root / record["stage"] / record["name"] for record in records if record)
    return find_differences(folders, records)  # type: ignore[arg-type]


def config(stage: str = "ppo", **stage_keys: Any) -> dict[str, Any]:
    return {
        "stage": {"name": stage, **stage_keys}, "data": {"name": "chitchat"}, "method": {"name": "qlora", "r": 8},
        "run": {"root": "runs", "name": "x"}, "track": {"name": "none"}, "seed": 0,
    }  # fmt: skip


def with_ids(folder: Path, ids: list[int | None]) -> Path:
    rows = [
        {"content_id": None if one is None else one.to_bytes(32, "big"), "question_ids": [], "project": None,
         "key_fingerprint": None}
        for one in ids
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "trained_ids.parquet")
    return folder


def test_a_run_and_itself(tmp_path: Path) -> None:
    with_ids(made(tmp_path, "ppo:a", {"init": "sft:s"}, metrics={"last_kl": 2.0}), [1, 2, 2])
    found = between(tmp_path, "ppo:a", "ppo:a")
    assert found.pop("data") == {"before": 3, "after": 3, "added": 0, "removed": 0, "unknown": 0}
    assert found.pop("runs") == ["ppo:a", "ppo:a"]
    assert not any(found.values())
    assert [*as_lines(between(tmp_path, "ppo:a", "ppo:a"))] == [
        "ppo:a → ppo:a", "rows to train on  3 → 3: the same rows"]  # fmt: skip


def test_everything_that_may_differ(tmp_path: Path) -> None:
    changes = "diff --git a b\n+one\n-two\n"
    one = made(
        tmp_path, "ppo:a", {"init": "sft:s"}, metrics={"last_score": 0.5, "last_kl": 2.0, "updates": 4},
        config=config(updates=4, lr=0.1), code="c1", commit="1", packages={"torch": "2.12", "trl": "1.16"},
        git={"commit": "g"},
    )  # fmt: skip
    other = made(
        tmp_path, "ppo:b", {"init": "sft:t"}, base=Base("other", "/x", None, "f" * 64), status="failed",
        error="no\nluck",
        metrics={"last_score": 0.7, "last_kl": 2.0, "updates": 8, "data_root": "r"}, day=3,
        config={**config(updates=8, lr=0.1), "track": {"name": "wandb"}, "run": {"root": "/else", "name": "y"}},
        code="c2", commit="1", packages={"torch": "2.13", "trl": "1.16", "peft": "0.21"},
        git={"commit": "g", "diff": changes}, hardware={"device": "cuda", "dtype": "float32"},
    )  # fmt: skip
    made(tmp_path, "eval:e", {"artifact": "ppo:a"}, metrics={"win_rate": interval(0.8, 0.7, 0.9), "kl": 3.0})
    with_ids(one, [1, 2, 2, 3, None])
    with_ids(other, [2, 3, 4, 4])
    found = between(tmp_path, "ppo:a", "ppo:b")
    assert json.loads(json.dumps(found)) == found
    assert found["score"] == {"win_rate": [interval(0.8, 0.7, 0.9), None], "last_score": [0.5, 0.7]}
    assert found["outcome"] == {"status": ["done", "failed"], "error": [None, "no\nluck"]}
    assert found["metrics"] == {"updates": [4, 8], "kl": [3.0, None]}
    assert found["settings"] == {"stage.updates": [4, 8]}
    assert [[value.partition(" ")[0] for value in pair] for pair in found["inputs"].values()] == [
        ["sft:s", "sft:t"], ["pocket", "other"]]  # fmt: skip
    assert found["data"] == {"before": 5, "after": 4, "added": 2, "removed": 2, "unknown": 1}
    assert found["code"] == {"code": ["c1", "c2"], "changes": [None, changes]}
    assert found["packages"] == {"torch": ["2.12", "2.13"], "peft": [None, "0.21"]}
    assert found["hardware"] == {"device": ["cpu", "cuda"]}
    assert found["cost"] == {"minutes": [30.0, None], "device": ["cpu", "cuda"]}
    assert found["other_settings"] == {"track.name": ["none", "wandb"]}
    lines = [*as_lines(found)]
    assert all(line.isprintable() for line in lines)
    assert lines[:4] == [
        "ppo:a → ppo:b", "win_rate    0.8 [0.7, 0.9] (n=200) → –", "last_score  0.5 → 0.7", "status  done → failed"
    ]  # fmt: skip
    assert "rows to train on  5 → 4: 2 added, 2 removed; of 1 row nobody knows which" in lines
    assert "  changes  – → 3 lines" in lines
    assert "  and 1 more, which only one has or matter less: stage.format=json" in lines
    heads = [line for line in lines[5:] if not line.startswith(" ")]
    assert [head.partition("  ")[0] for head in heads] == [
        "figures", "settings", "made from", "rows to train on", "code", "packages", "hardware", "cost",
        "other settings, which decide nothing"]  # fmt: skip


def test_another_spelling_of_an_input_is_no_difference(tmp_path: Path) -> None:
    for name, init in (("a", "sft:s"), ("b", "/runs/sft/s")):
        made(tmp_path, f"ppo:{name}", {"init": "sft:s"}, config={**config(), "init": init})
    found = between(tmp_path, "ppo:a", "ppo:b")
    assert not any(found[key] for key in ("settings", "inputs", "other_settings"))


def test_data_sets_are_compared_by_what_is_seen(tmp_path: Path) -> None:
    for name, rows in (("a", [(1, 1), (2, 3)]), ("b", [(2, 1), (3, 1)])):
        folder = made(tmp_path, f"data:{name}", base=None)
        ids = [one.to_bytes(32, "big") for one, often in rows for _ in range(often)]
        table = pa.table({"content_id": pa.array(ids, pa.binary(32))})
        for i in range(2):
            pq.write_table(table.slice(2 * i, 2), folder / "artifact" / f"train-0000{i}-of-00002.parquet")
    assert between(tmp_path, "data:a", "data:b")["data"] == {
        "before": 4, "after": 2, "added": 1, "removed": 3, "unknown": 0}  # fmt: skip


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    made(tmp_path, "sft:a")
    (made(tmp_path, "ppo:bad") / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="are of two stages"):
        between(tmp_path, "ppo:a", "sft:a")
    with pytest.raises(InputError, match=r"stage\.runs=ppo:bad: cannot be read: .*is not JSON"):
        between(tmp_path, "ppo:a", "ppo:bad")
    assert between(tmp_path, "ppo:a", "ppo:a")["data"] is None  # nothing says which rows it had
    (tmp_path / "ppo" / "a" / "trained_ids.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptFile, match=r"trained_ids\.parquet: cannot be read"):
        between(tmp_path, "ppo:a", "ppo:a")


def test_the_base_counts(tmp_path: Path) -> None:
    made(tmp_path, "sft:a", base=BASE)
    made(tmp_path, "sft:b", base=Base(BASE.id, BASE.path, None, "0" * 64))
    assert [*between(tmp_path, "sft:a", "sft:b")["inputs"]] == ["base"]
