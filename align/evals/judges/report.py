"""The report of a judge (`card.json`): its agreement with known verdicts, and whether it may decide gates.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, require, require_schema_version
from align.evals.judges.examples import YES_AND_NO
from align.evals.judges.identity import JudgeIdentity, describe_judge_difference, list_differing_keys
from align.report.figure_text import format_interval, pluralize
from align.run import Input, file_digest, read_json_object, resolve

FIELD = "stage.card"
FILE = "card.json"
SCHEMA = 1
MIN_VERDICTS = 100
"""Minimum number of compared verdicts in the report of a judge that decides gates (`eval.gates`)."""
MIN_AGREEMENT = 0.6
MIN_LEVEL = 0.95
"""Minimum confidence level of the agreement's interval in the report of a judge that decides gates (`eval.gates`)."""
HOW_TO_MEASURE = "Measure the judge: python -m align stage=eval eval=judge reward=… data=annotations project=NAME."
HOW_TO_MEASURE_ANSWERS = (
    "Measure the judge: python -m align stage=eval eval=judge eval.asks=… stage.judge=… data=files data.path=LABELLED."
)


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """The part of a judge's `card.json` that gates (`eval.gates`) need: identity, agreement, consistency and errors.

    Attributes:
        judge: the judge that was measured.
        digest: SHA-256 of the file.
        reference: name of the reference that it was compared with.
        agreement: `{value, low, high, n}`.
        chance: the lower end of kappa, the agreement beyond chance. None if kappa is undefined.
        verdicts: the number of compared verdicts.
        consistency: the share of verdicts that are the same in both orders. None for a judge without an order.
        level: of the intervals.
        by_label: for a judge of single answers, `yes` and `no` → its agreement on the answers with this label.
        errors: the number of missing verdicts among `verdicts`.
    """

    judge: JudgeIdentity
    digest: str
    reference: str
    agreement: dict[str, Any]
    chance: float | None
    verdicts: int
    consistency: float | None
    level: float
    by_label: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    errors: int = 0

    @property
    def summary(self) -> str:
        agreed = format_interval(self.agreement, ".2f")
        return f"agrees with {self.reference} on {agreed} of {pluralize(self.verdicts, 'verdict')}"

    def as_dict(self) -> dict[str, Any]:
        """Return the judge's title, agreement and report digest as the JSON object that a gate's verdict file
        contains."""
        values = {
            "judge": self.judge.title,
            "card": self.digest,
            "agreement": {**self.agreement, "with": self.reference},
        }
        if self.by_label:
            values |= {"asks": self.judge.asks, "agreement_by_label": {**self.by_label}}
        return values


def load_reports(card: Any, root: Path) -> tuple[Sequence[JudgeReport], dict[str, Input]]:
    """Load the judge reports of the runs that the setting `stage.card` names, and return them with the inputs to record
    in the manifest.

    Raises:
        InputError: `card` names no runs, or a run that measured no judge.
        MissingArtifact: there is no such run.
        CorruptFile: a file of the run was changed after it was published.
    """
    is_list = isinstance(card, list | tuple)
    refs = [*card] if is_list else [card]
    for ref in refs:
        is_ref = isinstance(ref, str) and (bool(ref) or not is_list)
        require(is_ref, FIELD, card, "names no run", "Write eval:NAME, or a list of such.")
    reports = []
    inputs = {}
    refs = [ref for ref in refs if ref]
    for i, ref in enumerate(refs):
        artifact = resolve(ref, root, field_name=FIELD)
        path = artifact.path / FILE
        require(path.is_file(), FIELD, ref, "is no run of eval=judge, so it has no card", HOW_TO_MEASURE)
        report = read_report(path)
        manifest = artifact.manifest
        stage, run_name = (manifest.stage, manifest.name) if manifest else ("", "")
        reports.append(report)
        key = "card" if len(refs) == 1 else f"card.{i}"
        inputs[key] = Input(report.digest, artifact.ref, str(artifact.path.absolute()), stage, run_name)
    return reports, inputs


def read_report(path: Path) -> JudgeReport:
    """Read a judge report from its `card.json`, and check its values and its judge's digest.

    Raises:
        CorruptFile: the file is not a valid report of a judge.
        InputError: another version wrote it.
    """
    values = read_json_object(path, FIELD, HOW_TO_MEASURE)
    require_schema_version(values.get("schema_version"), SCHEMA, FIELD, str(path), HOW_TO_MEASURE)
    try:
        judge = JudgeIdentity(str(values["judge"]["title"]), values["judge"]["made_of"])
        kappa = values["agreement"]["kappa"]
        swap = values["swap"]
        report = JudgeReport(
            judge,
            file_digest(path),
            str(values["reference"]),
            parse_interval(values["agreement"]["raw"]),
            None if kappa is None or kappa["low"] is None else float(kappa["low"]),
            int(values["agreement"]["verdicts"]),
            swap and float(swap["consistency"]["value"]),
            float(values["level"]),
            {label: parse_interval(values["by_label"][label]) for label in YES_AND_NO} if judge.asks else {},
            int(values["errors"]),
        )
        intervals = (report.agreement, *report.by_label.values())
        numbers = [number for interval in intervals for number in interval.values()]
        numbers += [report.level, report.consistency or 0.0, report.chance or 0.0]
        is_whole = values["judge"]["identity"] == judge.digest and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptFile(FIELD, str(path), "is not a judge's card", HOW_TO_MEASURE) from None
    if not is_whole:
        raise CorruptFile(FIELD, str(path), "is not a judge's card, or does not name its judge", HOW_TO_MEASURE)
    return report


def parse_interval(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys `value`, `low`, `high` and `n` of a JSON object as three floats and an int. Raises KeyError,
    TypeError or ValueError if one is missing or no number."""
    return {**{key: float(values[key]) for key in ("value", "low", "high")}, "n": int(values["n"])}


def explain_shortfall(report: JudgeReport, min_agreement: float = MIN_AGREEMENT) -> str:
    """Return the reason for which a judge may not decide gates, such as a low agreement or too few examples.
    Returns an empty string if it may decide them.

    Args:
        min_agreement: bound that the lower end of the agreement has to exceed.
    """
    agreed = format_interval(report.agreement, ".2f")
    if report.errors >= report.verdicts:
        return "it gives no verdict"
    if report.consistency == 0:
        return "no verdict is the same in both orders of the two answers: it decides by their position"
    if report.verdicts < MIN_VERDICTS:
        return f"its card has {pluralize(report.verdicts, 'verdict')}, and {MIN_VERDICTS} are needed"
    if report.level < MIN_LEVEL:
        return f"its agreement has an interval at level {report.level:g}, and {MIN_LEVEL:g} is needed"
    for label, interval in report.by_label.items():
        label_agreement = (
            f"its agreement with {report.reference} on answers labelled {label} is {format_interval(interval, '.2f')}"
        )
        if interval["value"] == 0:
            return f"{label_agreement}: it never says {label} where it should"
        if interval["low"] <= min_agreement:
            return f"{label_agreement}, whose lower end is not above {min_agreement:g}"
    if not report.by_label and report.agreement["low"] <= min_agreement:
        return f"its agreement with {report.reference} is {agreed}, whose lower end is not above {min_agreement:g}"
    if report.chance is None or report.chance <= 0:  # a judge that calls all equal agrees with each tie
        problem = "not shown to be better than chance: see kappa in its card"
        return f"its agreement with {report.reference} is {agreed}, {problem}"
    return ""


def choose_report(
    gate: str, judge: JudgeIdentity, reports: Sequence[JudgeReport], card: Any, min_agreement: float = MIN_AGREEMENT
) -> JudgeReport:
    """Return the only report about a gate's judge, or raise InputError if there is not exactly one or its agreement is
    too low.

    Args:
        gate: its name.
        judge: the judge of the gate's task.
        reports: those that `stage.card` names.
        card: the value of `stage.card`, for errors.
        min_agreement: see `explain_shortfall`.

    Raises:
        InputError: there is no report, none or two of them are about this judge, or its agreement is too low.
    """
    decides = f"gate {gate} is decided by {judge.title}"
    how_to_measure = HOW_TO_MEASURE_ANSWERS if judge.asks else HOW_TO_MEASURE
    if not reports:
        problem = f"{decides}, and no card (stage.card) says how often it is right"
        raise InputError(FIELD, "(none)", problem, f"{how_to_measure} Then name its run.")
    own_reports = [report for report in reports if report.judge.digest == judge.digest]
    if not own_reports:
        nearest = min(reports, key=lambda report: len(list_differing_keys(judge, report.judge)))
        subject = "this card is" if len(reports) == 1 else f"even the nearest of these {len(reports)} cards is"
        difference = describe_judge_difference(judge, nearest.judge)
        problem = f"{decides}, and {subject} of another judge, {nearest.judge.title}: {difference}"
        raise InputError(FIELD, card, problem, how_to_measure)
    require(len(own_reports) == 1, FIELD, card, f"names {len(own_reports)} cards of {judge.title}", "Name one of them.")
    if why := explain_shortfall(own_reports[0], min_agreement):
        examples = "answers" if judge.asks else "pairs"
        raise InputError(FIELD, card, f"{decides}: {why}", f"Measure it on more {examples}, or name another judge.")
    return own_reports[0]
