"""Settings of `stage=plan`, which predicts the memory, disk space and time of another stage's command line."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, ClassVar

from align.config.settings import Settings, setting

PLANNED = ("sft", "full", "reward", "ppo", "dpo", "kto")
"""Names of the stages whose memory `stage=plan` can predict."""


@dataclass
class PlanKeys(Settings):
    """The keys of `stage=plan` itself. All other keys of its line are those of the stage that `stage.of` names."""

    AT: ClassVar[str] = "stage"

    of: str = setting("ppo", f"The stage that is planned: {', '.join(PLANNED)}. It is a choice of the group `stage`.")
    measure: bool = setting(
        False,
        "Load the model, run a worst-case step, and print the bytes of live tensors beside the prediction.",
    )
    card: float | None = setting(
        None,
        "Memory of the GPU that the stage is planned for. Empty: all common cards are listed.",
        unit="GB",
        above=0,
        at_most=100_000,
    )
    throughput: float | None = setting(
        None,
        "Training speed over whole steps, as measured in an earlier run; for PPO, count only the tokens of responses. "
        "Empty: no time is predicted.",
        unit="tokens a second",
        at_least=0.001,
        at_most=1e9,
    )
    answers: int = setting(2, "Answers of a ranking, for stage.of=reward. A pair is a ranking of two.", at_least=2)


@dataclass
class PlanConfig(PlanKeys):
    """Predicts what a stage takes, before anything is loaded: memory by role and phase, the cards it fits on, disk and
    time. It makes no run. All other keys of the line, `stage.` too, are those of the stage that `stage.of` names, and
    are checked as that stage checks them."""

    name: str = "plan"


@cache
def build_plan_schema(schema: type[Settings]) -> type[Any]:
    """Create a settings class that has the keys of a stage's settings class and the keys of `stage=plan`."""
    return make_dataclass(f"PlanOf{schema.__name__}", [], bases=(PlanKeys, schema))
