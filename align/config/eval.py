"""Settings of `stage=eval`, which compares an artifact with the model it was trained from, or several models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import Settings, setting
from align.core.errors import require


@dataclass
class EvalConfig(Settings):
    """Compares an artifact's answers with those of the model it started from, or the first of several systems with each
    other one. The judge is `reward=`, by default VADER's sentiment. A judge that has a part in common with the reward
    that the policy was optimised against is refused."""

    AT: ClassVar[str] = "stage"

    name: str = "eval"
    systems: Any = setting(
        None,
        "Who answers, by name, such as {new: ppo:latest, old: @production, base: base, theirs: {file: answers.jsonl}}; "
        "{url: http://127.0.0.1:8000/v1, model: NAME} is a model behind a server. "
        "The first is compared with each other one; a single one is only scored. "
        "Empty: `artifact` and what it started from.",
    )
    first: str = setting(
        "",
        "The system that is compared with the others and that gates are about. Empty: the first of `systems`.",
    )
    judge: Any = setting(
        "reward",
        "Who scores the answers of tasks without checks: the scorer of `reward=` (reward); people in a project of the "
        "annotation app (people); or a language model behind an OpenAI-compatible server, such as {url: "
        "http://127.0.0.1:8000/v1, model: NAME, key_env: VARIABLE}, which is asked about each pair of answers in both "
        "orders, or the question of a task with `asks` about each answer. With `price: {prompt: 0.15, completion: "
        "0.6}`, for a million tokens, the run reports its cost.",
    )
    card: Any = setting(
        "",
        "The judge's card: a run of eval=judge, such as eval:NAME. Gates on tasks that a judge scores require it. If "
        "the judge compares answers and also answers questions about them, give a list with one card for each use.",
        names="card",
    )
    votes: int | None = setting(
        None,
        "Number of votes that `judge=people` asks for, in all. Empty: one on each pair, and a second person's on a "
        "fifth of them.",
        above=0,
    )
    gold: str | None = setting(
        None,
        "A file of pairs whose better answer is known (`expected`), for judge=people. They are mixed with the other "
        "pairs, to measure how often people choose the known answer.",
    )
    level: float = setting(0.95, "Confidence level of the intervals for systems and judges.", above=0.5, below=1)
    answers: int = setting(
        1,
        "Number of answers to each prompt. Intervals and tests treat the answers to one prompt as one observation.",
        above=0,
    )
    allow_code: bool = setting(False, "Run the code that answers hold, for tasks that check it by unit tests.")
    unsafe_code: bool = setting(
        False,
        "Run that code also on a machine that has no sandbox for it: neither bubblewrap nor namespaces nor Landlock.",
    )
    prompts: int = setting(256, "Number of held-out prompts that both models answer.", above=0)
    seen: str = setting(
        "drop",
        "What happens to prompts that the artifact was trained on. `drop`: they are left out. `report`: they are "
        "asked too, and the report also has the figures without them.",
        choices=("drop", "report"),
    )
    shown: int = setting(12, "Number of answer pairs in the report.", above=0)
    near: float | None = setting(
        0.7,
        "Jaccard similarity of word 3-grams from which a prompt counts as nearly the same as a training prompt, with "
        "`systems`. Such prompts are asked, and their results are also reported separately. Null: near-duplicates are "
        "not looked for.",
        above=0,
        at_most=1,
    )
    allow_proxy: bool = setting(
        False, "Accept a judge that the policy was optimised against. Its score is then called a proxy."
    )

    def check_together(self) -> None:
        if isinstance(self.systems, Mapping) and self.systems:
            # The run's identity ignores the order of a mapping, so the first system is made explicit.
            object.__setattr__(self, "first", self.first or str(next(iter(self.systems))))
            remedy = f"They are {', '.join(map(str, self.systems))}."
            require(self.first in self.systems, "stage.first", self.first, "is none of the systems", remedy)
        elif self.systems is None:
            problem = "applies to several systems, and stage.systems is not set"
            require(not self.first, "stage.first", self.first, problem, "Add stage.systems={new: …, old: …}.")
