"""The page of a judge: how often it agrees with a reference, whether it may decide gates, and where it errs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.report.figure_text import counted, format_figure, in_words, percent
from align.report.page import Report
from align.report.run_view import RunView
from align.report.stages import pairs_shown

READING_PAIRS = (
    "**Agreement** counts verdicts that are equal, ties among them; **kappa** is what of it chance does not explain. "
    "**Accuracy** is over the pairs of which one answer is better. The **taste for length** is the log-odds that a "
    "longer answer adds; it is a fault so far as it exceeds the reference's. All intervals are over prompts."
)
READING_ANSWERS = (
    "A grader that always says yes is right on every answer labelled yes: so each label has a figure of its own, and "
    "both decide whether it may decide gates. **Kappa** is the agreement beyond chance. All intervals are over prompts."
)
LABELS = ("yes", "no")
COINS = {"log_loss": "log loss, nats (a coin has 0.693)", "brier": "Brier score (a coin has 0.25)"}
SLOPES = {"length_slope": "taste for length, the judge's", "reference_slope": "the reference's"}
SWAPS = {"consistency": "verdicts that survive a swap", "shown_first": "won by what is shown first"}


def summarize(seen: RunView) -> str:
    """Return the judge's agreement and whether it may decide gates."""
    metrics = seen.metrics
    card = metrics["card"]
    may_decide = "It may decide gates." if metrics["decides"] else f"It decides no gate: {metrics['why_not']}."
    if "asks" in metrics:
        yes, no = (percent(card["by_label"][label]) for label in LABELS)
        right = f"right on {yes} of those labelled yes and {no} of those labelled no in {metrics['reference']}"
        return f"{metrics['judge']} says which answer {metrics['yes']}: {right}. {may_decide}"
    agreed = percent(metrics["judge_agreement"])
    verdicts = counted(card["agreement"]["verdicts"], "verdict")
    return f"{metrics['judge']} agrees with {metrics['reference']} on {agreed} of {verdicts}. {may_decide}"


def add_body(report: Report, seen: RunView) -> None:
    """Add the figures of the judge, and the pairs on which it was measured."""
    add_figures(report, seen)
    pairs_shown(report, seen)


def add_figures(report: Report, seen: RunView) -> None:
    card = seen.metrics["card"]
    report.heading("The card")
    if "asks" in seen.metrics:
        report.text(f"The question about each answer: {seen.metrics['asks']}").text(READING_ANSWERS)
        report.table(("figure", "found", "prompts"), [*list_figures(card)], "What the grader is worth")
        counts = [(label, card["labels"][label], card["said"][label]) for label in LABELS]
        report.table(("", "labelled", "said by the grader"), counts, "Labels and what the grader says")
        if card["errors"]:
            report.text(f"It says neither yes nor no to {counted(card['errors'], 'answer')}, which count as wrong.")
        return
    report.text(READING_PAIRS)
    report.table(("figure", "found", "prompts"), [*list_figures(card)], "What the judge is worth")
    ties = card["ties"]
    if ties["pairs"] or ties["judge"]:
        report.text(
            f"Called equal: {counted(ties['pairs'], 'pair')} by the reference, {ties['judge']:,} by the judge, "
            f"{ties['both']:,} by both."
        )
    if card["errors"]:
        pairs = counted(card["errors"], "pair")
        report.text(f"The judge gives no verdict, or one in one order alone, on {pairs}: counted as wrong.")
    if len(card.get("by_source", {})) > 1:
        rows = [build_row(source or "(none)", interval) for source, interval in card["by_source"].items()]
        report.table(("source", "accuracy", "prompts"), rows, "Accuracy by source")


def list_figures(card: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each figure that the card has."""
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
            where = "the answers are equally long" if length == "equal" else f"the better answer is the {length} one"
            yield build_row(f"accuracy where {where}", interval)
    for n, interval in card.get("best_of", {}).items():
        yield build_row(f"best of {n} (chance has {1 / int(n):.2g})", interval)
    for key, name in SWAPS.items():
        if card["swap"]:
            yield build_row(name, card["swap"][key])
    for key, name in SLOPES.items():
        if card.get(key):
            yield build_row(name, card[key])
    if "calibration" in card:
        for key, name in COINS.items():
            yield build_row(name, card["calibration"][key])
        yield "expected calibration error", format_figure(card["calibration"]["ece"]), "–"


def build_row(name: str, interval: Mapping[str, Any]) -> tuple[Any, ...]:
    return name, in_words(interval), interval["n"]
