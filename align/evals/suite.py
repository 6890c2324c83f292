"""A suite that is ready to be asked: systems that were found, and the items of its tasks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from align.data.trained_ids import Seen
from align.errors import require
from align.evals.gates import Gate
from align.evals.judge_report import JudgeReport
from align.evals.llm_judge import LLMJudge
from align.evals.systems import System
from align.evals.tasks import Item, Task

Tasks = Sequence[tuple[Task, Sequence[Item]]]


@dataclass(frozen=True, slots=True)
class Work:
    """
    Attributes:
        tasks: each with its items.
        files: system of a file → task and id of an item → its answers, one a turn.
        seen: task → items that were left out, because some system was trained on them.
        unknown: what is not known of the systems' training, a sentence each.
        judge: of tasks without checks, as `stage.judge` names it.
        cards: gate → the card of the judge that decides it; of those that a judge decides.
    """

    systems: Sequence[System]
    tasks: Tasks
    files: Mapping[str, Mapping[tuple[str, str], Sequence[str]]]
    seen: Mapping[str, int]
    unknown: Sequence[str] = ()
    gates: Sequence[Gate] = ()
    judge: Literal["reward", "people"] | LLMJudge = "reward"
    cards: Mapping[str, JudgeReport] = field(default_factory=dict)


def unseen(tasks: Tasks, seen: Sequence[Seen]) -> tuple[Tasks, dict[str, int]]:
    """The items that no system was trained on; and how many are left out, by task.

    Raises:
        InputError: nothing is left of a task.
    """
    found, counts = list[tuple[Task, Sequence[Item]]](), dict[str, int]()
    for task, items in tasks:
        kept = [item for item in items if not any(one.asks(item.prompt.messages) for one in seen)]
        problem = "leaves nothing to ask: some system was trained on every item"
        require(bool(kept), "stage.seen", f"drop, {task.name}", problem, "Give other prompts.")
        found.append((task, kept))
        counts[task.name] = len(items) - len(kept)
    return found, counts
