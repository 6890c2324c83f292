"""The card of a grader (`eval=judge eval.asks=…`): a language model's yes and no to answers with known labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align import ranks
from align.config.root import Config
from align.evals.card_gate import FILE, LABELS, MIN_AGREEMENT, SCHEMA, read_card, shortfall
from align.evals.grader_card import grader_figures
from align.evals.judge_identity import JudgeIdentity, grader_identity
from align.evals.known_answers import KnownAnswer, answers_digest
from align.evals.llm_grader import Grade, Graded, errors_of, grades_by_llm
from align.evals.pair_accuracy import pref_text
from align.evals.questions import yes_to
from align.report import in_words
from align.report.words import calibration_in_words, counted
from align.run import Run, write_json
from align.run.files import write_text
from align.stages.grader_card_inputs import KnownAnswers
from align.stages.suite_answers import answer_store
from align.track import peak_rss_mb
from align.types import Result


def run(run: Run, config: Config, known: KnownAnswers) -> Result:
    grades, judge = graded(config, known), grader_identity(known.grader)
    figures = grader_figures(known.answers, grades, config.stage.level)
    path = run.artifact / FILE
    write_json(path, card_of(judge, known, figures, config.stage.level))
    rows = evidence(known.answers, grades)
    write_text(run.artifact / "verdicts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    why, notes = shortfall(read_card(path)), [*known.notes, *errors_of(known.grader, grades)]
    metrics = {
        "judge": judge.title, "asks": known.grader.asks, "yes": yes_to(known.grader.asks),
        "reference": known.reference, "judge_agreement": figures["agreement"]["raw"], "card": figures,
        "decides": not why, "why_not": why, "judge_notes": notes, "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    return Result(metrics, (*in_lines(metrics), *notes))


def graded(config: Config, known: KnownAnswers) -> list[Grade]:
    """What the grader says of each answer. The first rank asks it."""
    asked = [Graded(one.item.prompt, pref_text(one.answer)) for one in known.answers]
    store = answer_store(config)
    return ranks.from_main(grades_by_llm(known.grader, asked, store) if ranks.is_main() else [])


def card_of(judge: JudgeIdentity, known: KnownAnswers, figures: Mapping[str, Any], level: float) -> dict[str, Any]:
    """The layout of `card.json`."""
    about = {"digest": answers_digest(known.answers), "answers": len(known.answers)}
    return {
        "schema_version": SCHEMA, "judge": judge.as_dict(), "reference": known.reference, "data": about, "level": level,
        **figures,
    }  # fmt: skip


def evidence(answers: Sequence[KnownAnswer], grades: Sequence[Grade]) -> Iterator[dict[str, Any]]:
    """A line for each answer, without its text: it stands in the data."""
    for one, grade in zip(answers, grades, strict=True):
        row = {"id": one.item.id, "cluster": one.item.cluster, "label": one.label, "verdict": grade.score}
        row |= {"p": grade.p} if grade.p is not None else {}
        yield row | ({"error": grade.error} if grade.error else {})


def in_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The card in words, what it decides first."""
    card, why = metrics["card"], metrics["why_not"]
    may = f"enough to decide gates ({MIN_AGREEMENT:g})" if not why else f"too little to decide gates: {why}"
    by_label = ", ".join(f"{in_words(card['by_label'][label], '.2f')} labelled {label}" for label in LABELS)
    labels = " and ".join(f"{card['labels'][label]:,} {label}" for label in LABELS)
    yield f"{metrics['judge']} is right on {by_label} ({labels}), {may}"
    agreed, answers = in_words(metrics["judge_agreement"], ".2f"), counted(card["agreement"]["verdicts"], "answer")
    yield f"in all it agrees with {metrics['reference']} on {agreed} of {answers}"
    if "calibration" in card:
        yield calibration_in_words(card["calibration"])
