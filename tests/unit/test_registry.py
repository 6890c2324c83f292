"""The index over run folders, beside the folders themselves; and whatever may be wrong with either."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from portfolio import BEGAN, digest_of, given, interval, made, small

from align.errors import InputError
from align.registry.index import INDEX, Index, asked
from align.registry.query import found
from align.registry.record import Record, record_of
from align.registry.shown import as_csv, as_json, as_table, details
from align.run.manifest import FILE, read_manifest


def records(root: Path, **where: Any) -> list[Record]:
    return asked(root, lambda index: found(index, where, ["run"], 10_000)[0])


def refs(root: Path, where: Mapping[str, Any], *sort: str) -> list[str]:
    return [one["run"] for one in asked(root, lambda index: found(index, where, sort or ["run"], 10_000)[0])]


def one(root: Path, ref: str) -> Record:
    record = asked(root, lambda index: index.record(ref))
    assert record is not None
    return record


def test_what_is_known_of_a_policy(tmp_path: Path) -> None:
    record = one(small(tmp_path), "ppo:first")
    shape = {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "dora": False, "rslora": False}
    assert record["method"] == {"name": "qlora", "quantisation": "nf4", **shape}
    assert (record["reward"], record["base"]["id"], record["dtype"]) == ("reward:votes", "pocket", "float32")
    assert record["cost"] == {"minutes": 30.0, "peak_memory_mb": 700.5, "tokens": None, "device": "cpu"}
    assert (record["parents"], record["gone"]) == (["sft:start", "reward:votes"], [])
    assert {name: given["run"] for name, given in record["inputs"].items()} == {
        "init": "sft:start", "reward": "reward:votes"}  # fmt: skip
    assert record["children"] == ["eval:one", "export:one"]
    assert record["exports"] == ["export:one"]
    assert one(tmp_path, "export:one")["kl"] == 1e-7
    assert (record["evaluation"], record["kl"]) == ("eval:one", 3.0)
    assert record["score"] == {"name": "win_rate", "value": 0.81, "low": 0.75, "high": 0.87}
    other = one(tmp_path, "ppo:second")
    assert (other["score"], other["evaluation"], other["exports"]) == ({"name": "last_score", "value": 1.5}, None, [])
    start = one(tmp_path, "sft:start")
    assert start["parents"] == ["data:talk"]
    assert start["children"] == ["ppo:first", "ppo:second", "reward:votes"]
    assert (start["data"]["root"], start["data"]["rows"]) == ("t" * 64, 900)


def test_a_later_evaluation_counts_and_a_proxy_only_where_there_is_no_other(tmp_path: Path) -> None:
    small(tmp_path)
    made(tmp_path, "eval:proxy", {"artifact": "ppo:first"}, day=9,
         metrics={"win_rate": interval(0.99, 0.9, 1), "judge_is": "proxy"})  # fmt: skip
    made(tmp_path, "eval:failed", {"artifact": "ppo:first"}, day=10, status="failed", metrics={})
    assert one(tmp_path, "ppo:first")["evaluation"] == "eval:one"
    made(tmp_path, "eval:later", {"artifact": "ppo:first"}, day=11,
         metrics={"win_rate": interval(0.4, 0.3, 0.5), "judge_is": "gold"})  # fmt: skip
    assert one(tmp_path, "ppo:first")["score"]["value"] == 0.4


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"stage": "ppo"}, ["ppo:first", "ppo:second"]),
        ({"stage": ["reward", "export"]}, ["export:one", "reward:votes"]),
        ({"stage": "ppo", "metrics.win_rate.low": ">=0.7"}, ["ppo:first"]),
        ({"metrics.win_rate.low": ">0.75"}, []),
        ({"metrics.win_rate.low": ">=0.75", "stage": "!=eval"}, ["ppo:first"]),
        ({"score.value": "< 1", "stage": "p*"}, ["ppo:first"]),
        ({"run": "*:one"}, ["eval:one", "export:one"]),
        ({"method.r": 8, "stage": "sft"}, ["sft:start"]),
        ({"method.r": "=8", "stage": "sft"}, ["sft:start"]),
        ({"method.dora": False, "stage": "sft"}, ["sft:start"]),
        ({"evaluation": None, "stage": "ppo"}, ["ppo:second"]),
        ({"evaluation": "!=null", "stage": "ppo"}, ["ppo:first"]),
        ({"started": ">2026-11-06"}, ["eval:one", "export:one"]),
        ({"name": "> 5"}, []),  # a text is no number
        ({"metrics.loss_after": [2.5, "<0"]}, ["sft:start"]),
        ({"stage": "s?t"}, []),
        ({"name": "[a-z]*"}, []),
        ({"run": "!=*:one", "stage": ["eval", "sft"]}, ["sft:start"]),
        ({"children": "eval:one"}, ["ppo:first"]),
        ({"children": "export:*"}, ["ppo:first"]),
        ({"children": "!=eval:one", "stage": "ppo"}, ["ppo:second"]),
        ({"method.targets": ["k_proj", "v_proj"], "stage": "sft"}, ["sft:start"]),
        ({"inputs.part.data.run": "reward:*"}, ["eval:one"]),
        ({"parents": "sft:start", "stage": "!=reward"}, ["ppo:first", "ppo:second"]),
        ({"gone": "reward:gone"}, ["eval:one"]),
        ({"exports": None, "stage": "ppo"}, ["ppo:second"]),
        ({"exports": "!=null"}, ["ppo:first"]),
        ({"config.stage.name": "ppo"}, ["ppo:first", "ppo:second"]),
        ({"metrics.by part/of.kl": ">1", "stage": "eval"}, ["eval:one"]),
        ({"seed": False}, []),
        ({"method.r": "<99999999999999999999", "stage": "sft"}, ["sft:start"]),
        ({"stage": [f"x{i}" for i in range(499)] + ["sft"]}, ["sft:start"]),
    ],
    ids=str,
)
def test_conditions(tmp_path: Path, where: dict[str, Any], expected: list[str]) -> None:
    assert refs(small(tmp_path), where) == expected


def test_orders(tmp_path: Path) -> None:
    small(tmp_path)
    assert refs(tmp_path, {}, "-started")[0] == "export:one"
    assert refs(tmp_path, {"stage": ["ppo", "sft"]}, "-score.value") == ["sft:start", "ppo:second", "ppo:first"]
    assert refs(tmp_path, {"stage": ["ppo", "sft"]}, "stage", "-name") == ["ppo:second", "ppo:first", "sft:start"]
    assert refs(tmp_path, {}, "metrics.accuracy.value")[0] == "reward:votes"  # the others have none


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"metrics.winrate": 1}, "Did you mean metrics.win_rate"),
        ({"win_rate.low": 1}, "Did you mean metrics.win_rate.low?"),
        ({"metrics.win_rate": 1}, "holds several keys. Write one of: metrics.win_rate.high"),
        ({"stage": []}, "is empty"),
        ({"stage": {"a": 1}}, "is no value"),
        ({"method.r": ">="}, "compares with nothing"),
        ({"method.r": "< null"}, "compares with nothing"),
        ({"method.r": float("nan")}, "is no finite number"),
        ({"a'b": 1}, "is a key that no run here has"),
        ({'a"b': 1}, "is no key of a run"),
        ({"": 1}, "is no key of a run"),
        ({"x') or 1 --": 1}, "is a key that no run here has"),
        ({"method.r": "=NaN", "stage": "=Infinity"}, None),
        ({"method.r": ">1e999"}, "is no finite number"),
        ({"method.r": "=>8"}, "Write one of >=,"),
        ({"method.r": "==8"}, "is no comparison"),
        ({"method.dora": ">=true"}, "is in no order"),
        ({"base": "pocket"}, "holds several keys. Write one of: base.digest, base.id"),
        ({"score": ">0"}, "holds several keys"),
        ({"method": "qlora"}, "Write one of: method.alpha"),
        ({3: 4}, "is no key of a run"),
        ({"method.r": [8] * 501}, "are more than 500"),
        ({"quantum": 1}, "is a key that no run here has"),
    ],
    ids=str,
)
def test_conditions_that_cannot_be_read(tmp_path: Path, where: dict[str, Any], says: str | None) -> None:
    if says is None:  # texts that no run has
        assert refs(small(tmp_path), where) == []
        return
    with pytest.raises(InputError) as caught:
        refs(small(tmp_path), where)
    assert says in str(caught.value)


def anew(root: Path) -> list[Record]:
    """What an index says that nobody has made yet."""
    with Index(root, rebuild=True) as index:
        return found(index, {}, ["run"], 10_000)[0]


@pytest.mark.parametrize("seed", range(6))
def test_after_any_changes_the_index_says_what_a_new_one_says(tmp_path: Path, seed: int) -> None:
    """Runs come, change, go, and come back, in any order; parents after their children too."""
    draw, known = random.Random(seed), [f"{stage}:{i}" for stage in ("sft", "reward", "ppo", "eval") for i in range(4)]
    for _ in range(25):
        for _ in range(draw.randint(1, 4)):
            ref = draw.choice(known)
            stage, _, name = ref.partition(":")
            folder = tmp_path / stage / name
            if (folder / FILE).exists() and draw.random() < 0.3:
                (folder / FILE).unlink()
                continue
            inputs = {"artifact" if stage == "eval" else "init": draw.choice(known)} if draw.random() < 0.8 else {}
            status = draw.choice(["done", "done", "failed", "interrupted"])
            digest = draw.choice([digest_of(ref), digest_of(f"sft:{draw.randrange(4)}")]) if stage != "eval" else ""
            metrics = {"win_rate": interval(draw.random(), 0, 1)} if stage == "eval" else {"last_kl": draw.random()}
            made(tmp_path, ref, inputs, status=status, metrics=metrics, digest=digest, day=draw.randrange(9))
        kept = records(tmp_path)
        backup = (tmp_path / INDEX).read_bytes()
        assert kept == anew(tmp_path)
        (tmp_path / INDEX).write_bytes(backup)
    assert len(kept) > 3


def test_a_run_that_makes_itself_and_two_that_make_each_other(tmp_path: Path) -> None:
    made(tmp_path, "ppo:itself", {"init": "ppo:itself"})
    made(tmp_path, "ppo:one", {"init": "ppo:other"})
    made(tmp_path, "ppo:other", {"init": "ppo:one"})
    assert (one(tmp_path, "ppo:one")["parents"], one(tmp_path, "ppo:one")["gone"]) == (["ppo:other"], [])
    assert one(tmp_path, "ppo:one")["children"] == ["ppo:other"]
    assert one(tmp_path, "ppo:itself")["children"] == []


def test_a_parent_that_is_gone_has_another_name_or_was_made_again(tmp_path: Path) -> None:
    made(tmp_path, "ppo:p", {"init": "sft:gone", "reward": "reward:renamed"})
    assert one(tmp_path, "ppo:p")["gone"] == ["sft:gone", "reward:renamed"]
    made(tmp_path, "reward:now", digest=digest_of("reward:renamed"))  # the same weights
    made(tmp_path, "sft:gone", digest=digest_of("something else"))  # made again since, with other weights
    record = one(tmp_path, "ppo:p")
    assert (record["parents"], record["gone"]) == (["sft:gone", "reward:now"], ["sft:gone"])
    assert one(tmp_path, "sft:gone")["children"] == []


def test_a_folder_that_was_renamed_is_found_by_its_digest(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "reward" / "votes").rename(tmp_path / "reward" / "best of all")
    assert one(tmp_path, "reward:best of all")["status"] == "done"
    record = one(tmp_path, "ppo:first")
    assert (record["parents"], record["gone"]) == (["sft:start", "reward:best of all"], [])


def test_a_run_called_like_a_number(tmp_path: Path) -> None:
    made(tmp_path, "sft:7")
    for wanted in (7, "=7", "7", [7], ">= 6"):
        assert refs(tmp_path, {"name": wanted}) == (["sft:7"] if wanted != ">= 6" else [])


def test_why_a_manifest_cannot_be_read_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights, or a version of align that reads more: the file stays as it is."""
    small(tmp_path)

    def fails(folder: Path) -> None:
        raise InputError("schema_version", 3, "is of another version", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr("align.registry.index.read_manifest", fails)
        assert one(tmp_path, "ppo:first")["status"] == "unreadable"
    assert one(tmp_path, "ppo:first")["status"] == "done"
    assert one(tmp_path, "ppo:first")["evaluation"] == "eval:one"


@pytest.mark.parametrize("shape", [{}, {"value": None, "low": None, "high": None}, {"value": "x", "low": 0, "high": 1},
                                   {"value": 10**400, "low": 0, "high": 1}, True, "0.5", [1]])  # fmt: skip
def test_a_figure_of_an_odd_shape_is_no_score(tmp_path: Path, shape: Any) -> None:
    made(tmp_path, "dpo:p", metrics={"win_rate": shape, "accuracy": 0.7, "last_kl": shape})
    record = one(tmp_path, "dpo:p")
    assert (record["score"], record["kl"]) == ({"name": "accuracy", "value": 0.7}, None)
    assert [*as_table([record], ["run", "metrics.win_rate"], BEGAN)]
    assert [*details(record)]


def test_text_that_is_half_a_character(tmp_path: Path) -> None:
    path = made(tmp_path, "ppo:p") / FILE
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"metrics": {"judge": "\ud800", "\udfff": 1}, "error": "\ud800"})
    )
    record = one(tmp_path, "ppo:p")
    assert record["metrics"] == {"judge": "\\ud800", "\\udfff": 1}
    assert "".join([*as_json([record], []), *as_csv([record], [])]).encode()


def test_a_manifest_that_is_no_file_and_a_deep_configuration(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "ppo" / "first" / "artifact" / "adapter_config.json").write_text("[" * 100_000)
    (tmp_path / "ppo" / "second" / FILE).unlink()
    os.mkfifo(tmp_path / "ppo" / "second" / FILE)
    assert "r" not in one(tmp_path, "ppo:first")["method"]
    assert "is no file" in one(tmp_path, "ppo:second")["error"]


def test_a_stage_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path)
    scandir = os.scandir

    def refuses(path: Any) -> Any:
        if Path(path).name == "eval":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("align.registry.folders.os.scandir", refuses)
    with pytest.raises(InputError, match=r"run\.root=.*eval: cannot be listed \(Permission denied\)"):
        records(tmp_path)


def test_nothing_is_left_in_a_folder_that_holds_no_runs(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    assert records(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    made(tmp_path, "ppo:p", metrics={"last_kl": float("nan"), "many": [1.0, float("inf")]})
    assert one(tmp_path, "ppo:p")["metrics"] == {"last_kl": None, "many": [1.0, None]}


def test_an_index_that_other_code_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "align.registry.index.record_of", lambda folder, manifest: {**record_of(folder, manifest), "x": 1}
        )
        patch.setattr("align.registry.index.version", lambda: 5)
        assert one(tmp_path, "ppo:first")["x"] == 1
    assert "x" not in one(tmp_path, "ppo:first")


def test_a_folder_whose_name_is_no_text_is_left_out(tmp_path: Path) -> None:
    small(tmp_path)
    folder = os.fsencode(tmp_path) + b"/ppo/\xff\xfe"
    os.mkdir(folder)
    Path(os.fsdecode(folder), FILE).write_bytes((tmp_path / "ppo" / "first" / FILE).read_bytes())
    with Index(tmp_path) as index:
        assert (len(index.names()), len(index.unnamed)) == (7, 1)


def test_two_runs_of_one_name_and_two_with_the_same_weights(tmp_path: Path) -> None:
    made(tmp_path, "sft:a", digest="w" * 64)
    made(tmp_path, "full:a", digest="w" * 64)
    made(tmp_path, "ppo:p", {"init": given(tmp_path, "full:a", "w" * 64)})
    assert (one(tmp_path, "ppo:p")["parents"], one(tmp_path, "ppo:p")["gone"]) == (["full:a"], [])
    assert refs(tmp_path, {"name": "a"}) == ["full:a", "sft:a"]


def test_a_root_that_was_moved(tmp_path: Path) -> None:
    small(tmp_path / "runs")
    before = records(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert records(tmp_path / "elsewhere") == before
    assert anew(tmp_path / "elsewhere") == before


def edited(**values: Any) -> Any:
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:100], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (lambda text: "\x00\xff", "is not JSON"),
        (lambda text: "[]", "is a list"),
        (edited(schema_version=99), "was written by another version of align"),
        (edited(schema_version=None), "is not a run's manifest"),
        (edited(times={"started": 3}), "times.* is missing, or of another kind"),
        (edited(metrics=[]), "metrics is missing"),
        (edited(stage="dpo"), "manifest.json is that of dpo:first; this folder is ppo:first"),
        (edited(base={"id": "x"}), "base is missing, or of another kind"),
        (edited(config={"data": {}, "method": {}, "stage": 3}), "config.stage"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path, change: Any, says: str) -> None:
    small(tmp_path)
    path = tmp_path / "ppo" / "first" / FILE
    text = path.read_text()
    path.write_text(change(text))
    record = one(tmp_path, "ppo:first")
    assert record["status"] == "unreadable"
    assert says in record["error"]
    assert len(refs(tmp_path, {})) == 7
    path.write_text(text)
    assert one(tmp_path, "ppo:first")["status"] == "done"


@pytest.mark.parametrize("times", [{"started": "yesterday"}, {}, {"started": "", "finished": "x"}])
def test_times_that_say_nothing(tmp_path: Path, times: dict[str, str]) -> None:
    made(tmp_path, "ppo:p", times=times, status="failed", error="cut off")
    assert one(tmp_path, "ppo:p")["cost"]["minutes"] is None


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    times = {"started": BEGAN.isoformat(), "finished": (BEGAN - timedelta(hours=3)).isoformat()}
    made(tmp_path, "ppo:p", times=times)
    assert one(tmp_path, "ppo:p")["cost"]["minutes"] is None


def test_half_deleted_folders_and_files_that_are_none(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "ppo" / "empty").mkdir()
    (tmp_path / "ppo" / "file").write_text("x")
    (tmp_path / "ppo" / "second" / "artifact" / "adapter_config.json").unlink()
    (tmp_path / "notes" / "x").mkdir(parents=True)
    (tmp_path / "notes" / "x" / FILE).write_text("{}")
    (tmp_path / "reward" / "loop").symlink_to("loop")
    assert len(refs(tmp_path, {})) == 7
    with Index(tmp_path, rebuild=True) as index:
        record = index.record("ppo:second")
    assert record is not None
    assert "r" not in record["method"]
    (tmp_path / "ppo" / "first" / "artifact" / "adapter_config.json").write_text("[3]")
    assert "r" not in next(one for one in anew(tmp_path) if one["run"] == "ppo:first")["method"]


@pytest.mark.parametrize("name", ["mit Leerzeichen", "größe-é", "日本語", "a'b", 'a"b', "x;drop table runs", "%", "*"])
def test_names(tmp_path: Path, name: str) -> None:
    made(tmp_path, f"sft:{name}")
    made(tmp_path, "ppo:p", {"init": f"sft:{name}"})
    assert one(tmp_path, f"sft:{name}")["children"] == ["ppo:p"]
    assert f"sft:{name}" in refs(tmp_path, {"name": name if "*" not in name else "=*"})


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def torn(path: Path) -> None:
    """Pages in the middle are another file's."""
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


def changed(sql: str) -> Any:
    """What is found only when it is read."""

    def harm(path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.execute(sql)

    harm.__name__ = sql
    return harm


INSIDE = [
    "update runs set record = '{' where run = 'eval:one'", "update runs set record = null where run = 'eval:one'",
    "update runs set record = '[]' where run = 'eval:one'", "update runs set record = '{run: 1}' where run = 'eval:one'",
    "update runs set record = '{}' where run = 'eval:one'", "update runs set record = '5'",
    "update runs set record = cast(x'22ff22' as text) where run = 'eval:one'",
    "update runs set stamp = cast(x'ff' as text) where run = 'eval:one'",
    "update runs set run = cast(x'ff' as text) where run = 'eval:one'",
    "update runs set own = '[]' where run = 'ppo:first'",
]  # fmt: skip


@pytest.mark.parametrize("harm", [garbage, torn, cut, another_version, empty, os.unlink, *map(changed, INSIDE)])
def test_an_index_that_is_damaged_is_made_again(tmp_path: Path, harm: Any) -> None:
    small(tmp_path)
    expected = records(tmp_path)
    harm(tmp_path / INDEX)
    made(tmp_path, "ppo:new", {"init": "ppo:first"}, day=20)
    expected = [
        one | ({"children": [*one["children"], "ppo:new"]} if one["run"] == "ppo:first" else {}) for one in expected
    ]
    began = time.monotonic()
    assert [record["run"] for record in records(tmp_path)] == sorted([*(one["run"] for one in expected), "ppo:new"])
    assert records(tmp_path)[:4] == expected[:4]
    assert time.monotonic() - began < 15  # no lock is waited for
    with sqlite3.connect(tmp_path / INDEX) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_root_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index from before, which is out of date by now, and without one."""
    small(tmp_path)
    expected = records(tmp_path)
    made(tmp_path, "ppo:new", day=20)
    before = (tmp_path / INDEX).read_bytes()
    connect = sqlite3.connect

    def read_only(path: Any, **given: Any) -> sqlite3.Connection:
        if path == tmp_path / INDEX:
            return connect(f"file:{path}?mode=ro", **given, uri=True)
        return connect(path, **given)

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
        made(tmp_path, f"sft:{i}")
    words = [sys.executable, "-c", BOTH, str(tmp_path)]
    both = [subprocess.Popen([*words, how], stderr=subprocess.PIPE, text=True) for how in ("rebuild", "ask", "ask")]
    assert [process.communicate()[1] for process in both] == [""] * 3


def test_a_run_that_was_killed_is_interrupted_and_one_at_work_is_running(tmp_path: Path) -> None:
    import fcntl

    for name in ("killed", "at-work"):
        made(tmp_path, f"ppo:{name}", status="running", times={"started": BEGAN.isoformat()})
    held = os.open(tmp_path / "ppo" / "at-work", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert {one["name"]: one["status"] for one in records(tmp_path)} == {"killed": "interrupted", "at-work": "running"}
    assert refs(tmp_path, {"status": "interrupted"}) == ["ppo:killed"]
    os.close(held)
    assert refs(tmp_path, {"status": "interrupted"}) == ["ppo:at-work", "ppo:killed"]


def test_asking_changes_no_folder(tmp_path: Path) -> None:
    small(tmp_path)

    def seen() -> set[tuple[Path, bytes]]:
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != INDEX)
        return {(path, path.read_bytes()) for path in files}

    before = seen()
    records(tmp_path)
    anew(tmp_path)
    assert seen() == before
    assert read_manifest(tmp_path / "ppo" / "first").done
