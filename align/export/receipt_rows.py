"""The rows of a receipt, and whether they are good enough: what was exported, loaded back by each engine that will run
it, beside the model that was trained.

A check is one engine on one base: how far its next-token logprobs on fixed prompts lie from those of the trained model,
and the bound that this must keep. An engine that was not asked is a check too, and never a pass. The receipt itself is
`align.run.receipt`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from align.core.errors import CorruptFile, InputError
from align.report.figure_text import align_columns
from align.rollout.engine_process import TRANSFORMERS
from align.run.receipt import RECEIPT

if TYPE_CHECKING:
    from align.ops.divergence import Divergence

Bound = tuple[str, float]
"""A figure of `Divergence`, and the most that it may be."""

ALONE = "base alone"
"""What is no export, and measured as a yardstick."""
PASS, FAIL, ACCEPTED, REPORTED, UNCHECKED = "pass", "fail", "accepted", "reported", "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """One engine on one base.

    Attributes:
        engine: such as `transformers`.
        what: `adapter`, `merged` model, or the merge in fp32, `merge-before-cast`.
        base: `nf4`, `nf4-dequantised` or `original`: what the adapter was put on, or merged into.
        weights: the dtype of that base, or of the merged model, before the engine computes.
        version: of the engine; empty where it was not asked.
        found: None where the engine was not asked.
        bound: (figure of `found`, the most that it may be); None where it is only told.
        note: why it was not asked, or what to make of it.
        accepted: a bound that was missed and waved through by name.
        shipped: the files of the export were loaded, after their weights were cast. False of sums that are in no file
            of it: a merge before it was cast, a conversion to f32 beside it.
    """

    engine: str
    what: str = ""
    base: str = ""
    weights: str = ""
    version: str = ""
    found: Divergence | None = None
    bound: Bound | None = None
    note: str = ""
    accepted: bool = False
    shipped: bool = True

    @property
    def name(self) -> str:
        """By which `export.accept` knows it."""
        return "/".join(part for part in (self.engine, self.what, self.base, self.weights) if part)

    @property
    def verdict(self) -> str:
        if self.found is None:
            return UNCHECKED
        if self.bound is None:
            return REPORTED
        figure, most = self.bound
        whole = all(map(math.isfinite, (self.found.kl, self.found.top1, self.found.max_logprob)))
        if whole and getattr(self.found, figure) <= most:
            return PASS
        return ACCEPTED if self.accepted else FAIL

    def as_dict(self) -> dict[str, Any]:
        found = None if self.found is None else self.found.as_dict()
        return asdict(self) | {"found": found, "verdict": self.verdict, "name": self.name}


def first_measured(checks: Iterable[Check], shipped: bool) -> Check | None:
    """Return the first check that has a bound and was measured.

    Args:
        shipped: of the files of the export; False for what was measured before their weights were cast.
    """
    return next((c for c in checks if c.found is not None and c.bound is not None and c.shipped == shipped), None)


def differences_of(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the difference of the shipped files from the trained model, and that before the cast, each with the name
    of its check; None where it was not measured."""

    def figures(check: Check | None) -> dict[str, Any] | None:
        return None if check is None or check.found is None else {"check": check.name, **check.found.as_dict()}

    shipped = figures(first_measured(checks, shipped=True))
    return {"shipped": shipped, "before_cast": figures(first_measured(checks, shipped=False))}


def accepting(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    """The checks, those of these names with a missed bound waved through."""
    return [replace(check, accepted=check.name in names) for check in checks]


def require_passed(checks: Iterable[Check]) -> None:
    """Raises: InputError: a bound was missed and is not accepted."""
    failed = [check for check in checks if check.verdict == FAIL]
    if failed:
        missed = [
            f"{c.name}: {c.bound[0]} is {getattr(c.found, c.bound[0]):.3g}, which may be {c.bound[1]:g}"
            for c in failed
            if c.bound is not None
        ]
        names = ",".join(check.name for check in failed)
        remedy = f"It is not what was trained. To let it pass all the same: export.accept=[{names}]."
        raise InputError("export", f"{len(failed)} of the receipt's bounds missed", "; ".join(missed), remedy)


def require_asked(checks: Sequence[Check], accept: Sequence[str], require: Sequence[str]) -> None:
    """What was asked of the whole receipt. Raises: InputError: no check of an accepted name has a bound, or a required
    engine was not asked."""
    bound = {check.name: None for check in checks if check.bound is not None}
    for name in accept:
        if name not in bound:
            raise InputError("export.accept", name, "no such check has a bound", f"Those are {', '.join(bound)}.")
    for engine in require:
        if not any(check.engine == engine and check.found is not None and check.what != ALONE for check in checks):
            why = next((check.note for check in checks if check.engine == engine), "this version knows no such engine")
            remedy = "Install it, or leave it out of export.require."
            raise InputError("export.require", engine, f"it was not checked: {why}", remedy)


def gap_in(checks: Iterable[Check]) -> Divergence | None:
    """How far the adapter lies from what was trained on the original weights, where it was not trained on these."""
    wanted = (TRANSFORMERS, "adapter", "original", None)
    return next((c.found for c in checks if (c.engine, c.what, c.base, c.bound) == wanted), None)


def agreeing(receipt: dict[str, Any], checks: Sequence[Check], skipped: Container[str] = ()) -> None:
    """What a receipt claims, against what was measured again.

    Args:
        skipped: engines that nobody shall ask, whose claims are left alone.

    Raises:
        CorruptFile: it claims a measurement that was not made, or another result.
    """
    measured = {check.name: check.found for check in checks if check.found is not None}
    absent = {check.name for check in checks if check.found is None and check.what}  # for want of a base to put it on
    unasked = {check.engine: check.note for check in checks if check.found is None and not check.what}
    for check in receipt["rows"]:
        name, engine, claimed = str(check.get("name")), str(check.get("engine")), check.get("found")
        if (claimed is None and check.get("verdict") == UNCHECKED) or name in absent:
            continue
        if engine in unasked and engine in skipped:
            continue
        if name not in measured and check.get("weights") == "f32" and name.replace("/f32", "/f16") in measured:
            continue  # was asked only because f16 missed its bound on that machine, and does not on this
        slack = 0.05 if engine == TRANSFORMERS else 0.5  # of what is made of an engine's rounding
        found, remedy = measured.get(name), "Do not trust it: export again."
        if found is None and engine in unasked:
            problem = f"the receipt claims what was not measured here ({unasked[engine]})"
            remedy = "Do not trust it: export again, or check it where that engine can be asked."
        elif found is None:
            problem = "the receipt claims what was not measured here"
        elif not isinstance(claimed, dict) or not all(
            close(claimed.get(key), getattr(found, key), slack) for key in ("kl", "top1", "max_logprob")
        ):
            problem = "the receipt claims another result than was measured again"
        else:
            continue
        raise CorruptFile(RECEIPT, name, problem, remedy)


def close(claimed: Any, found: float, slack: float) -> bool:
    """Alike but for rounding on another machine."""
    return isinstance(claimed, float | int) and abs(claimed - found) <= max(1e-4, slack * abs(found))


MADE_ANEW = (
    "Made of the original weights, it is another model: `merge-before-cast`, `merged` and `adapter` on `original` are "
    "beside the adapter on those weights, and `gap` is how far that lies from what was trained."
)
CHOICES = (
    "Scores are compared as the choices that they stand for: a token is a choice between two of the texts, or between "
    "one and a text whose score is 0."
)
HEADS = ("engine", "what", "base", "weights", "max logprob difference", "KL", "same top token", "verdict")


def cells(checks: Iterable[Check]) -> list[tuple[str, ...]]:
    """Rows of a table below `HEADS`; differences in nats."""
    rows = []
    for check in checks:
        f = check.found
        figures = ("–",) * 3 if f is None else (f"{f.max_logprob:.2g}", f"{f.kl:.2g}", f"{f.top1:.1%}")
        bound = "" if check.bound is None else f" ({check.bound[0]} ≤ {check.bound[1]:g})"
        note = bound + (f": {check.note}" if check.note else "")
        engine = f"{check.engine} {check.version}".strip()
        rows.append(
            (engine, check.what or "–", check.base or "–", check.weights or "–", *figures, check.verdict + note)
        )
    return rows


def as_text(checks: Iterable[Check]) -> str:
    """Return the table for a terminal."""
    return "\n".join(align_columns([HEADS, *cells(checks)]))
