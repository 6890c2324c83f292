"""The page of a judge's card: how far it agrees, whether that is enough to decide gates, and where it errs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from align.report.page import Report
from align.report.seen import Seen
from align.report.words import counted, format_figure, in_words, percent

READING = (
    "**Agreement** counts verdicts that are equal, ties among them; **kappa** is what of it chance does not explain. "
    "**Accuracy** is over the pairs of which one answer is better. The **taste for length** is the log-odds that a "
    "longer answer adds; it is a fault so far as it exceeds the reference's. All intervals are over prompts."
)


READING_OF_GRADERS = (
    "A grader that always says yes is right on every answer labelled yes: so each label has a figure of its own, and "
    "both decide whether it may decide gates. **Kappa** is the agreement beyond chance. All intervals are over prompts."
)


def is_card(seen: Seen) -> bool:
    """Whether a run measured a judge."""
    return "card" in seen.metrics


def is_grader(seen: Seen) -> bool:
    """Whether the judge answers a question about single answers."""
    return "asks" in seen.metrics


def verdict(seen: Seen) -> str:
    """How far the judge agrees, and whether it may decide gates."""
    metrics = seen.metrics
    may = "It may decide gates." if metrics["decides"] else f"It decides no gate: {metrics['why_not']}."
    if is_grader(seen):
        yes, no = (percent(metrics["card"]["by_label"][label]) for label in ("yes", "no"))
        right = f"right on {yes} of those labelled yes and {no} of those labelled no in {metrics['reference']}"
        return f"{metrics['judge']} says which answer {metrics['yes']}: {right}. {may}"
    agreed, verdicts = percent(metrics["judge_agreement"]), metrics["card"]["agreement"]["verdicts"]
    return f"{metrics['judge']} agrees with {metrics['reference']} on {agreed} of {counted(verdicts, 'verdict')}. {may}"


def shown(report: Report, seen: Seen) -> None:
    """The figures of the card."""
    card = seen.metrics["card"]
    if is_grader(seen):
        grader_shown(report, card, seen.metrics["asks"])
        return
    report.heading("The card").text(READING)
    report.table(("figure", "found", "prompts"), [*figures_of(card)], "What the judge is worth")
    ties = card["ties"]
    if ties["pairs"] or ties["judge"]:
        report.text(
            f"Called equal: {counted(ties['pairs'], 'pair')} by the reference, {ties['judge']:,} by the judge, "
            f"{ties['both']:,} by both."
        )
    if card.get("errors"):
        pairs = counted(card["errors"], "pair")
        report.text(f"The judge gives no verdict, or one in one order alone, on {pairs}: counted as wrong.")
    if len(card.get("by_source", {})) > 1:
        rows = [row(source or "(none)", found) for source, found in card["by_source"].items()]
        report.table(("source", "accuracy", "prompts"), rows, "Accuracy by source")


def grader_shown(report: Report, card: Mapping[str, Any], asks: str) -> None:
    """The figures of the card of a grader, which says yes or no to single answers."""
    report.heading("The card").text(f"The question about each answer: {asks}").text(READING_OF_GRADERS)
    rows = [row(f"right on answers labelled {label}", card["by_label"][label]) for label in ("yes", "no")]
    report.table(("figure", "found", "prompts"), [*rows, *figures_of(card)], "What the grader is worth")
    told = [(label, card["labels"][label], card["said"][label]) for label in ("yes", "no")]
    report.table(("", "labelled", "said by the grader"), told, "Labels and what the grader says")
    if card["errors"]:
        report.text(f"It says neither yes nor no to {counted(card['errors'], 'answer')}, which count as wrong.")


def figures_of(card: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    yield row("agreement", card["agreement"]["raw"])
    if card["agreement"]["kappa"]:
        yield row("kappa", card["agreement"]["kappa"])
    if "between_people" in card:
        yield row("agreement between people", card["between_people"])
    if "accuracy" in card:
        yield row("accuracy", card["accuracy"])
        for length, found in card["by_length"].items():
            where = "the answers are equally long" if length == "equal" else f"the better answer is the {length} one"
            yield row(f"accuracy where {where}", found)
    for n, found in card.get("best_of", {}).items():
        yield row(f"best of {n} (chance has {1 / int(n):.2g})", found)
    if card["swap"]:
        yield row("verdicts that survive a swap", card["swap"]["consistency"])
        yield row("won by what is shown first", card["swap"]["shown_first"])
    for key, name in (("length_slope", "taste for length, the judge's"), ("reference_slope", "the reference's")):
        if card.get(key):
            yield row(name, card[key])
    if "calibration" in card:
        found = card["calibration"]
        yield row("log loss, nats (a coin has 0.693)", found["log_loss"])
        yield row("Brier score (a coin has 0.25)", found["brier"])
        yield "expected calibration error", format_figure(found["ece"]), "–"


def row(name: str, found: Mapping[str, Any]) -> tuple[Any, ...]:
    return name, in_words(found), found["n"]
