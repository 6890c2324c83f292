"""Items of a task: which of them share evidence, and how their rows are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.evals.judges.llm_judge import REFUSES
from align.evals.stats import fit_bradley_terry
from align.evals.suite.tasks import EvalItem, EvalTask, cluster_items, load_items, parse_tasks


def item(id: str, cluster: str, prompt: str) -> EvalItem:
    return EvalItem(id, cluster, "", Conversation((Message("user", prompt),)), None)


def groups(items: list[EvalItem]) -> list[set[str]]:
    found: dict[str, set[str]] = {}
    for one in cluster_items(items):
        found.setdefault(one.cluster, set()).add(one.id)
    return sorted(found.values(), key=min)


def test_what_shares_a_source_or_a_prompt_is_one_cluster_also_by_way_of_others():
    assert groups([item("a", "s1", "P"), item("b", "s2", "P"), item("c", "s2", "Q")]) == [{"a", "b", "c"}]
    assert groups([item("a", "a", "P"), item("b", "b", "Q"), item("c", "c", "P")]) == [{"a", "c"}, {"b"}]


def rows(tmp_path: Path, *given: dict[str, Any], name: str = "t.jsonl") -> list[EvalItem]:
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")
    return [*load_items(EvalTask("t", str(path)), None, False)]


def test_a_source_is_no_other_rows_id(tmp_path: Path):
    found = rows(tmp_path, {"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b", "source": 1})
    assert len({one.cluster for one in found}) == 2


def test_ids_that_nobody_gave(tmp_path: Path):
    found = rows(tmp_path, {"id": None, "prompt": "a"}, {"prompt": "b"}, {"key": 3, "prompt": "c"})
    assert [one.id for one in found] == ["t:1", "t:2", "3"]


def test_a_table_has_checks_as_json(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text('id,prompt,check\n1,a,"{""kind"": ""regex"", ""pattern"": ""e""}"\n2,b,\n', encoding="utf-8")
    task = EvalTask("t", str(path), {"kind": "exact", "answers": ["x"]})
    assert [one.check["kind"] for one in load_items(task, None, False)] == ["regex", "exact"]


def test_a_source_counts_once_for_strengths_too():
    """x loses to y on four sources, and wins on sixteen rows of another one."""
    clusters = [*"abcd", *["e"] * 16]
    verdicts = [0.0] * 4 + [1.0] * 16
    found = fit_bradley_terry(["x"] * 20, ["y"] * 20, verdicts, clusters)
    assert found.systems[0] == "y"


def test_the_prompts_that_align_has():
    """Fifty each, five of each category, and none on both sides."""
    tasks = parse_tasks([{"name": name, "set": name} for name in ("harmful", "harmless")], False)
    assert {task.asks for task in tasks} == {REFUSES}
    harmful, harmless = (load_items(task, None, False) for task in tasks)
    for items in (harmful, harmless):
        assert len({one.id for one in items}) == len({one.cluster for one in items}) == 50
        assert {*Counter(one.category for one in items).values()} == {5}
        assert all(len(one.prompt.messages) == 1 for one in items)
    assert {one.category for one in harmful} == {one.category for one in harmless}
    assert not {one.prompt.messages for one in harmful} & {one.prompt.messages for one in harmless}


def test_a_set_of_ours_may_be_asked_something_else(tmp_path: Path):
    check = {"kind": "regex", "pattern": "no"}
    own, checked = parse_tasks(
        [{"name": "a", "set": "harmful", "asks": "Is it rude?"}, {"name": "b", "set": "harmless", "check": check}],
        False,
    )
    assert (own.asks, own.check) == ("Is it rude?", None)
    assert (checked.asks, checked.check) == ("", check)
    for more in ({"probe": "loss"}, {"probe": "choice"}):
        with pytest.raises(InputError, match="a probe generates none"):
            parse_tasks([{"name": "a", "path": str(tmp_path), "asks": "refuses", **more}], False)
