"""Prompts that a system was nearly trained on: asked, counted, and compared apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from benches import Bench, lines, results

from align.data import training_overlap
from align.run import read_manifest

CHECK = {"kind": "regex", "pattern": "e"}


def test_near_prompts_are_counted_by_system_and_left_out_of_a_second_comparison(bench: Bench, capsys):
    told = [json.loads(line)["messages"][0]["content"] for line in bench.chats()]
    shouted = [f"{text.upper()}!!" for text in dict.fromkeys(told)][:12]  # the same words, and another id
    rows = [{"id": f"near {i}", "prompt": text, "check": CHECK} for i, text in enumerate(shouted)]
    rows += [{"id": f"far {i}", "prompt": f"Zebra number {i} quickly?", "check": CHECK} for i in range(6)]
    run = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows), "run.name=near")
    near = {row["id"]: row["near"] for row in lines(run) if "near" in row}
    assert near  # of the prompts that are trained on, three of four
    assert all(id.startswith("near") and of == {"s": "sft:s, exact"} for id, of in near.items())
    found = results(run)["tasks"]["asked"]
    assert found["near"]["items"] == found["near"]["systems"]["s"] == len(near)
    assert found["near"]["systems"]["b"] == 0
    assert found["near"]["others"]["b"]["difference"]["n"] == len(rows) - len(near)
    scores = {row["id"]: [row["answers"][who]["score"] for who in "sb"] for row in lines(run)}
    apart = [scores[id][0] - scores[id][1] for id in scores if id not in near]
    assert found["near"]["others"]["b"]["difference"]["value"] == sum(apart) / len(apart)
    assert "Training nearly saw" in (run / "report.html").read_text()
    none = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows), "run.name=unasked", "stage.near=null")
    assert "near" not in results(none)["tasks"]["asked"]


def test_rows_that_changed_since_are_not_taken_for_those_of_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    record = training_overlap.build_data_input
    monkeypatch.setattr(training_overlap, "build_data_input", lambda source: replace(record(source), digest="another"))
    asked = bench.tasks({"id": 1, "prompt": "Zebra?", "check": CHECK})
    run = bench.run("stage.systems={s: sft:s, b: base}", asked, "run.name=changed")
    notes = [note for note in read_manifest(run).metrics["judge_notes"] if "sft:s cannot be read again" in note]
    assert len(notes) == 1
    assert "has changed since" in notes[0]
