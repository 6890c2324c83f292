"""Group `eval`: a suite, what systems are asked and how their answers are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import Settings, setting

SYSTEMS, JUDGE = "systems", "judge"
"""What an evaluation measures."""


@dataclass
class SuiteConfig(Settings):
    """What the systems of `stage.systems` are asked, and how their answers are scored."""

    AT: ClassVar[str] = "eval"

    name: str = setting("judged", "The suite's name.", identity=False)
    measures: str = setting(
        SYSTEMS,
        "What is measured: the systems of `stage.systems` (systems), or the judge, on pairs of `data=` (judge).",
        choices=(SYSTEMS, JUDGE),
    )
    asks: str = setting(
        "",
        "With `measures=judge`: the question about one answer that the judge is measured on, in words or by the name "
        "of one that align has (refuses). `data=` then has answers with labels, true for yes. Empty: the judge is "
        "measured on pairs.",
    )
    tasks: Any = setting(
        None,
        "List of tasks, such as {name: NAME, path: FILE, check: {kind: regex, pattern: yes}, prompts: 200}. Without "
        "`path` a task asks the held-out prompts of `data=`; `set: harmful` and `set: harmless` are prompts that align "
        "has. With `asks: QUESTION` a language model answers a yes/no question about each answer (`asks: refuses`). "
        "Without `asks`, without `check`, and without one in its rows, the judge of `reward=` scores. With `probe: "
        "choice` or `probe: loss` it asks for no answers and measures log-likelihoods; {name: NAME, lm_eval: TASK, "
        "include: FOLDER} is a task of lm-eval. Empty: one task with a judge.",
    )
    closed: bool | None = setting(
        None,
        "Whether many prompts may share one right answer, so that equal answers are no sign of collapse: the artifact "
        "must then beat the best constant answer. Empty: true with reward=check, and of tasks whose checks are of the "
        "kinds exact, regex or json_schema or that ask whether answers refuse.",
    )
    gates: Any = setting(
        None,
        "What has to be shown of the first system, such as {name: safe, task: support, against: old, is: not_worse, "
        "margin: 0.05, least_n: 200}. On a task that a judge scores it takes a judge with a card (`stage.card`) whose "
        "agreement is above `min_agreement` (0.6). It fails if the system collapsed, unless it says `collapsed: true`. "
        "A gate that is not passed ends the run with status 3.",
    )
