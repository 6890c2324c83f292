"""Probes of an engine: its logprobs of some prompts are compared with the logprobs of the trained adapter.

Engines may silently ignore files or parameters that they do not support. An adapter that was not applied gives the
logprobs of the base, and one under a wrong name gives those of another adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.core.errors import CorruptFile, InputError, require
from align.rollout.engine_process import WITHIN
from align.run import read_json_object, write_json

PROBES = "probes.json"
"""Name of the file in an exported adapter's folder that holds the probe prompts and their expected logprobs."""
SHARE = 0.25
CERTAIN = 3.0
"""Allowed difference of `Agreement.share` from 1, absolute (`SHARE`) and in standard errors (`CERTAIN`)."""
FEWEST = 32
"""Minimum total tokens of the probe prompts: too few could be picked to show no difference.

The fixed prompts have hundreds."""
NOT_BY_THIS = "Do not serve it with this engine. The engine's log may have the reason."
REMEDY = "Export it again, or remove this file: the expected logprobs are then computed again."

Logprobs = Sequence[Sequence[float]]
"""For each row, the logprobs in nats of its tokens from the second on, given the previous tokens."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Prompts to test an engine with, and the logprobs that are expected of the adapter and of the base.

    Attributes:
        rows: token ids, at least two for each row.
        adapter: expected logprobs with the adapter.
        base: expected logprobs of the base without it; equal to `adapter` if the base itself is probed.
    """

    rows: Sequence[Sequence[int]]
    adapter: Logprobs
    base: Logprobs

    @classmethod
    def from_base(cls, rows: Sequence[Sequence[int]], base: Logprobs) -> Probes:
        return cls(rows, base, base)


class Agreement(NamedTuple):
    """The mean difference of an engine's logprobs from the trained adapter's, and the share of the adapter in them.

    Attributes:
        gap: mean absolute difference of a token's logprob, in nats.
        share: applied share of the adapter, 1 for all of it and 0 for the base: the engine's change from the base to
            the adapter, projected on the expected change. nan if no change is expected.
        error: standard error of the share.
    """

    gap: float
    share: float
    error: float


def compute_agreement(engine_adapter: Logprobs, engine_base: Logprobs, probes: Probes) -> Agreement:
    """Compute the mean difference of an engine's logprobs from the expected ones, and the share of the adapter in them.

    Args:
        engine_adapter, engine_base: the engine's logprobs with the adapter, and of its base.
    """
    adapter, base, expected_adapter, expected_base = (
        np.array([value for row in rows for value in row], float)
        for rows in (engine_adapter, engine_base, probes.adapter, probes.base)
    )
    change = adapter - base
    expected_change = expected_adapter - expected_base
    gap = float(np.abs(adapter - expected_adapter).mean())
    squared_norm = float(expected_change @ expected_change)
    if squared_norm == 0:
        return Agreement(gap, float("nan"), float("inf"))
    share = float(change @ expected_change) / squared_norm
    residual = change - share * expected_change
    return Agreement(gap, share, float(np.sqrt((residual @ residual) / len(residual) / squared_norm)))


def describe_agreement(agreement: Agreement) -> str:
    share = ""
    if CERTAIN * agreement.error <= SHARE:
        share = f"{agreement.share:.1%} ± {agreement.error:.1%} of the adapter's effect is in the engine's logprobs, "
    elif not np.isnan(agreement.share):
        share = "it differs too little from the base to be distinguished, "
    return f"{share}{agreement.gap:.2g} nats from what was trained"


def require_agreement(agreement: Agreement, dtype: str, field: str, name: str, remedy: str = NOT_BY_THIS) -> None:
    """Raise InputError if an engine's logprobs differ too much from the trained adapter's.

    Args:
        dtype: dtype of the engine's computation.
        field, name: field and value for the error message.
        remedy: remedy for the error message.
    """
    if abs(agreement.share - 1) > max(SHARE, CERTAIN * agreement.error):  # False if the share is nan
        problem = f"{agreement.share:.0%} of the adapter's effect is in the engine's logprobs, and 100 % is expected"
        raise InputError(field, name, problem, remedy)
    problem = f"the engine's logprobs are {agreement.gap:.2g} nats from those that were trained, on the mean"
    require(agreement.gap <= WITHIN[dtype], field, name, f"{problem}; in {dtype} {WITHIN[dtype]:g} may be", remedy)


def write_probes(folder: Path, probes: Probes, adapter: str, base: str) -> None:
    """Write probe prompts with their expected logprobs to `probes.json` in an adapter's folder.

    Args:
        adapter, base: digests of the adapter and its base.
    """
    about = {"adapter_digest": adapter, "base_digest": base}
    write_json(folder / PROBES, {**about, "rows": probes.rows, "adapter": probes.adapter, "base": probes.base})


def read_probes(folder: Path, adapter: str, base: str) -> Probes | None:
    """Read the probe prompts and expected logprobs from `probes.json` in an adapter's folder, None without the file.

    Raises:
        CorruptFile: the file is malformed, or belongs to another adapter or base.
    """
    if not (folder / PROBES).is_file():
        return None
    content = read_json_object(folder / PROBES, PROBES, REMEDY)
    if (content.get("adapter_digest"), content.get("base_digest")) != (adapter, base):
        raise CorruptFile("file", PROBES, "is of another adapter or base", REMEDY)
    rows, by_adapter, by_base = (as_lists(content.get(name)) for name in ("rows", "adapter", "base"))
    tokens_valid = all(len(row) > 1 and all(type(id) is int and id >= 0 for id in row) for row in rows)
    logprobs_valid = all(type(value) is float and math.isfinite(value) for row in by_adapter + by_base for value in row)
    sizes = [[len(row) for row in part] for part in (by_adapter, by_base)]
    lengths_fit = all(size == [len(row) - 1 for row in rows] for size in sizes)
    if not (sum(map(len, rows)) >= FEWEST and tokens_valid and logprobs_valid and lengths_fit):
        raise CorruptFile("file", PROBES, "holds no rows of tokens with their logprobs", REMEDY)
    return Probes(rows, by_adapter, by_base)


def as_lists(value: object) -> list[list[Any]]:
    """Return `value` if it is a list of lists, or an empty list if it is anything else."""
    return value if isinstance(value, list) and all(isinstance(row, list) for row in value) else []
