"""Reward models with `stage.prioritise=true`: items that the model is unsure of are asked first."""

from __future__ import annotations

import shutil
from math import isclose
from pathlib import Path

import pytest
import torch
from stage_commands import SFT, Workshop

from align.annotate.assignment import AssignmentQueue
from align.annotate.priority import compute_uncertainty
from align.annotate.store import Store, configure_project
from align.annotate.store.tables import work
from align.run import read_manifest


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.0, 0.0], 1.0), ([1.0, 1.0, 1.0], 1.0), ([50.0, -50.0], 0.0), ([2.0, 0.0], 0.4199743416140260)],
)
def test_uncertainty_by_hand(scores, expected):
    """4·p·(1 − p) with p = 1 / (1 + e⁻²) = 0.880797."""
    assert isclose(compute_uncertainty(torch.tensor(scores)), expected, rel_tol=1e-6, abs_tol=1e-12)
    assert isclose(compute_uncertainty(torch.tensor(scores[::-1])), expected, rel_tol=1e-6, abs_tol=1e-12)


def test_the_least_sure_item_is_given_first(chats: Path, tiny_model: Path, tmp_path: Path) -> None:
    shop = Workshop(tmp_path / "runs", Path(shutil.copy(chats, tmp_path / "chats.jsonl")))
    shop.run("sft", "model=hub", f"model.path={tiny_model}", *SFT)
    shop.run_up_to_reward()
    words = ("data=annotations", "data.allow_simulated=true", "stage.batch_size=8", "stage.micro_batch=8")
    folder = shop.run("reward", *words, "stage.held_out=0.3", "stage.prioritise=true")
    with Store.open(f"sqlite:///{shop.root / 'annotations.db'}", create_if_missing=False) as store:
        with store.reading() as db:
            priorities = {row.item: row.priority for row in db.execute(work.select())}
        assert read_manifest(folder).metrics["prioritised"] == len(priorities) == 24
        assert all(0 < priority <= 1 for priority in priorities.values())
        assert len(set(priorities.values())) > 12
        project = read_manifest(folder).inputs["data"].project
        configure_project(store, project, {"order": "priority"})
        task = AssignmentQueue(store, project).take("ann")
        assert task is not None
        assert priorities[task.item.id] == max(priorities.values())
    shop.refuses(
        "stage=reward", f"data.path={shop.data}", "data=jsonl", "stage.prioritise=true", says="stage.prioritise"
    )
