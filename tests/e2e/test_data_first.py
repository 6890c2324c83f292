"""Data is read before weights are: a row that cannot be read costs nobody the loading of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusing import CHATS, readers
from workshop import Ready, Workshop

from align.models import load


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


def weights_are_read(*given: object, **more: object) -> None:
    raise AssertionError("weights are read")


@pytest.mark.parametrize("stage", ["sft", "full", "sample", "eval", "ppo", "reward", "dpo", "kto"])
def test_a_broken_row_is_said_before_weights_are_read(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: Any, stage: str
) -> None:
    path, pairs = tmp_path / "rows.jsonl", stage in ("reward", "dpo", "kto")
    words = readers(ready, tiny_model, path).get(stage) or [
        f"stage={stage}", "init=sft:s", "data=jsonl", f"data.path={path}", "stage.held_out=0.3", *CHATS[1:3],
    ]  # fmt: skip
    pair = {"chosen": "hello there", "rejected": "go away"}
    good = [json.dumps({"prompt": f"hello {i}"} | pair) for i in range(40)] if pairs else chats.read_text().splitlines()
    broken = [*good[:-1], '{"messages": 3']
    for rows, status, said in ((good, 1, "weights are read"), (broken, 2, f"rows.jsonl, row {len(good)}=")):
        path.write_text("\n".join(rows) + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(load, "check_file", weights_are_read)
            assert shop.ended(*words, f"run.root={shop.root}", "device=cpu", "resume=never") == status, shop.said
        assert said in shop.said, shop.said
