"""Items of a task: clusters of items that share evidence, and reading rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.evals.judges.llm_judge import REFUSES
from align.evals.stats.bradley_terry import fit_bradley_terry
from align.evals.suite.tasks import EvalItem, EvalTask, cluster_items, load_task_items, parse_tasks


def build_item(id: str, cluster: str, prompt: str) -> EvalItem:
    return EvalItem(id, cluster, "", Conversation((Message("user", prompt),)), None)


def list_clusters(items: list[EvalItem]) -> list[set[str]]:
    ids_by_cluster: dict[str, set[str]] = {}
    for item in cluster_items(items):
        ids_by_cluster.setdefault(item.cluster, set()).add(item.id)
    return sorted(ids_by_cluster.values(), key=min)


def test_what_shares_a_source_or_a_prompt_is_one_cluster_also_by_way_of_others():
    assert list_clusters([build_item("a", "s1", "P"), build_item("b", "s2", "P"), build_item("c", "s2", "Q")]) == [
        {"a", "b", "c"}
    ]
    assert list_clusters([build_item("a", "a", "P"), build_item("b", "b", "Q"), build_item("c", "c", "P")]) == [
        {"a", "c"},
        {"b"},
    ]


def load_rows(tmp_path: Path, *rows: dict[str, Any], name: str = "t.jsonl") -> list[EvalItem]:
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [*load_task_items(EvalTask("t", str(path)), None, False)]


def test_a_source_is_no_other_rows_id(tmp_path: Path):
    items = load_rows(tmp_path, {"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b", "source": 1})
    assert len({item.cluster for item in items}) == 2


def test_ids_that_nobody_gave(tmp_path: Path):
    items = load_rows(tmp_path, {"id": None, "prompt": "a"}, {"prompt": "b"}, {"key": 3, "prompt": "c"})
    assert [item.id for item in items] == ["t:1", "t:2", "3"]


def test_a_table_has_checks_as_json(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text('id,prompt,check\n1,a,"{""kind"": ""regex"", ""pattern"": ""e""}"\n2,b,\n', encoding="utf-8")
    task = EvalTask("t", str(path), {"kind": "exact", "answers": ["x"]})
    assert [item.check["kind"] for item in load_task_items(task, None, False)] == ["regex", "exact"]


def test_a_source_counts_once_for_strengths_too():
    """System x loses to y on four sources, and wins on sixteen rows of a single source."""
    clusters = [*"abcd", *["e"] * 16]
    verdicts = [0.0] * 4 + [1.0] * 16
    fit = fit_bradley_terry(["x"] * 20, ["y"] * 20, verdicts, clusters)
    assert fit.systems[0] == "y"


def test_the_prompts_that_align_has():
    """Each set has fifty prompts, five of each category. No prompt is in both sets."""
    tasks = parse_tasks([{"name": name, "set": name} for name in ("harmful", "harmless")], False)
    assert {task.asks for task in tasks} == {REFUSES}
    harmful, harmless = (load_task_items(task, None, False) for task in tasks)
    for items in (harmful, harmless):
        assert len({item.id for item in items}) == len({item.cluster for item in items}) == 50
        assert {*Counter(item.category for item in items).values()} == {5}
        assert all(len(item.prompt.messages) == 1 for item in items)
    assert {item.category for item in harmful} == {item.category for item in harmless}
    assert not {item.prompt.messages for item in harmful} & {item.prompt.messages for item in harmless}


def test_a_set_of_ours_may_be_asked_something_else(tmp_path: Path):
    check = {"kind": "regex", "pattern": "no"}
    custom, checked = parse_tasks(
        [{"name": "a", "set": "harmful", "asks": "Is it rude?"}, {"name": "b", "set": "harmless", "check": check}],
        False,
    )
    assert (custom.asks, custom.check) == ("Is it rude?", None)
    assert (checked.asks, checked.check) == ("", check)
    for fields in ({"probe": "loss"}, {"probe": "choice"}):
        with pytest.raises(InputError, match="a probe generates none"):
            parse_tasks([{"name": "a", "path": str(tmp_path), "asks": "refuses", **fields}], False)
