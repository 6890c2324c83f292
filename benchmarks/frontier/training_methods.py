"""The methods that the frontier compares, with their settings, and the settings that all runs share."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

RECIPE_PATH = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "run.sh"
SHARED_STAGES = ("sft", "sample", "annotate", "reward")
"""The stages of the recipe whose results all methods use."""
TUNING_SEED = 3
REPORTED_SEEDS = (0, 1, 2)
"""A seed changes the supervised model, the rankings, the reward model and the held-out prompts."""
PPO_OVERRIDES = "stage=ppo stage.schedule=linear stage.epochs=1 stage.minibatches=4 stage.micro_batch=16"
PAIR_OVERRIDES = "data=annotations data.allow_simulated=true"
LEARNING_RATES = ("5e-4", "1e-3", "2e-3")


@dataclass(frozen=True)
class Method:
    """A training method and the settings that it is run with.

    Attributes:
        name: in the table.
        overrides: of its command line, without length, learning rate and KL coefficient.
        length: the setting for a full run.
        short_length: the setting for a run of a few steps.
        kl_key: the setting that penalises KL, `beta` or `kl_coef`.
        kl_values: its values that are reported. Learning rates are tuned at the last one.
        learning_rates: those that are tried, the same number for each method.
    """

    name: str
    overrides: str
    length: str
    short_length: str
    kl_key: str
    kl_values: tuple[str, ...]
    learning_rates: tuple[str, ...] = LEARNING_RATES

    @property
    def stage(self) -> str:
        return self.overrides.split()[0].removeprefix("stage=")

    def build_overrides(self, learning_rate: str, kl_value: str, short: bool = False) -> list[str]:
        """Return the command-line overrides of a run."""
        length = self.short_length if short else self.length
        return [*self.overrides.split(), length, f"stage.lr={learning_rate}", f"stage.{self.kl_key}={kl_value}"]

    def row_name(self, kl_value: str) -> str:
        return f"{self.name} {self.kl_key} {kl_value}"

    def run_name(self, learning_rate: str, kl_value: str) -> str:
        return f"{self.name.lower()}-lr{learning_rate}-{self.kl_key.replace('_', '')}{kl_value}"


METHODS = (
    Method("DPO", f"stage=dpo {PAIR_OVERRIDES}", "stage.epochs=0.05", "stage.epochs=0.001", "beta", ("0.3", "0.1")),
    Method(
        "KTO",
        f"stage=kto {PAIR_OVERRIDES}",
        "stage.epochs=0.02",
        "stage.epochs=0.001",
        "beta",
        ("0.3", "0.1"),
        ("1e-4", "2e-4", "5e-4"),  # from 1e-3 on its KL is 16 nats and more
    ),
    Method("PPO", PPO_OVERRIDES, "stage.updates=22", "stage.updates=2", "kl_coef", ("0.1", "0.05")),
    Method(
        "RLOO",
        f"{PPO_OVERRIDES} stage.advantage=rloo stage.group_size=4",
        "stage.updates=40",
        "stage.updates=2",
        "kl_coef",
        ("0.1", "0.05"),
    ),
    Method(
        "GRPO",
        f"{PPO_OVERRIDES} stage.advantage=grpo stage.group_size=8",
        "stage.updates=45",
        "stage.updates=2",
        "kl_coef",
        ("0.25", "0.125"),
    ),
)
"""Each takes about three minutes of one processor. GRPO's coefficient weighs KL in the loss, against advantages of
variance 1: 0.125 there is what 0.05 is against scores with a standard deviation of 0.4."""


def build_shared_overrides(root: Path, seed: int, dtype: str) -> list[str]:
    """Return the overrides that every run of a seed has."""
    return [
        f"seed={seed}",
        f"run.root={root / str(seed)}",
        "project=quickstart",
        f"dtype={dtype}",
        "rollout.max_new_tokens=24",
    ]


def build_best_of_overrides(n: int, prompts_path: Path) -> list[str]:
    """Return the overrides of best-of-n by the reward model, on a file of prompts."""
    return [
        "stage=sample",
        f"stage.best_of={n}",
        "stage.gold={name: sentiment}",
        "reward=learned",
        "data=files",
        f"data.path={prompts_path}",
        "data.held_out=0",
    ]


def read_recipe_overrides(stage: str, seed: int) -> list[str]:
    """Return the overrides of the quickstart recipe's line for a stage."""
    script = RECIPE_PATH.read_text(encoding="utf-8")
    line = next(line for line in script.splitlines() if f" stage={stage} " in line)
    return shlex.split(line.removeprefix("$common").replace("$named", evaluate_named(script, seed)))


def evaluate_named(script: str, seed: int) -> str:
    """Return the value that the recipe's `case` gives to `$named` for a seed. An empty branch keeps the default."""
    default = re.search(r'^named="(.*)"$', script, re.MULTILINE)
    branches = re.findall(r'^ *(\S+)\) (?:(named=)"(.*)" )?;;$', script, re.MULTILINE)
    assignment, value = next(
        (assignment, value) for pattern, assignment, value in branches if pattern in (str(seed), "*")
    )
    return value if assignment or default is None else default[1]
