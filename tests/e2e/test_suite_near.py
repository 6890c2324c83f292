"""Prompts that nearly equal a training prompt: they are evaluated, counted, and left out of a second comparison."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from suite_evaluations import RuleEvaluations, read_artifact_rows, read_results

from align.data import training_overlap
from align.run import read_manifest

CHECK = {"kind": "regex", "pattern": "e"}


def test_near_prompts_are_counted_by_system_and_left_out_of_a_second_comparison(bench: RuleEvaluations, capsys):
    prompts = [json.loads(line)["messages"][0]["content"] for line in bench.chats()]
    shouted = [f"{text.upper()}!!" for text in dict.fromkeys(prompts)][:12]  # the same words with another id
    rows = [{"id": f"near {i}", "prompt": text, "check": CHECK} for i, text in enumerate(shouted)]
    rows += [{"id": f"far {i}", "prompt": f"Zebra number {i} quickly?", "check": CHECK} for i in range(6)]
    run = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows), "run.name=near")
    near = {row["id"]: row["near"] for row in read_artifact_rows(run) if "near" in row}
    assert near  # three of four prompts are trained on
    assert all(id.startswith("near") and of == {"s": "sft:s, exact"} for id, of in near.items())
    task = read_results(run)["tasks"]["asked"]
    assert task["near"]["items"] == task["near"]["systems"]["s"] == len(near)
    assert task["near"]["systems"]["b"] == 0
    assert task["near"]["others"]["b"]["difference"]["n"] == len(rows) - len(near)
    scores = {row["id"]: [row["answers"][system]["score"] for system in "sb"] for row in read_artifact_rows(run)}
    differences = [scores[id][0] - scores[id][1] for id in scores if id not in near]
    assert task["near"]["others"]["b"]["difference"]["value"] == sum(differences) / len(differences)
    assert "Nearly the same as training data:" in (run / "report.html").read_text()
    unchecked = bench.run(
        "stage.systems={s: sft:s, b: base}", bench.tasks(*rows), "run.name=unasked", "stage.near=null"
    )
    assert "near" not in read_results(unchecked)["tasks"]["asked"]


def test_rows_that_changed_since_are_not_taken_for_those_of_the_run(
    bench: RuleEvaluations, monkeypatch: pytest.MonkeyPatch
):
    build_data_input = training_overlap.build_data_input
    monkeypatch.setattr(
        training_overlap, "build_data_input", lambda source: replace(build_data_input(source), digest="another")
    )
    tasks = bench.tasks({"id": 1, "prompt": "Zebra?", "check": CHECK})
    run = bench.run("stage.systems={s: sft:s, b: base}", tasks, "run.name=changed")
    notes = [note for note in read_manifest(run).metrics["judge_notes"] if "sft:s cannot be read again" in note]
    assert len(notes) == 1
    assert "has changed since" in notes[0]
