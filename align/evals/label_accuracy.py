"""How well something that was trained on labels tells wanted answers from unwanted ones that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from align.core.types import Conversation, Feedback
from align.data.split import question_key
from align.evals.pair_accuracy import pref_text
from align.ops.auc import auc
from align.run import write_text
from align.track import line_of


def label_figures(answers: Sequence[Feedback], rewards_N: Tensor) -> dict[str, Any]:
    """`auc`: how often a wanted answer has a higher reward than an unwanted one, with its interval over prompts.
    Nothing where all have one label."""
    wanted = [one.label for one in answers]
    if len(set(wanted)) < 2:
        return {}
    prompts = [question_key(Conversation(one.prompt)) for one in answers]
    return {"auc": auc(rewards_N.tolist(), wanted, prompts).as_dict()}


def write_held_out_answers(path: Path, answers: Sequence[Feedback], rewards_N: Tensor) -> None:
    """`held_out.jsonl`: every held-out answer with its label and its reward, one JSON object a line."""
    rows = [
        {
            "id": one.id, "prompt": [message.as_dict() for message in one.prompt], "answer": pref_text(one.completion),
            "label": one.label, "reward": reward,
        }
        for one, reward in zip(answers, rewards_N.tolist(), strict=True)
    ]  # fmt: skip
    write_text(path, "".join(map(line_of, rows)))
