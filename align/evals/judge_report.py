"""The report of a judge (`card.json`): how often it agrees with a reference, and whether it may decide gates.

A judge answers one of two kinds of question: which of two answers is better, or a yes/no question about one answer.
`artifact/verdicts.jsonl` of a run of `eval=judge` is the evidence; the figures here are computed from it. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.core.errors import CorruptFile, InputError, require, require_schema_version
from align.evals.judge_examples import (
    TIE,
    AnswerExample,
    PairExample,
    find_best_answers,
    measure_human_agreement,
)
from align.evals.judge_identity import JudgeIdentity, describe_difference, list_differences
from align.evals.stats import agreement, measure_judge, per_prompt, surviving
from align.ops.calibration import brier_scores, calibration_bins, expected_calibration_error, log_losses
from align.ops.intervals import mean, proportion
from align.report.figure_text import counted, in_words
from align.run import Input, file_digest, json_object, resolve

FIELD = "stage.card"
FILE = "card.json"
SCHEMA = 1
LONGER, SHORTER, EQUAL = "longer", "shorter", "equal"
YES_AND_NO = {"yes": 1.0, "no": 0.0}
"""Label → the verdict that gives it."""
LEAST_VERDICTS = 100
"""Verdicts behind an agreement that lets a judge decide."""
MIN_AGREEMENT = 0.6
MIN_LEVEL = 0.95
"""The least level of the interval of an agreement that lets a judge decide."""
HOW_TO_MEASURE = "Measure the judge: python -m align stage=eval eval=judge reward=… data=annotations project=NAME."
HOW_TO_MEASURE_ANSWERS = (
    "Measure the judge: python -m align stage=eval eval=judge eval.asks=… stage.judge=… data=files data.path=LABELLED."
)


class Opinions(NamedTuple):
    """The verdicts of a judge on examples, one entry an example.

    Attributes:
        verdicts: of a pair 1 if the judge prefers the first answer, 0 the second, ½ a tie; of an answer 1 for yes and
            0 for no. ½ stands for a missing verdict, see `errors`.
        swapped: the same with the second answer shown first; None for a judge that sees no order.
        log_odds: of a verdict of 1, in nats; None where the judge gives no probability.
        errors: why a verdict is missing, in some order; empty where there is one.
        scores: of the first and second answers; None for a judge that compares answers.
        probabilities: of yes, of a judge of single answers; None for a judge of pairs.
    """

    verdicts: Sequence[float]
    swapped: Sequence[float] | None
    log_odds: Sequence[float | None]
    errors: Sequence[str]
    scores: Sequence[tuple[float, float]] | None = None
    probabilities: Sequence[float | None] | None = None


# Figures


def measure_pairs(pairs: Sequence[PairExample], opinions: Opinions, level: float = 0.95) -> dict[str, Any]:
    """Return the figures of a judge on pairs, each with its interval over prompts.

    A missing verdict counts as wrong: it agrees with no verdict, not even a tie, survives no swap, and is no tie of the
    judge.

    Returns:
        `agreement`, `swap`, `length_slope`, `reference_slope` and `n` of `align.evals.stats.JudgeStatistics`;
        `accuracy` on the decided pairs, also `by_source` and `by_length` (whether the better answer is the longer one);
        `ties`, of the reference and of the judge; `errors`, the number of missing verdicts; `best_of`, by number of
        answers; `calibration`; `between_people`.

    Raises:
        ValueError: there are no pairs, or numbers of rows that differ.
    """
    is_missing = np.array([bool(error) for error in opinions.errors])
    verdicts = opinions.verdicts if opinions.swapped is None else surviving(opinions.verdicts, opinions.swapped)
    verdicts = np.where(is_missing, np.nan, verdicts)  # nan equals no verdict of the reference, and is no tie
    reference = [pair.verdict for pair in pairs]
    clusters = [pair.item.cluster for pair in pairs]
    first_lengths, second_lengths = zip(*(pair.lengths for pair in pairs), strict=True)
    figures = measure_judge(
        opinions.verdicts, reference, opinions.swapped, (first_lengths, second_lengths), clusters, level, is_missing
    ).as_dict()
    decided = [i for i, pair in enumerate(pairs) if not pair.is_tied]
    if decided:
        figures |= measure_accuracy([pairs[i] for i in decided], verdicts[decided], level)
    figures["ties"] = {
        "pairs": len(pairs) - len(decided),
        "judge": int((verdicts == TIE).sum()),
        "both": sum(pair.is_tied and verdict == TIE for pair, verdict in zip(pairs, verdicts.tolist(), strict=True)),
    }
    figures["errors"] = int(is_missing.sum())
    if credits := credit_best_answers(pairs, verdicts):
        figures["best_of"] = {n: proportion(values, level=level).as_dict() for n, values in sorted(credits.items())}
    figures |= measure_calibration([pairs[i] for i in decided], [opinions.log_odds[i] for i in decided], level)
    voted_clusters, equal_shares = measure_human_agreement(pairs)
    if equal_shares:
        figures["between_people"] = proportion(per_prompt(voted_clusters, equal_shares), level=level).as_dict()
    return figures


def measure_answers(answers: Sequence[AnswerExample], opinions: Opinions, level: float = 0.95) -> dict[str, Any]:
    """Return the figures of a judge that says yes or no to single answers, each with its interval over prompts.

    Args:
        answers: some labelled yes and some no.

    Returns:
        `agreement` over all answers, where a missing verdict agrees with no label; `by_label`, `yes` and `no` → the
        share of the answers with this label to which the judge gives it (its sensitivity and specificity); `labels`
        and `said`, how often each; `errors`, the number of missing verdicts; `calibration`; `swap`, None.

    Raises:
        ValueError: there are no answers, or none with one of the labels.
    """
    labels = [answer.verdict for answer in answers]
    verdicts = [*opinions.verdicts]
    clusters = [answer.item.cluster for answer in answers]

    def measure_label(label: float) -> dict[str, Any]:
        rows = [i for i, own in enumerate(labels) if own == label]
        is_right = np.array([float(verdicts[i] == label) for i in rows])
        return proportion(per_prompt([clusters[i] for i in rows], is_right), level=level).as_dict()

    return {
        "agreement": asdict(agreement(verdicts, labels, clusters, level)),
        "swap": None,
        "by_label": {name: measure_label(label) for name, label in YES_AND_NO.items()},
        "labels": {name: labels.count(label) for name, label in YES_AND_NO.items()},
        "said": {name: verdicts.count(label) for name, label in YES_AND_NO.items()},
        "errors": sum(bool(error) for error in opinions.errors),
        **measure_calibration(answers, opinions.log_odds, level),
    }


def measure_accuracy(pairs: Sequence[PairExample], verdicts: NDArray[np.float64], level: float) -> dict[str, Any]:
    """Return how often the judge prefers the better answer: of all pairs, by source and by length. A tie of the judge
    and a missing verdict (nan) are no preference."""
    is_right = verdicts == [pair.verdict for pair in pairs]

    def measure_rows(rows: Sequence[int]) -> dict[str, Any]:
        clusters = [pairs[i].item.cluster for i in rows]
        return proportion(per_prompt(clusters, is_right[[*rows]]), level=level).as_dict()

    def measure_groups(key: Callable[[PairExample], str]) -> dict[str, Any]:
        keys = [key(pair) for pair in pairs]
        return {name: measure_rows([i for i, own in enumerate(keys) if own == name]) for name in sorted({*keys})}

    return {
        "accuracy": measure_rows(range(len(pairs))),
        "by_source": measure_groups(lambda pair: pair.item.category),
        "by_length": measure_groups(compare_length_of_better),
    }


def compare_length_of_better(pair: PairExample) -> str:
    """Return whether the better answer is the longer one, in characters."""
    first, second = pair.lengths
    better, worse = (first, second) if pair.verdict == 1 else (second, first)
    if better == worse:
        return EQUAL
    return LONGER if better > worse else SHORTER


def credit_best_answers(pairs: Sequence[PairExample], verdicts: NDArray[np.float64]) -> dict[str, list[float]]:
    """Return, of prompts whose best answer among n is known: n → 1 if the judge prefers it to each other one, 1/k if it
    puts k answers level at the top, else 0. A judge that calls all equal has 1/n, as chance has. A missing verdict
    (nan) is worth 0."""
    verdict_of = {pair.item.id: verdict for pair, verdict in zip(pairs, verdicts.tolist(), strict=True)}
    credits: dict[str, list[float]] = {}
    for own_pairs in find_best_answers(pairs).values():
        wins = [verdict_of[pair.item.id] if is_first else 1 - verdict_of[pair.item.id] for pair, is_first in own_pairs]
        credit = 1 / (1 + wins.count(TIE)) if all(win > 0 for win in wins) else 0.0
        credits.setdefault(str(len(own_pairs) + 1), []).append(credit)
    return credits


def measure_calibration(
    examples: Sequence[PairExample] | Sequence[AnswerExample], log_odds: Sequence[float | None], level: float
) -> dict[str, Any]:
    """Return how well the judge's probabilities agree with the reference, under the key `calibration`: `brier` and
    `log_loss` with intervals, `ece` over ten bins. Returns nothing if the judge gives no probabilities."""
    rows = [i for i, odds in enumerate(log_odds) if odds is not None]
    if not rows:
        return {}
    clusters = [examples[i].item.cluster for i in rows]
    odds: ArrayLike = np.array([log_odds[i] for i in rows], dtype=np.float64)
    outcomes = np.array([examples[i].verdict for i in rows])
    bins = calibration_bins(np.exp(-np.logaddexp(0, -odds)).tolist(), outcomes.tolist(), clusters)
    return {
        "calibration": {
            "ece": expected_calibration_error(bins),
            "brier": mean(per_prompt(clusters, brier_scores(odds, outcomes)), level).as_dict(),
            "log_loss": mean(per_prompt(clusters, log_losses(odds, outcomes)), level).as_dict(),
        }
    }


# The file


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """The report of a judge, as far as gates need it.

    Attributes:
        judge: the judge that was measured.
        digest: SHA-256 of the file.
        reference: name of what it was compared with.
        agreement: `{value, low, high, n}`.
        chance: the lower end of kappa, the agreement beyond chance; None if kappa is undefined.
        verdicts: the number of compared verdicts.
        consistency: the share of verdicts that survive a swap of the answers; None if the judge sees no order.
        level: of the intervals.
        by_label: of a judge of single answers, `yes` and `no` → its agreement on the answers with this label.
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
        agreed = in_words(self.agreement, ".2f")
        return f"agrees with {self.reference} on {agreed} of {counted(self.verdicts, 'verdict')}"

    def as_dict(self) -> dict[str, Any]:
        """The form in the file of a gate's verdict."""
        values = {
            "judge": self.judge.title,
            "card": self.digest,
            "agreement": {**self.agreement, "with": self.reference},
        }
        if self.by_label:
            values |= {"asks": self.judge.asks, "agreement_by_label": {**self.by_label}}
        return values


def find_reports(value: Any, root: Path) -> tuple[Sequence[JudgeReport], dict[str, Input]]:
    """Return the reports that `stage.card` names, and the inputs that a run which reads them records.

    Raises:
        InputError: `value` names no runs, or a run that measured no judge.
        MissingArtifact: there is no such run.
        CorruptFile: a file of the run is not the published one.
    """
    is_list = isinstance(value, list | tuple)
    refs = [*value] if is_list else [value]
    for ref in refs:
        is_ref = isinstance(ref, str) and (bool(ref) or not is_list)
        require(is_ref, FIELD, value, "names no run", "Write eval:NAME, or a list of such.")
    reports = []
    inputs = {}
    refs = [ref for ref in refs if ref]
    for i, ref in enumerate(refs):
        artifact = resolve(ref, root, field_name=FIELD)
        path = artifact.path / FILE
        require(path.is_file(), FIELD, ref, "is no run of eval=judge: it has no card", HOW_TO_MEASURE)
        report = read_report(path)
        manifest = artifact.manifest
        stage, run_name = (manifest.stage, manifest.name) if manifest else ("", "")
        reports.append(report)
        key = "card" if len(refs) == 1 else f"card.{i}"
        inputs[key] = Input(report.digest, artifact.ref, str(artifact.path.absolute()), stage, run_name)
    return reports, inputs


def read_report(path: Path) -> JudgeReport:
    """Read a `card.json`.

    Raises:
        CorruptFile: the file is no report of a judge.
        InputError: another version wrote it.
    """
    values = json_object(path, FIELD, HOW_TO_MEASURE)
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
        raise CorruptFile(FIELD, str(path), "is no card of a judge", HOW_TO_MEASURE) from None
    if not is_whole:
        raise CorruptFile(FIELD, str(path), "is no card of a judge, or is of none that it names", HOW_TO_MEASURE)
    return report


def parse_interval(values: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: KeyError, TypeError, ValueError: the values are no interval."""
    return {**{key: float(values[key]) for key in ("value", "low", "high")}, "n": int(values["n"])}


# Gates


def explain_shortfall(report: JudgeReport, min_agreement: float = MIN_AGREEMENT) -> str:
    """Return why a judge with this report may decide no gate; empty if it may.

    Args:
        min_agreement: the agreement's lower end has to be above it.
    """
    agreed = in_words(report.agreement, ".2f")
    if report.errors >= report.verdicts:
        return "it gives no verdict"
    if report.consistency == 0:
        return "no verdict of it survives a swap of the two answers: it goes by their place"
    if report.verdicts < LEAST_VERDICTS:
        return f"its card has {counted(report.verdicts, 'verdict')}, and {LEAST_VERDICTS} are needed"
    if report.level < MIN_LEVEL:
        return f"its agreement has an interval at level {report.level:g}, and {MIN_LEVEL:g} is needed"
    for label, interval in report.by_label.items():
        shown = f"its agreement with {report.reference} on answers labelled {label} is {in_words(interval, '.2f')}"
        if interval["value"] == 0:
            return f"{shown}: it never says {label} where it should"
        if interval["low"] <= min_agreement:
            return f"{shown}, whose lower end is not above {min_agreement:g}"
    if not report.by_label and report.agreement["low"] <= min_agreement:
        return f"its agreement with {report.reference} is {agreed}, whose lower end is not above {min_agreement:g}"
    if report.chance is None or report.chance <= 0:  # a judge that calls all equal agrees with each tie
        return f"its agreement with {report.reference} is {agreed}, and chance would do as well: see kappa in its card"
    return ""


def choose_report(
    gate: str, judge: JudgeIdentity, reports: Sequence[JudgeReport], value: Any, min_agreement: float = MIN_AGREEMENT
) -> JudgeReport:
    """Return the report by which a judge may decide a gate.

    Args:
        gate: its name.
        judge: that would decide it.
        reports: the named ones.
        value: of `stage.card`, for errors.
        min_agreement: see `explain_shortfall`.

    Raises:
        InputError: there is no report, none or two of them are of this judge, or its agreement is too low.
    """
    decides = f"gate {gate} is decided by {judge.title}"
    how_to_measure = HOW_TO_MEASURE_ANSWERS if judge.asks else HOW_TO_MEASURE
    if not reports:
        problem = f"{decides}, and nothing says how often that is right"
        raise InputError(FIELD, "(none)", problem, f"{how_to_measure} Then name its run.")
    own = [report for report in reports if report.judge.digest == judge.digest]
    if not own:
        nearest = min(reports, key=lambda report: len(list_differences(judge, report.judge)))
        which = "this card is" if len(reports) == 1 else f"of these {len(reports)} cards even the nearest is"
        difference = describe_difference(judge, nearest.judge)
        problem = f"{decides}, and {which} of another judge, {nearest.judge.title}: {difference}"
        raise InputError(FIELD, value, problem, how_to_measure)
    require(len(own) == 1, FIELD, value, f"names {len(own)} cards of {judge.title}", "Name one of them.")
    if why := explain_shortfall(own[0], min_agreement):
        examples = "answers" if judge.asks else "pairs"
        raise InputError(FIELD, value, f"{decides}: {why}", f"Measure it on more {examples}, or name another judge.")
    return own[0]
