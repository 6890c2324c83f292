"""What is compared: the quickstart's pairs, the methods, and the settings of each."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "run.sh"
MADE_FIRST = ("sft", "sample", "annotate", "reward")
"""The stages of the recipe that all methods share."""
TUNED_ON, REPORTED = 3, (0, 1, 2)
"""Seeds. Another seed has another supervised model, other rankings, another reward model and other held-out prompts."""
SPLIT = "stage=ppo stage.schedule=linear stage.epochs=1 stage.minibatches=4 stage.micro_batch=16"
PAIRS = "data=annotations data.allow_simulated=true"
RATES = ("5e-4", "1e-3", "2e-3")


@dataclass(frozen=True)
class Method:
    """Attributes:
    words: of its line, without what follows.
    length, short: the setting that says how long it learns, and one for a few steps.
    price: the setting that says what a nat of KL costs.
    prices: those that are reported; the last one is also the one that learning rates are tuned at.
    rates: the learning rates that are tried, as many for each method.
    """

    name: str
    words: str
    length: str
    short: str
    price: str
    prices: tuple[str, ...]
    rates: tuple[str, ...] = RATES

    @property
    def stage(self) -> str:
        return self.words.split()[0].removeprefix("stage=")

    def line(self, rate: str, price: str, short: bool = False) -> list[str]:
        length = self.short if short else self.length
        return [*self.words.split(), length, f"stage.lr={rate}", f"stage.{self.price}={price}"]

    def row(self, price: str) -> str:
        return f"{self.name} {self.price} {price}"

    def run_name(self, rate: str, price: str) -> str:
        return f"{self.name.lower()}-lr{rate}-{self.price.replace('_', '')}{price}"


METHODS = (
    Method("DPO", f"stage=dpo {PAIRS}", "stage.epochs=0.05", "stage.epochs=0.001", "beta", ("0.3", "0.1")),
    Method(
        "KTO", f"stage=kto {PAIRS}", "stage.epochs=0.02", "stage.epochs=0.001", "beta", ("0.3", "0.1"),
        ("1e-4", "2e-4", "5e-4"),  # from 1e-3 on it moves 16 nats and more
    ),
    Method("PPO", SPLIT, "stage.updates=22", "stage.updates=2", "kl_coef", ("0.1", "0.05")),
    Method(
        "RLOO", f"{SPLIT} stage.advantage=rloo stage.group_size=4", "stage.updates=40", "stage.updates=2", "kl_coef",
        ("0.1", "0.05"),
    ),
    Method(
        "GRPO", f"{SPLIT} stage.advantage=grpo stage.group_size=8", "stage.updates=45", "stage.updates=2", "kl_coef",
        ("0.25", "0.125"),
    ),
)  # fmt: skip
"""About three minutes of one processor each. GRPO's price is in the loss, beside advantages of variance 1: 0.125 there
is what 0.05 is beside scores whose standard deviation is 0.4."""


def common(root: Path, seed: int, dtype: str) -> list[str]:
    """The words that every run of a seed has."""
    return [
        f"seed={seed}", f"run.root={root / str(seed)}", "project=quickstart", f"dtype={dtype}",
        "rollout.max_new_tokens=24",
    ]  # fmt: skip


def best_of(n: int, prompts: Path) -> list[str]:
    """The words of best-of-n by the reward model, on a file of prompts."""
    rows = ["data=files", f"data.path={prompts}", "data.held_out=0"]
    return ["stage=sample", f"stage.best_of={n}", "stage.gold={name: sentiment}", "reward=learned", *rows]


def of_recipe(stage: str, seed: int) -> list[str]:
    """The words of the quickstart's line for a stage."""
    text = RECIPE.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if f" stage={stage} " in line)
    return shlex.split(line.removeprefix("$common").replace("$named", named(text, seed)))


def named(text: str, seed: int) -> str:
    """What the recipe's `case` makes of `$named`, which has a value before it."""
    before = re.search(r'^named="(.*)"$', text, re.MULTILINE)
    cases = re.findall(r'^ *(\S+)\) (?:(named=)"(.*)" )?;;$', text, re.MULTILINE)
    given, value = next((given, value) for pattern, given, value in cases if pattern in (str(seed), "*"))
    return value if given or before is None else before[1]
