"""What goes into the card of a grader (`eval=judge eval.asks=…`): found before its run has a name, read before torch is
imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from align.config.root import Config
from align.data.labelled import HELP, read_labelled
from align.data.pairs import drawn
from align.data.sources import data_records
from align.errors import InputError, require
from align.evals.endpoint import api_key
from align.evals.known_answers import KnownAnswer, counted_labels, known_answers
from align.evals.llm_grader import LLMGrader, grader_of
from align.evals.llm_judge import LLMJudge, parsed_judge
from align.evals.questions import question_in
from align.report.words import counted
from align.run import Input
from align.stages.judge_card_inputs import check_alone, name_of_data
from align.stages.rows import source_of

FIELD = "eval.asks"


class KnownAnswers(NamedTuple):
    """
    Attributes:
        answers: that the grader is measured on.
        reference: whose labels they are, for people.
        notes: what is to be said of them, a sentence each.
    """

    grader: LLMGrader
    answers: Sequence[KnownAnswer]
    reference: str
    notes: Sequence[str]


def grader_inputs(config: Config) -> dict[str, Input]:
    """The labelled answers and the grader, as inputs of the run.

    Raises:
        InputError: a setting does not apply, the question is none, or the judge is no language model.
    """
    check_alone(config)
    source = source_of(config)
    problem, remedy = "holds no answers with labels", "Use data=files with data.path=LABELLED.jsonl, or data=manifest."
    require(source.name in ("files", "manifest"), "data", source.name, problem, f"{remedy} {HELP}")
    grader = grader_in(config)
    return {**data_records(source), "judge": grader.endpoint.record(grader.identity)}


def grader_in(config: Config) -> LLMGrader:
    """Who is measured. Raises: InputError: see `grader_inputs`."""
    asks, judge = question_in(config.eval.asks, FIELD), parsed_judge(config.stage.judge)
    if not isinstance(judge, LLMJudge):
        problem = f"is answered by a language model, and stage.judge={judge} is none"
        remedy = "Add stage.judge={url: http://127.0.0.1:8000/v1, model: NAME}."
        raise InputError(FIELD, config.eval.asks, problem, remedy)
    return grader_of(judge, asks)


def known_answers_of(config: Config) -> tuple[KnownAnswers]:
    """The answers that the grader is measured on.

    Raises:
        InputError: there are none, or none with one of the labels; or the endpoint cannot be asked.
    """
    source, grader = source_of(config), grader_in(config)
    api_key(grader.endpoint)
    every, unclear = known_answers(read_labelled(source))
    answers = drawn(every, config.data.limit, config.seed)
    labels = counted_labels(answers)
    for label, word in ((True, "yes"), (False, "no")):
        problem = f"has no answer labelled {word} ({str(label).lower()}), and a grader is measured on both"
        require(labels[label] > 0, "data", source.path or source.name, problem, "Give answers with both labels.")
    notes = [f"nobody here knows what {grader.title} was trained on"]
    notes += [f"{counted(unclear, 'answer')} left out: as many labels say yes as no"] if unclear else []
    return (KnownAnswers(grader, answers, name_of_data(config), notes),)
