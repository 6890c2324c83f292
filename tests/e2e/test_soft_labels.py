"""`data.soft_labels=true` from the command line: stages learn from the posteriors of votes, and of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stage_commands import Ready, Workshop

from align.data.training_overlap import read_trained_rows
from align.run import read_manifest

VOTES = ("data=annotations", "data.allow_simulated=true")
SHORT = ("stage.batch_size=8", "stage.micro_batch=8", "stage.held_out=0.3")


@pytest.fixture
def shop(ready: Ready, tmp_path: Path) -> Workshop:
    return Workshop(ready.root, tmp_path)


def read_loss(folder: Path) -> float:
    return read_manifest(folder).metrics["loss"]


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_a_stage_learns_from_the_posteriors_of_votes_and_of_their_export(
    stage: str, shop: Workshop, tmp_path: Path
) -> None:
    hard = shop.run(stage, *VOTES, *SHORT)
    soft = shop.run(stage, *VOTES, *SHORT, "data.soft_labels=true")
    assert hard != soft
    assert read_loss(soft) != read_loss(hard)
    assert read_manifest(soft).config["data"]["soft_labels"] is True
    assert len(read_trained_rows(read_manifest(soft), f"sqlite:///{shop.root / 'annotations.db'}")) > 0

    exported = shop.run("annotate", "stage.action=export", "data.allow_simulated=true")
    path = exported / "artifact" / "preferences.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {0 < row["posterior"] < 1 for row in rows} == {True}
    files = ("data=files", f"data.path={path}", "data.held_out=0.05")
    assert shop.status(f"stage={stage}", *files, *SHORT, "data.soft_labels=true") == 0, shop.output
    for row in rows:
        del row["posterior"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = (f"stage={stage}", "data=files", f"data.path={bare}", "data.soft_labels=true", *SHORT)
    shop.refuses(*words, says=("data.soft_labels=True", "has no posterior"))


def test_feedback_has_no_soft_labels(shop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    rows = [{"prompt": f"Number {i}?", "completion": "yes", "label": i % 2 == 0} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("stage=kto", "data=files", f"data.path={path}", "data.soft_labels=true", *SHORT)
    shop.refuses(*words, says=("data.soft_labels=True", "holds labelled answers"))
