"""Records, conditions and orders of the run registry, tested on run folders that `synthetic_runs` writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import (
    build_interval,
    build_run_input,
    compute_artifact_digest,
    find_record,
    query_records,
    query_refs,
    rebuild_records,
    write_run_folder,
    write_two_policies,
)

from align.core.errors import InputError
from align.registry.index import INDEX
from align.registry.query import is_match
from align.run.manifest import FILE


def test_what_is_known_of_a_policy(tmp_path: Path) -> None:
    record = find_record(write_two_policies(tmp_path), "ppo:first")
    shape = {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "dora": False, "rslora": False}
    assert record["method"] == {"name": "qlora", "quantisation": "nf4", **shape}
    assert (record["reward"], record["base"]["id"], record["dtype"]) == ("reward:votes", "pocket", "float32")
    assert record["cost"] == {"minutes": 30.0, "peak_memory_mb": 700.5, "tokens": None, "device": "cpu"}
    assert (record["parents"], record["gone"]) == (["sft:start", "reward:votes"], [])
    assert {name: source["run"] for name, source in record["inputs"].items()} == {
        "init": "sft:start",
        "reward": "reward:votes",
    }
    assert record["children"] == ["eval:one", "export:one"]
    assert record["exports"] == ["export:one"]
    assert find_record(tmp_path, "export:one")["kl"] == 1e-7
    assert (record["evaluation"], record["kl"]) == ("eval:one", 3.0)
    assert record["score"] == {"name": "win_rate", "value": 0.81, "low": 0.75, "high": 0.87}
    second_policy = find_record(tmp_path, "ppo:second")
    assert (second_policy["score"], second_policy["evaluation"], second_policy["exports"]) == (
        {"name": "last_score", "value": 1.5},
        None,
        [],
    )
    start = find_record(tmp_path, "sft:start")
    assert start["parents"] == ["data:talk"]
    assert start["children"] == ["ppo:first", "ppo:second", "reward:votes"]
    assert (start["data"]["root"], start["data"]["rows"]) == ("t" * 64, 900)


def test_a_later_evaluation_counts_and_a_proxy_only_where_there_is_no_other(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    write_run_folder(
        tmp_path,
        "eval:proxy",
        {"artifact": "ppo:first"},
        day=9,
        metrics={"win_rate": build_interval(0.99, 0.9, 1), "judge_is": "proxy"},
    )
    write_run_folder(tmp_path, "eval:failed", {"artifact": "ppo:first"}, day=10, status="failed", metrics={})
    assert find_record(tmp_path, "ppo:first")["evaluation"] == "eval:one"
    write_run_folder(
        tmp_path,
        "eval:later",
        {"artifact": "ppo:first"},
        day=11,
        metrics={"win_rate": build_interval(0.4, 0.3, 0.5), "judge_is": "gold"},
    )
    assert find_record(tmp_path, "ppo:first")["score"]["value"] == 0.4


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
    assert query_refs(write_two_policies(tmp_path), where) == expected


def test_orders(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    assert query_refs(tmp_path, {}, "-started")[0] == "export:one"
    assert query_refs(tmp_path, {"stage": ["ppo", "sft"]}, "-score.value") == ["sft:start", "ppo:second", "ppo:first"]
    assert query_refs(tmp_path, {"stage": ["ppo", "sft"]}, "stage", "-name") == ["ppo:second", "ppo:first", "sft:start"]
    assert query_refs(tmp_path, {}, "metrics.accuracy.value")[0] == "reward:votes"  # the other runs have no accuracy


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"metrics.winrate": 1}, "Did you mean metrics.win_rate"),
        ({"win_rate.low": 1}, "Did you mean metrics.win_rate.low?"),
        ({"metrics.win_rate": 1}, "holds several keys. Write one of: metrics.win_rate.high"),
        ({"stage": []}, "is empty"),
        ({"stage": {"a": 1}}, "is no value"),
        ({"method.r": ">="}, "has no value to compare with"),
        ({"method.r": "< null"}, "has no value to compare with"),
        ({"method.r": float("nan")}, "is no finite number"),
        ({"a'b": 1}, "is a key that no run here has"),
        ({'a"b': 1}, "is no key of a run"),
        ({"": 1}, "is no key of a run"),
        ({"x') or 1 --": 1}, "is a key that no run here has"),
        ({"method.r": "=NaN", "stage": "=Infinity"}, None),
        ({"method.r": ">1e999"}, "is no finite number"),
        ({"method.r": "=>8"}, "Write one of >=,"),
        ({"method.r": "==8"}, "is no comparison"),
        ({"method.dora": ">=true"}, "have no order"),
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
        assert query_refs(write_two_policies(tmp_path), where) == []
        return
    with pytest.raises(InputError) as caught:
        query_refs(write_two_policies(tmp_path), where)
    assert says in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_after_any_changes_the_index_says_what_a_new_one_says(tmp_path: Path, seed: int) -> None:
    """Runs are added, changed, removed and restored in any order, also parents after their children."""
    generator = random.Random(seed)
    run_refs = [f"{stage}:{i}" for stage in ("sft", "reward", "ppo", "eval") for i in range(4)]
    for _ in range(25):
        for _ in range(generator.randint(1, 4)):
            ref = generator.choice(run_refs)
            stage, _, name = ref.partition(":")
            folder = tmp_path / stage / name
            if (folder / FILE).exists() and generator.random() < 0.3:
                (folder / FILE).unlink()
                continue
            inputs = (
                {"artifact" if stage == "eval" else "init": generator.choice(run_refs)}
                if generator.random() < 0.8
                else {}
            )
            status = generator.choice(["done", "done", "failed", "interrupted"])
            digest = (
                generator.choice(
                    [compute_artifact_digest(ref), compute_artifact_digest(f"sft:{generator.randrange(4)}")]
                )
                if stage != "eval"
                else ""
            )
            metrics = (
                {"win_rate": build_interval(generator.random(), 0, 1)}
                if stage == "eval"
                else {"last_kl": generator.random()}
            )
            write_run_folder(
                tmp_path, ref, inputs, status=status, metrics=metrics, digest=digest, day=generator.randrange(9)
            )
        index_records = query_records(tmp_path)
        backup = (tmp_path / INDEX).read_bytes()
        assert index_records == rebuild_records(tmp_path)
        (tmp_path / INDEX).write_bytes(backup)
    assert len(index_records) > 3


def test_a_run_that_makes_itself_and_two_that_make_each_other(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:itself", {"init": "ppo:itself"})
    write_run_folder(tmp_path, "ppo:one", {"init": "ppo:other"})
    write_run_folder(tmp_path, "ppo:other", {"init": "ppo:one"})
    assert (find_record(tmp_path, "ppo:one")["parents"], find_record(tmp_path, "ppo:one")["gone"]) == (
        ["ppo:other"],
        [],
    )
    assert find_record(tmp_path, "ppo:one")["children"] == ["ppo:other"]
    assert find_record(tmp_path, "ppo:itself")["children"] == []


def test_a_parent_that_is_gone_has_another_name_or_was_made_again(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:p", {"init": "sft:gone", "reward": "reward:renamed"})
    assert find_record(tmp_path, "ppo:p")["gone"] == ["sft:gone", "reward:renamed"]
    write_run_folder(tmp_path, "reward:now", digest=compute_artifact_digest("reward:renamed"))  # the same weights
    write_run_folder(
        tmp_path, "sft:gone", digest=compute_artifact_digest("something else")
    )  # made again since, with other weights
    record = find_record(tmp_path, "ppo:p")
    assert (record["parents"], record["gone"]) == (["sft:gone", "reward:now"], ["sft:gone"])
    assert find_record(tmp_path, "sft:gone")["children"] == []


def test_a_folder_that_was_renamed_is_found_by_its_digest(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    (tmp_path / "reward" / "votes").rename(tmp_path / "reward" / "best of all")
    assert find_record(tmp_path, "reward:best of all")["status"] == "done"
    record = find_record(tmp_path, "ppo:first")
    assert (record["parents"], record["gone"]) == (["sft:start", "reward:best of all"], [])


def test_a_run_called_like_a_number(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:7")
    for condition in (7, "=7", "7", [7], ">= 6"):
        assert query_refs(tmp_path, {"name": condition}) == (["sft:7"] if condition != ">= 6" else [])


def test_two_runs_of_one_name_and_two_with_the_same_weights(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:a", digest="w" * 64)
    write_run_folder(tmp_path, "full:a", digest="w" * 64)
    write_run_folder(tmp_path, "ppo:p", {"init": build_run_input(tmp_path, "full:a", "w" * 64)})
    assert (find_record(tmp_path, "ppo:p")["parents"], find_record(tmp_path, "ppo:p")["gone"]) == (["full:a"], [])
    assert query_refs(tmp_path, {"name": "a"}) == ["full:a", "sft:a"]


def test_a_root_that_was_moved(tmp_path: Path) -> None:
    write_two_policies(tmp_path / "runs")
    before = query_records(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert query_records(tmp_path / "elsewhere") == before
    assert rebuild_records(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", ["mit Leerzeichen", "größe-é", "日本語", "a'b", 'a"b', "x;drop table runs", "%", "*"])
def test_names(tmp_path: Path, name: str) -> None:
    write_run_folder(tmp_path, f"sft:{name}")
    write_run_folder(tmp_path, "ppo:p", {"init": f"sft:{name}"})
    assert find_record(tmp_path, f"sft:{name}")["children"] == ["ppo:p"]
    assert f"sft:{name}" in query_refs(tmp_path, {"name": name if "*" not in name else "=*"})


def test_what_a_server_has_loaded_is_in_its_log(tmp_path: Path) -> None:
    """The log also has adapters that were loaded later and names that were changed since."""
    write_two_policies(tmp_path)
    server = write_run_folder(tmp_path, "serve:s", {"adapters.chat": "ppo:first"}, day=9)
    assert find_record(tmp_path, "serve:s")["serves"] == {}
    arm = {"label": "ppo:second", "adapter": compute_artifact_digest("ppo:second"), "weight": 1.0}
    with (server / "adapters.jsonl").open("w") as log:
        log.write(json.dumps({"time": "t", "names": {"chat": [arm], "plain": [arm | {"adapter": None}]}}) + "\n")
    assert find_record(tmp_path, "serve:s")["serves"]["chat"] == [arm]
    assert find_record(tmp_path, "serve:s")["loaded"] == [compute_artifact_digest("ppo:second")]
    assert [find_record(tmp_path, f"ppo:{name}")["servers"] for name in ("first", "second")] == [["serve:s"]] * 2
    with (server / "adapters.jsonl").open("a") as log:
        log.write(json.dumps({"time": "t", "names": {"chat": []}}) + "\n")
    record = find_record(tmp_path, "serve:s")
    assert (record["serves"], record["loaded"]) == ({"chat": []}, [compute_artifact_digest("ppo:second")])
    assert find_record(tmp_path, "ppo:second")["servers"] == ["serve:s"]
    assert query_records(tmp_path) == rebuild_records(tmp_path)


@pytest.mark.parametrize(
    "log", ["{", "[]", '{"names": 3}', '{"names": {"chat": 3}}', '{"names": {"chat": [3, {}]}}', "\0"]
)
def test_a_log_of_a_server_that_says_nothing(tmp_path: Path, log: str) -> None:
    folder = write_run_folder(tmp_path, "serve:s")
    (folder / "adapters.jsonl").write_text(f"{log}\n")
    assert find_record(tmp_path, "serve:s")["loaded"] == []


def test_a_run_that_failed_has_the_cost_of_what_it_did(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, "ppo:p", status="failed", error="x", digest="")
    rows = [{"step": i, "elapsed_s": 30.0 * i, "peak_rss_mb": 500.0 + i} for i in range(400)]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cost = find_record(tmp_path, "ppo:p")["cost"]
    assert (cost["minutes"], cost["peak_memory_mb"]) == (199.5, 899.0)
    for text in ("", "{", "[]", '{"elapsed_s": "x"}', '{"elapsed_s": 1e999}'):
        (folder / "timing.jsonl").write_text(text)
        write_run_folder(tmp_path, "ppo:p", status="interrupted", error=f"x{len(text)}", digest="")
        assert find_record(tmp_path, "ppo:p")["cost"]["minutes"] is None


def test_a_pattern_matches_truth_values_too():
    assert [is_match(value, "=", "*") for value in (True, False, 0.5, "text", None)] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert is_match(True, "=", "1*")
    assert not is_match(True, "=", 1)
