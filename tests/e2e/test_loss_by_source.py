"""The held-out loss of each source of a data set."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from data_sets import build_question_row, draw_sentence
from json_lines import write_rows
from stage_commands import Workshop

from align.run import read_manifest

SFT = ("stage=sft", "model=hub", "data=manifest", "stage.max_steps=1", "data.too_long=truncate", "device=cpu")


def test_the_loss_of_each_source_is_that_of_its_rows_alone(tmp_path: Path, tiny_model: Path) -> None:
    """Compared with data sets of one source each, which have the same held-out rows."""
    shop = Workshop(tmp_path / "runs", tmp_path)
    losses = {}
    for name, kinds in {"both": (0, 1), "first": (0,), "second": (1,)}.items():
        sources = []
        for kind in kinds:
            rows = [
                build_question_row(f"What is {kind}, {i}?", draw_sentence(random.Random(i + 100 * kind), i))
                for i in range(60)
            ]
            path = write_rows(tmp_path / f"{('first', 'second')[kind]}.jsonl", rows)
            sources.append({"path": str(path), "weight": [1, 0][kind] if name == "both" else 1})
        root = f"run.root={tmp_path / 'runs'}"
        data = "stage=data", f"stage.sources={json.dumps(sources)}", "data.held_out=0.3", f"run.name={name}", root
        assert shop.run_command(*data) == 0, shop.output
        assert shop.run_command(*SFT, f"model.path={tiny_model}", f"data.path=data:{name}", root) == 0, shop.output
        losses[name] = read_manifest(folder := Path(shop.output.splitlines()[-1])).metrics
        if name == "both":
            assert "Held-out loss by source" in (folder / "report.html").read_text(encoding="utf-8")
            assert re.search(r"^  second: [\d.]+ → ", shop.output, re.MULTILINE)
    by_source = losses["both"]["loss_by_source"]
    assert {name: figures["before"] for name, figures in by_source.items()} == pytest.approx(
        {name: losses[name]["loss_before"] for name in ("first", "second")}, abs=1e-6
    )
    assert "loss_by_source" not in losses["first"]
    n_tokens = {name: losses[name]["held_out_tokens"] for name in ("first", "second")}
    mean = sum(by_source[name]["after"] * n for name, n in n_tokens.items()) / sum(n_tokens.values())
    assert losses["both"]["loss_after"] == pytest.approx(mean, abs=1e-6)
    assert losses["both"]["train_rows"] == losses["first"]["train_rows"]  # the second has weight 0
