"""Default learning rates: one table by stage, method and size of the base. docs/methods.md has the sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

RATED = ("sft", "full")
"""Names of the stages whose learning rate may come from `method.lr`."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """A class of base models by number of parameters, with its default learning rate for each stage.

    Attributes:
        below: upper bound of the number of weights, which is not in the class.
        title: description of the class.
        rates: column → rate. The columns are stages; `full` and `ppo full` train every weight, the others adapters.
            `value` is the critic's adapter and head.
    """

    below: float
    title: str
    rates: Mapping[str, float]


PUBLISHED = MappingProxyType(
    {
        "sft": 2e-4,
        "full": 2e-5,
        "reward": 1e-4,
        "dpo": 5e-6,
        "kto": 5e-6,
        "ppo": 1e-5,
        "ppo full": 1e-6,
        "value": 1e-4,
    }
)
"""Learning rates by column that are published for models of 1 to 8 billion parameters."""
MEASURED_ON_POCKET = MappingProxyType(
    {
        "sft": 2e-4,
        "full": 2e-5,
        "reward": 1e-3,
        "dpo": 1e-4,
        "kto": 1e-4,
        "ppo": 5e-4,
        "ppo full": 5e-5,
        "value": 1e-3,
    }
)
"""Learning rates by column that were measured on the built-in model `pocket` of 6.2 million parameters."""


def scale_rates(factor: float) -> Mapping[str, float]:
    """Return the published learning rates multiplied by a factor and rounded to two significant digits, by column."""
    return MappingProxyType({column: float(f"{factor * rate:.1e}") for column, rate in PUBLISHED.items()})


SIZE_CLASSES = (
    SizeClass(30e6, "fewer than 30 million weights, such as pocket", MEASURED_ON_POCKET),
    SizeClass(400e6, "30 to 400 million weights", scale_rates(3)),
    SizeClass(30e9, "400 million to 30 billion weights", PUBLISHED),
    SizeClass(math.inf, "30 billion weights or more", scale_rates(0.5)),
)
COLUMNS = tuple(PUBLISHED)
USUAL = SIZE_CLASSES[2]
"""The size class, 400 million to 30 billion parameters, that is assumed for a run without a base model."""


def find_size_class(weights: int | None) -> SizeClass:
    """Return the size class, with its default learning rates, of a base model with this number of parameters.

    Returns `USUAL` for None.
    """
    if weights is None:
        return USUAL
    return next(size for size in SIZE_CLASSES if weights < size.below)


def find_rate_column(stage: str, method: str) -> str | None:
    """Return the learning-rate table's column for a stage and method, or None for a stage without a learning rate.

    SFT of every weight, for example, has the column `full`.
    """
    stage = "ppo" if stage == "verify" else stage  # it checks PPO with the settings of PPO
    if method == "full" and stage in ("sft", "ppo"):
        return {"sft": "full", "ppo": "ppo full"}[stage]
    return stage if stage in COLUMNS else None


def find_default_rate(stage: str, method: str, weights: int | None) -> float | None:
    """Return the default learning rate of a stage and method for a base model of this size, or None if it has none.

    Args:
        stage: the stage's name, or `value` for PPO's critic.
        method: `lora` or `qlora` for an adapter, `full` for every weight.
        weights: number of the base's weights; None for a run without a base.
    """
    column = find_rate_column(stage, method)
    return None if column is None else find_size_class(weights).rates[column]


def describe_defaults(column: str) -> str:
    """Return a phrase with a stage's default learning rate for each size of base model, for help texts and docs.

    Args:
        column: of the table, see `find_rate_column`.
    """
    bounds = ("below 30 million weights", "below 400 million", "below 30 billion", "above that")
    rates = (f"{size.rates[column]:g} {bound}" for size, bound in zip(SIZE_CLASSES, bounds, strict=True))
    return ", ".join(rates)


def explain_empty_rate(stage: Any, method: str) -> str:
    """Return a YAML comment with the default learning rates if `stage.lr` is not set, otherwise an empty text.

    Also empty if the stage has no learning rate.

    Args:
        stage: the settings of the stage; None for a configuration without a stage.
    """
    column = find_rate_column(getattr(stage, "name", ""), method)
    if column is None or stage.lr is not None:
        return ""
    return (
        "# stage.lr is empty: the run sets it by the size of its base, which its first line names with the rate.\n"
        f"# {column}: {describe_defaults(column)} (docs/methods.md#learning-rates)\n"
    )


def format_rates_table() -> str:
    """Return the table of default learning rates by model size and stage as Markdown, for docs/methods.md."""
    lines = ["| the base has | " + " | ".join(f"`{column}`" for column in COLUMNS) + " |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for size in SIZE_CLASSES:
        lines.append(f"| {size.title} | " + " | ".join(f"{size.rates[column]:g}" for column in COLUMNS) + " |")
    return "\n".join(lines)
