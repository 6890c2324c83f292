"""The checks in a receipt and their verdicts: the difference of an export, run by an engine, from the trained model.

A check is one engine on one base: the difference of its next-token logprobs on fixed prompts from the trained model's,
and the bound that the difference must keep. An engine that did not run has a check too, which never passes.
`align.run.receipt` reads and writes the receipt.
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
"""A pair of the name of a metric of `Divergence` and its largest accepted value."""

ALONE = "base alone"
"""Name of the check that compares the base without the adapter with the trained model, as a yardstick for the
others."""
PASS = "pass"
FAIL = "fail"
ACCEPTED = "accepted"
REPORTED = "reported"
UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class ReceiptCheck:
    """The difference of an export from the trained model, measured by one engine on one base, with its bound and
    verdict.

    Attributes:
        engine: such as `transformers`.
        what: `adapter`, `merged`, or the merge in fp32, `merge-before-cast`.
        base: `nf4`, `nf4-dequantised` or `original`: base that the adapter was put on or merged into.
        weights: dtype of that base, or of the merged model, on disk.
        version: version of the engine; empty if it did not run.
        found: difference from the trained model; None if the engine did not run.
        bound: metric of `found` and its largest accepted value; None if the difference is only reported.
        note: why the engine did not run, or how to read the result.
        accepted: the bound may be missed, by `export.accept`.
        shipped: True if files of the export were loaded; False for a merge before its cast, and for a conversion to
            f32.
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
        """The name of the check in `export.accept`, such as `vllm/merged/original/bfloat16`."""
        return "/".join(part for part in (self.engine, self.what, self.base, self.weights) if part)

    @property
    def verdict(self) -> str:
        if self.found is None:
            return UNCHECKED
        if self.bound is None:
            return REPORTED
        figure, limit = self.bound
        is_finite = all(map(math.isfinite, (self.found.kl, self.found.top1, self.found.max_logprob)))
        if is_finite and getattr(self.found, figure) <= limit:
            return PASS
        return ACCEPTED if self.accepted else FAIL

    def as_dict(self) -> dict[str, Any]:
        divergence = None if self.found is None else self.found.as_dict()
        return asdict(self) | {"found": divergence, "verdict": self.verdict, "name": self.name}


def find_measured_check(checks: Iterable[ReceiptCheck], is_shipped: bool) -> ReceiptCheck | None:
    """Return the first measured check with a bound, of the export's files or of the weights before their cast, or None.

    Args:
        is_shipped: True for the files of the export, False for weights before their cast.
    """
    return next((c for c in checks if c.found is not None and c.bound is not None and c.shipped == is_shipped), None)


def summarize_differences(checks: Sequence[ReceiptCheck]) -> dict[str, Any]:
    """Return the differences from the trained model of the export's files (`shipped`) and of its weights before the
    cast (`before_cast`).

    Each has the name of its check. An unmeasured one is `None`.
    """

    def figures(check: ReceiptCheck | None) -> dict[str, Any] | None:
        return None if check is None or check.found is None else {"check": check.name, **check.found.as_dict()}

    shipped = figures(find_measured_check(checks, is_shipped=True))
    return {"shipped": shipped, "before_cast": figures(find_measured_check(checks, is_shipped=False))}


def mark_accepted(checks: Sequence[ReceiptCheck], names: Sequence[str]) -> list[ReceiptCheck]:
    """Return copies of the checks with `accepted` set to True for the given names and to False for all others."""
    return [replace(check, accepted=check.name in names) for check in checks]


def require_passed(checks: Iterable[ReceiptCheck]) -> None:
    """Raise InputError if a check missed its bound and the miss is not accepted."""
    failed = [check for check in checks if check.verdict == FAIL]
    if failed:
        missed = [
            f"{c.name}: {c.bound[0]} is {getattr(c.found, c.bound[0]):.3g}, and at most {c.bound[1]:g} is allowed"
            for c in failed
            if c.bound is not None
        ]
        names = ",".join(check.name for check in failed)
        remedy = f"It differs from the trained model. To publish it nevertheless: export.accept=[{names}]."
        raise InputError("export", f"{len(failed)} of the receipt's bounds missed", "; ".join(missed), remedy)


def require_engines(checks: Sequence[ReceiptCheck], accept: Sequence[str], require: Sequence[str]) -> None:
    """Raise InputError if `accept` names a check without a bound, or `require` names an engine that did not run."""
    names = dict.fromkeys(check.name for check in checks if check.bound is not None)
    for name in accept:
        if name not in names:
            raise InputError("export.accept", name, "no such check has a bound", f"Those are {', '.join(names)}.")
    for engine in require:
        if not any(check.engine == engine and check.found is not None and check.what != ALONE for check in checks):
            notes = (check.note for check in checks if check.engine == engine)
            problem = f"it was not checked: {next(notes, 'this version knows no such engine')}"
            remedy = "Install it, or leave it out of export.require."
            raise InputError("export.require", engine, problem, remedy)


def find_divergence_on_original(checks: Iterable[ReceiptCheck]) -> Divergence | None:
    """Return the divergence of a QLoRA adapter on the original base from the trained model, or None if it was not
    measured.

    It is `None` for an adapter that was trained on the original weights.
    """
    fields = (TRANSFORMERS, "adapter", "original", None)
    return next((c.found for c in checks if (c.engine, c.what, c.base, c.bound) == fields), None)


def require_same_measurements(
    receipt: dict[str, Any], checks: Sequence[ReceiptCheck], skipped_engines: Container[str] = ()
) -> None:
    """Raise CorruptFile if a receipt claims a result that differs from repeated checks, or that they did not measure.

    Args:
        skipped_engines: engines that may not run here, whose claims are not checked.

    Raises:
        CorruptFile: It claims a measurement that was not made, or another result.
    """
    measured = {check.name: check.found for check in checks if check.found is not None}
    absent = {check.name for check in checks if check.found is None and check.what}  # the base is missing
    unasked = {check.engine: check.note for check in checks if check.found is None and not check.what}
    for check in receipt["rows"]:
        name = str(check.get("name"))
        engine = str(check.get("engine"))
        claimed = check.get("found")
        if (claimed is None and check.get("verdict") == UNCHECKED) or name in absent:
            continue
        if engine in unasked and engine in skipped_engines:
            continue
        if name not in measured and check.get("weights") == "f32" and name.replace("/f32", "/f16") in measured:
            continue  # f32 is measured only if f16 misses its bound, which depends on the machine
        slack = 0.05 if engine == TRANSFORMERS else 0.5  # other engines' differences are mostly their rounding
        divergence = measured.get(name)
        remedy = "Do not trust it: export again."
        if divergence is None and engine in unasked:
            problem = f"the receipt has a check that was not measured here ({unasked[engine]})"
            remedy = "Do not trust it: export again, or check it where that engine can run."
        elif divergence is None:
            problem = "the receipt has a check that was not measured here"
        elif not isinstance(claimed, dict) or not all(
            is_close_measurement(claimed.get(key), getattr(divergence, key), slack)
            for key in ("kl", "top1", "max_logprob")
        ):
            problem = "the receipt's result differs from the repeated measurement"
        else:
            continue
        raise CorruptFile(RECEIPT, name, problem, remedy)


def is_close_measurement(claimed: Any, measured: float, relative_tolerance: float) -> bool:
    """Return whether two values differ by at most 1e-4 or the relative tolerance, as they may by rounding on another
    machine."""
    return isinstance(claimed, float | int) and abs(claimed - measured) <= max(1e-4, relative_tolerance * abs(measured))


MADE_ANEW = (
    "Made with the original weights, it is another model than the trained one: `merge-before-cast`, `merged` and "
    "`adapter` on `original` are beside the adapter on those weights, and `gap` is its distance from the trained model."
)
CHOICES = (
    "Scores are compared as probabilities of a choice: a token is a choice between two of the texts, or between "
    "one and a text whose score is 0."
)
HEADS = ("engine", "what", "base", "weights", "max logprob difference", "KL", "same top token", "verdict")


def build_table_rows(checks: Iterable[ReceiptCheck]) -> list[tuple[str, ...]]:
    """Return one row of text cells per check, in the columns of `HEADS`, with differences in nats."""
    rows = []
    for check in checks:
        figures = ("–", "–", "–")
        if check.found is not None:
            figures = (f"{check.found.max_logprob:.2g}", f"{check.found.kl:.2g}", f"{check.found.top1:.1%}")
        verdict = check.verdict
        if check.bound is not None:
            verdict += f" ({check.bound[0]} ≤ {check.bound[1]:g})"
        if check.note:
            verdict += f": {check.note}"
        engine = f"{check.engine} {check.version}".strip()
        rows.append((engine, check.what or "–", check.base or "–", check.weights or "–", *figures, verdict))
    return rows


def format_checks(checks: Iterable[ReceiptCheck]) -> str:
    """Format the checks of a receipt as a text table for a terminal."""
    return "\n".join(align_columns([HEADS, *build_table_rows(checks)]))
