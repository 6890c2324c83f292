"""Probes of an engine: its logprobs of some prompts, compared with those of the adapter that it was given.

Engines pass over in silence what they do not find or do not read. An adapter that is not in force answers like the
base, and one that took another's name answers like that one.
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
"""The file of an exported adapter that holds them."""
SHARE = 0.25
CERTAIN = 3.0
"""How far the share of an adapter that is in force may lie from 1; and in how many standard errors."""
FEWEST = 32
"""Tokens of all rows. Few could be chosen so that they tell nothing; the fixed prompts have hundreds."""
NOT_BY_THIS = "Do not serve it by this engine. The engine's log says what it made of it."
REMEDY = "Export it again, or remove this file: what the adapter says is then computed anew."

Logprobs = Sequence[Sequence[float]]
"""Of each token of a row but the first, given those before it, in nats; one sequence a row."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Prompts that an engine is asked, and the logprobs that it must give.

    Attributes:
        rows: token ids, at least two a row.
        adapter: by the adapter.
        base: by the base without it; the same of a base that is probed.
    """

    rows: Sequence[Sequence[int]]
    adapter: Logprobs
    base: Logprobs

    @classmethod
    def of_base(cls, rows: Sequence[Sequence[int]], base: Logprobs) -> Probes:
        return cls(rows, base, base)


class Agreement(NamedTuple):
    """The distance of an engine from what was trained.

    Attributes:
        gap: mean distance of a token's logprob, in nats.
        share: how much of the adapter is in force: 1 for all of it, 0 for the base. What moves from the base to the
            adapter, projected on what should move. nan where nothing should.
        error: its standard error.
    """

    gap: float
    share: float
    error: float


def agreement(found: Logprobs, found_base: Logprobs, probes: Probes) -> Agreement:
    """Args:
    found, found_base: what the engine says by the adapter, and by its base.
    """
    engine_logprobs, said_base, trained_logprobs, base = (
        np.array([value for row in rows for value in row], float)
        for rows in (found, found_base, probes.adapter, probes.base)
    )
    moved = engine_logprobs - said_base
    should = trained_logprobs - base
    gap = float(np.abs(engine_logprobs - trained_logprobs).mean())
    length = float(should @ should)
    if length == 0:
        return Agreement(gap, float("nan"), float("inf"))
    share = float(moved @ should) / length
    residual = moved - share * should
    return Agreement(gap, share, float(np.sqrt((residual @ residual) / len(residual) / length)))


def describe_agreement(agreed: Agreement) -> str:
    share = ""
    if CERTAIN * agreed.error <= SHARE:
        share = f"{agreed.share:.1%} ± {agreed.error:.1%} of the adapter is in force, "
    elif not np.isnan(agreed.share):
        share = "it says too little else than the base to be told from it, "
    return f"{share}{agreed.gap:.2g} nats from what was trained"


def check_agreement(agreed: Agreement, dtype: str, field: str, name: str, remedy: str = NOT_BY_THIS) -> None:
    """Args:
        dtype: that the engine computes in.
        field, name: what the adapter is called.
        remedy: what to do if it is not.

    Raises:
        InputError: the engine serves something else than was trained.
    """
    off = abs(agreed.share - 1)
    most = max(SHARE, CERTAIN * agreed.error)
    if off > most:  # not so where it is nan
        problem = f"{agreed.share:.0%} of the adapter is in force in the engine, where 100 % should be"
        raise InputError(field, name, problem, remedy)
    problem = f"the engine's logprobs are {agreed.gap:.2g} nats from those that were trained, on the mean"
    require(agreed.gap <= WITHIN[dtype], field, name, f"{problem}; in {dtype} {WITHIN[dtype]:g} may be", remedy)


def write_probes(folder: Path, probes: Probes, adapter: str, base: str) -> None:
    """Beside an adapter.

    Args:
        adapter, base: their digests.
    """
    about = {"adapter_digest": adapter, "base_digest": base}
    write_json(folder / PROBES, {**about, "rows": probes.rows, "adapter": probes.adapter, "base": probes.base})


def read_probes(folder: Path, adapter: str, base: str) -> Probes | None:
    """Return the probes beside an adapter; None if it has none.

    Raises:
        CorruptFile: the file holds something else, or is of another adapter or base.
    """
    if not (folder / PROBES).is_file():
        return None
    content = read_json_object(folder / PROBES, PROBES, REMEDY)
    if (content.get("adapter_digest"), content.get("base_digest")) != (adapter, base):
        raise CorruptFile("file", PROBES, "is of another adapter or base", REMEDY)
    rows, by_adapter, by_base = (lists_in(content.get(name)) for name in ("rows", "adapter", "base"))
    tokens = all(len(row) > 1 and all(type(id) is int and id >= 0 for id in row) for row in rows)
    logprobs = all(type(value) is float and math.isfinite(value) for row in by_adapter + by_base for value in row)
    sizes = [[len(row) for row in part] for part in (by_adapter, by_base)]
    fit = all(size == [len(row) - 1 for row in rows] for size in sizes)
    if not (sum(map(len, rows)) >= FEWEST and tokens and logprobs and fit):
        raise CorruptFile("file", PROBES, "holds no rows of tokens with their logprobs", REMEDY)
    return Probes(rows, by_adapter, by_base)


def lists_in(value: object) -> list[list[Any]]:
    """Return what may be rows; nothing if it is no list of lists."""
    return value if isinstance(value, list) and all(isinstance(row, list) for row in value) else []
