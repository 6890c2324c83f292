"""The report page of a judge: agreement with a reference, use in gates, and wrongly judged pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.report.figure_text import align_columns, format_figure, format_interval, format_percent, pluralize
from align.report.page import Report
from align.report.run_view import PageSections, RunView
from align.report.stages import add_held_out_pairs

LABELS = ("yes", "no")
CALIBRATION_FIGURES = {
    "log_loss": "log loss, nats (guessing gives 0.693)",
    "brier": "Brier score (guessing gives 0.25)",
}
SLOPE_FIGURES = {"length_slope": "preference for length, the judge's", "reference_slope": "the reference's"}
SWAP_FIGURES = {"consistency": "same verdict in both orders", "shown_first": "share won by the answer shown first"}


def summarize_judge(view: RunView) -> str:
    """Return a sentence on a judge's agreement with the labels, and one on its right to decide gates."""
    return summarize_metrics(view.metrics)


def summarize_metrics(metrics: Mapping[str, Any]) -> str:
    card = metrics["card"]
    may_decide = "It may decide gates." if metrics["decides"] else f"It decides no gate: {metrics['why_not']}."
    if "asks" in metrics:
        yes_accuracy, no_accuracy = (format_percent(card["by_label"][label]) for label in LABELS)
        accuracy = f"right on {yes_accuracy} of those labelled yes and {no_accuracy} of those labelled no"
        return (
            f"{metrics['judge']} decides whether an answer {metrics['yes']}: {accuracy} in {metrics['reference']}. "
            f"{may_decide}"
        )
    agreement = format_percent(metrics["judge_agreement"])
    verdicts = pluralize(card["agreement"]["verdicts"], "verdict")
    return f"{metrics['judge']} agrees with {metrics['reference']} on {agreement} of {verdicts}. {may_decide}"


def iter_summary_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines printed at the end of a judge's evaluation: a summary, error counts and a table of metrics."""
    yield summarize_metrics(metrics)
    card = metrics["card"]
    if "asks" in metrics:
        counts = (
            f"{card['labels'][label]} {label} by label and {card['said'][label]} by the grader" for label in LABELS
        )
        yield f"Answers: {', '.join(counts)}."
    if card["errors"] and "asks" in metrics:
        yield f"The grader says neither yes nor no to {pluralize(card['errors'], 'answer')}, which count as wrong."
    elif card["errors"]:
        pairs = pluralize(card["errors"], "pair")
        yield f"The judge gives no verdict, or one in one order alone, on {pairs}: counted as wrong."
    rows = [("figure", "found", "prompts"), *iter_figures(card)]
    yield from align_columns([[str(cell) for cell in row] for row in rows])


def add_judge_body(report: Report, view: RunView) -> None:
    """Add a table of the judge's metrics and the answer pairs on which it was measured to the report page."""
    report.add("card", view.metrics, [*iter_figures(view.metrics["card"])], template="judge.html")
    add_held_out_pairs(report, view)


def iter_figures(card: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the table rows of a judge's metrics: (name, value with interval, number of prompts), as text."""
    for label, interval in card.get("by_label", {}).items():
        yield build_row(f"right on answers labelled {label}", interval)
    yield build_row("agreement", card["agreement"]["raw"])
    if card["agreement"]["kappa"]:
        yield build_row("kappa", card["agreement"]["kappa"])
    if "between_people" in card:
        yield build_row("agreement between people", card["between_people"])
    if "accuracy" in card:
        yield build_row("accuracy", card["accuracy"])
        for length, interval in card["by_length"].items():
            condition = "the answers are equally long"
            if length != "equal":
                condition = f"the better answer is the {length} one"
            yield build_row(f"accuracy where {condition}", interval)
    for n, interval in card.get("best_of", {}).items():
        yield build_row(f"best of {n} (chance has {1 / int(n):.2g})", interval)
    for key, name in SWAP_FIGURES.items():
        if card["swap"]:
            yield build_row(name, card["swap"][key])
    for key, name in SLOPE_FIGURES.items():
        if card.get(key):
            yield build_row(name, card[key])
    if "calibration" in card:
        for key, name in CALIBRATION_FIGURES.items():
            yield build_row(name, card["calibration"][key])
        yield "expected calibration error", format_figure(card["calibration"]["ece"]), "–"


def build_row(name: str, interval: Mapping[str, Any]) -> tuple[Any, ...]:
    return name, format_interval(interval), interval["n"]


PAGE_SECTIONS = PageSections(summarize_judge, add_judge_body)
