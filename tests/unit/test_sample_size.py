"""Warnings on evaluations with too few prompts: they name the setting that limits the number."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.groups import DataConfig
from align.stages.eval.artifact import MIN_PROMPTS, explain_few_prompts

FILE = DataConfig(name="jsonl", path="chats.jsonl")


def test_enough_prompts_need_no_word():
    assert explain_few_prompts(MIN_PROMPTS, FILE, 256) == ""
    assert explain_few_prompts(256, FILE, 256, seen=40, too_long=3) == ""


@pytest.mark.parametrize(
    ("measured", "data", "most", "counts", "named"),
    [
        (12, FILE, 256, {}, "data.held_out=0.05 holds out too few questions of chats.jsonl"),
        (12, FILE, 12, {}, "stage.prompts=12 limits the number"),
        (12, DataConfig(name="jsonl", path="chats.jsonl", limit=12), 256, {}, "data.limit=12 limits the number"),
        (12, DataConfig(name="jsonl", path="c.jsonl", eval_path="e.jsonl"), 256, {}, "eval_path=e.jsonl has too few"),
        (
            12,
            DataConfig(name="manifest", path="data:latest"),
            256,
            {},
            "the data set data:latest has too few held-out questions",
        ),
        (12, DataConfig(), 256, {}, "data.held_out=0.05 holds out too few questions of chitchat"),
        (12, FILE, 256, {"seen": 60}, "stage.seen=drop left out 60 prompts"),
        (12, FILE, 256, {"seen": 9}, "data.held_out=0.05"),
        (12, FILE, 256, {"too_long": 60}, "60 prompts did not fit. Raise data.max_length=1024"),
        (12, FILE, 20, {"too_long": 8}, "stage.prompts=20 limits the number"),
        (1, FILE, 256, {}, "it is measured on 1 prompt, and at least 64 are needed"),
    ],
)
def test_the_cause_is_named(measured: int, data: DataConfig, most: int, counts: dict[str, Any], named: str):
    text = explain_few_prompts(measured, data, most, **counts)
    assert text.startswith("this result is no basis for a decision: it is measured on ")
    assert named in text
