"""The report of a judge (`eval=judge`): its verdicts on examples whose verdict is known.

Without `eval.asks` the judge compares pairs of answers; with it, it answers a yes/no question about labelled answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align import ranks
from align.config.root import Config, store_url
from align.config.scorers import reward_spec
from align.config.settings import Settings, defaults_of
from align.config.training import of_pairs
from align.core.errors import InputError, require
from align.core.types import Preference, Result
from align.data.pairs import drawn, pairs_records, read_labelled, read_verdicts
from align.data.read.drops import tally
from align.data.read.records import LABELLED_HELP as HELP
from align.data.sources import data_records, prepared
from align.data.trained_ids import seen_by
from align.evals import judges
from align.evals.endpoint import api_key
from align.evals.judge_examples import (
    AnswerExample,
    PairExample,
    build_answer_examples,
    build_pair_examples,
    digest_examples,
    drop_learned,
)
from align.evals.judge_identity import identify_judge
from align.evals.judge_report import (
    FILE,
    LONGER,
    MIN_AGREEMENT,
    SCHEMA,
    SHORTER,
    YES_AND_NO,
    Opinions,
    explain_shortfall,
    measure_answers,
    measure_pairs,
    read_report,
)
from align.evals.llm_judge import GradedAnswer, LLMJudge, YesNoQuestion, parse_judge
from align.evals.questions import describe_yes, parse_question
from align.evals.verdicts import FIRST, SECOND, Pair
from align.ops.calibration import log_odds
from align.report import in_words
from align.report.figure_text import calibration_in_words, counted
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerStore
from align.run import Input, Run, write_json
from align.run.files import write_text
from align.stages.rows import SEEN, key_of, source_of
from align.track import peak_rss_mb

LEARNS_VERDICTS = ("reward", "dpo", "kto")
"""Stages that learn from pairs. A judge is not measured on what it learned; imitating an answer teaches no verdict."""
READ_SETTINGS = {
    "eval": ("name", "measures", "asks"),
    "stage": ("judge", "level"),
    "model": (),
    "method": (),
    "rollout": (),
}
"""Group → its settings that `eval=judge` reads, of the groups that evaluations of systems read."""
ASKS = "eval.asks"


class JudgedExamples(NamedTuple):
    """A judge, and the examples that it is measured on.

    Attributes:
        judge: `reward` for the scorer of `reward=`, or a language model.
        examples: that no reward model of the judge learned from.
        reference: name of whose verdicts they are.
        left_out: pairs that the judge learned from.
        notes: remarks on the judge's training and on the labels, a sentence each.
    """

    judge: Literal["reward"] | LLMJudge
    examples: Sequence[PairExample] | Sequence[AnswerExample]
    reference: str
    left_out: int
    notes: Sequence[str]


# Inputs


def find_inputs(config: Config) -> dict[str, Input]:
    """Return the examples and the judge as inputs of the run.

    Raises:
        InputError: a setting does not apply, the judge is none, or it reads reasoning that it was never shown.
        MissingArtifact: a reward model is not there.
    """
    refuse_unread_settings(config)
    judge = find_judge(config)
    source = source_of(config)
    if config.eval.asks:
        problem = "holds no answers with labels"
        remedy = f"Use data=files with data.path=LABELLED.jsonl, or data=manifest. {HELP}"
        require(source.name in ("files", "manifest"), "data", source.name, problem, remedy)
        inputs = data_records(source)
    else:
        of_pairs(config.data, True)
        inputs = pairs_records(source, store_url(config), config.project)
    if isinstance(judge, LLMJudge):
        return {**inputs, "judge": judge.endpoint.record(judge.identity)}
    scorers = reward_inputs(reward_spec(config.reward), config.run.folder, None)
    read_alike(models_of(scorers), config.data.reasoning, "data.reasoning")
    return {**inputs, **scorers}


def refuse_unread_settings(config: Config) -> None:
    """Raises: InputError: a setting is of systems, which are not asked here, or of data to train on."""
    for key, value in list_unread_settings(config):
        problem = "is of systems that answer, and eval=judge measures the judge on answers that are there"
        raise InputError(key, value, problem, "Drop it.")
    problem = "is measured on beside what is trained on, and nothing is trained here"
    require(config.data.eval_path is None, "data.eval_path", config.data.eval_path, problem, "Name it as data.path.")


def list_unread_settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the settings that were given and that `eval=judge` does not read, with their values."""
    defaults = Config()
    for key in ("artifact", "init"):
        if getattr(config, key) != getattr(defaults, key):
            yield key, getattr(config, key)
    if config.method.name != defaults.method.name:
        yield "method", config.method.name
    for group, read in READ_SETTINGS.items():
        settings: Settings = getattr(config, group)
        for name, default in defaults_of(type(settings)).items():
            if name not in read and getattr(settings, name) != default:
                yield f"{group}.{name}", getattr(settings, name)


def find_judge(config: Config) -> Literal["reward"] | LLMJudge:
    """Raises: InputError: `stage.judge` is no judge, is people, or is no language model where `eval.asks` needs one."""
    judge = parse_judge(config.stage.judge)
    if config.eval.asks:
        question = parse_question(config.eval.asks, ASKS)
        if not isinstance(judge, LLMJudge):
            problem = f"is answered by a language model, and stage.judge={judge} is none"
            remedy = "Add stage.judge={url: http://127.0.0.1:8000/v1, model: NAME}."
            raise InputError(ASKS, config.eval.asks, problem, remedy)
        return judge.with_question(question)
    if judge == "people":
        problem = "are whom a judge is measured against"
        raise InputError("stage.judge", judge, problem, "Name a judge, and the people's project: data=annotations.")
    return judge


# Examples


def read_examples(config: Config, inputs: dict[str, Input]) -> tuple[JudgedExamples]:
    """Read the examples that the judge is measured on.

    Raises:
        InputError: there are none, the judge learned from all of them, their verdicts are its own, a label has no
            answer, or the endpoint cannot be asked.
    """
    judge = find_judge(config)
    if isinstance(judge, LLMJudge):
        api_key(judge.endpoint)
    return (read_answers(config, judge) if config.eval.asks else read_pairs(config, judge, inputs),)


def read_answers(config: Config, judge: Literal["reward"] | LLMJudge) -> JudgedExamples:
    assert isinstance(judge, LLMJudge)
    source = source_of(config)
    every, ambiguous = build_answer_examples(read_labelled(source))
    answers = drawn(every, config.data.limit, config.seed)
    for name, label in YES_AND_NO.items():
        problem = f"has no answer labelled {name} ({str(bool(label)).lower()}), and a grader is measured on both"
        has_label = any(answer.verdict == label for answer in answers)
        require(has_label, "data", source.path or source.name, problem, "Give answers with both labels.")
    notes = [f"nobody here knows what {judge.title} was trained on"]
    if ambiguous:
        notes.append(f"{counted(ambiguous, 'answer')} left out: as many labels say yes as no")
    return JudgedExamples(judge, answers, name_source(config), 0, notes)


def read_pairs(config: Config, judge: Literal["reward"] | LLMJudge, inputs: dict[str, Input]) -> JudgedExamples:
    source = source_of(config)
    root = config.run.folder
    decided, tied = read_verdicts(source, store_url(config), config.project, config.data.allow_simulated)
    if judge == "reward":
        refuse_own_verdicts(config, inputs, [*decided, *tied])
    decided, tied = ([prepared(pref, source) for pref in side] for side in (decided, tied))
    pairs = build_pair_examples(decided, tied, config.seed)
    system = config.data.system or None
    seen = [seen_by(model, root, partial(key_of, config), system, LEARNS_VERDICTS) for model in models_of(inputs)]
    unlearned = drop_learned(pairs, seen)
    left_out = len(pairs) - len(unlearned)
    problem = f"has nothing to measure on: the judge learned from the prompts of all {counted(len(pairs), 'pair')}"
    require(bool(unlearned), "data", config.data.path or config.project, problem, "Give pairs that were held out.")
    tally(SEEN, left_out)
    if left_out:
        print(f"{counted(left_out, 'pair')} of {len(pairs):,} left out: the judge learned from their prompts")
    notes = [*dict.fromkeys(sentence for model in seen for sentence in model.unknown)]
    if isinstance(judge, LLMJudge):
        notes.append(f"nobody here knows what {judge.title} was trained on")
    examples = drawn(unlearned, config.data.limit, config.seed)
    return JudgedExamples(judge, examples, name_reference(config, [*decided, *tied]), left_out, notes)


def refuse_own_verdicts(config: Config, inputs: dict[str, Input], prefs: Sequence[Preference]) -> None:
    """Raises: InputError: the judge, or a part of it, stood in for people in these verdicts."""
    own = judges.identities(reward_spec(config.reward), inputs) & {pref.scorer for pref in prefs if pref.scorer}
    problem = f"made verdicts of {config.data.path or config.project} itself, and would agree with itself"
    require(not own, "reward", ", ".join(sorted(own)), problem, "Measure it on people's verdicts, or on others'.")


def name_source(config: Config) -> str:
    """Return the name of a file, or of the run that made a data set."""
    path = Path(config.data.path or "")
    return (path.parent if path.name == "artifact" else path).name or config.data.name


def name_reference(config: Config, prefs: Sequence[Preference]) -> str:
    """Return whose verdicts they are: people's, or of the scorers that stood in for them; of a file, its name."""
    if config.data.name != "annotations":
        return name_source(config)
    simulated = sorted({pref.scorer or "a scorer" for pref in prefs if pref.source == "simulated"})
    people = ["people"] if any(pref.source != "simulated" for pref in prefs) else []
    return " and ".join([*people, *(f"a simulated annotator ({name})" for name in simulated)])


# The run


def run(run: Run, config: Config, known: JudgedExamples) -> Result:
    identity = identify_judge(known.judge, reward_spec(config.reward), run.inputs)
    assert identity is not None, "people are not measured"
    level = config.stage.level
    notes = [*known.notes]
    too_long = 0
    if isinstance(known.judge, LLMJudge) and isinstance(known.judge.question, YesNoQuestion):
        answers = [example for example in known.examples if isinstance(example, AnswerExample)]
        examples: Sequence[PairExample] | Sequence[AnswerExample] = answers
        opinions, remarks = grade_answers(config, known.judge, answers)
        figures = measure_answers(answers, opinions, level)
    else:
        pairs = [example for example in known.examples if isinstance(example, PairExample)]
        if isinstance(known.judge, LLMJudge):
            opinions, remarks = compare_answers(config, known.judge, pairs)
        else:
            from align.evals.pair_scores import score_pairs, write_scored_pairs
            from align.models.load import choose_device, choose_dtype

            device = choose_device(config.device)
            dtype = choose_dtype(config.dtype, device)
            data_name = config.data.path or config.project
            reward = reward_spec(config.reward)
            pairs, opinions = score_pairs(reward, models_of(run.inputs), pairs, data_name, device, dtype)
            write_scored_pairs(run.folder / "held_out.jsonl", pairs, opinions)
            remarks = []
        too_long = len(known.examples) - len(pairs)
        examples = pairs
        figures = measure_pairs(pairs, opinions, level)
    notes += remarks
    path = run.artifact / FILE
    noun = "answers" if identity.asks else "pairs"
    data: dict[str, Any] = {"digest": digest_examples(examples), noun: len(examples)}
    if not identity.asks:
        data["left_out"] = known.left_out
    report = {"schema_version": SCHEMA, "judge": identity.as_dict(), "reference": known.reference, "data": data}
    write_json(path, {**report, "level": level, **figures})
    rows = (json.dumps(row) for row in list_evidence(examples, opinions))
    write_text(run.artifact / "verdicts.jsonl", "".join(f"{row}\n" for row in rows))
    why_not = explain_shortfall(read_report(path))
    metrics = {
        "judge": identity.title,
        "reference": known.reference,
        "judge_agreement": figures["agreement"]["raw"],
        "card": figures,
        "decides": not why_not,
        "why_not": why_not,
        "judge_notes": notes,
        "peak_rss_mb": peak_rss_mb(),
    }
    if identity.asks:
        metrics |= {"asks": identity.asks, "yes": describe_yes(identity.asks)}
        return Result(metrics, (*summarize_answers(metrics), *notes))
    metrics["dropped_too_long"] = too_long
    left = [f"{counted(too_long, 'pair')} longer than a reward model's context, and left out"] if too_long else []
    return Result(metrics, (*summarize_pairs(metrics), *left, *notes))


def compare_answers(config: Config, judge: LLMJudge, pairs: Sequence[PairExample]) -> tuple[Opinions, list[str]]:
    """Return the verdicts of a language model in both orders, and remarks on missing ones. The first rank asks it."""
    from align.evals.pair_accuracy import pref_text

    shown = [Pair(pair.item.id, pair.item.prompt, pref_text(pair.first), pref_text(pair.second)) for pair in pairs]
    store = AnswerStore(config.run.folder / ANSWERS)
    verdicts = ranks.from_main(judge.compare(shown, store) if ranks.is_main() else [])
    by_case = {(verdict.prompt, verdict.order): verdict for verdict in verdicts}
    first = [by_case[pair.item.id, FIRST] for pair in pairs]
    second = [by_case[pair.item.id, SECOND] for pair in pairs]
    odds = [
        log_odds((one.p + other.p) / 2) if one.p is not None and other.p is not None else None
        for one, other in zip(first, second, strict=True)
    ]
    opinions = Opinions(
        [verdict.verdict for verdict in first],
        [verdict.verdict for verdict in second],
        odds,
        [one.error or other.error for one, other in zip(first, second, strict=True)],
    )
    return opinions, judge.describe_errors(verdicts, "wrong", "its card says nothing")


def grade_answers(config: Config, judge: LLMJudge, answers: Sequence[AnswerExample]) -> tuple[Opinions, list[str]]:
    """Return the yes or no of a language model to each answer, and remarks on missing ones. The first rank asks it."""
    from align.evals.pair_accuracy import pref_text

    shown = [GradedAnswer(example.item.prompt, pref_text(example.answer), example.item.id) for example in answers]
    store = AnswerStore(config.run.folder / ANSWERS)
    verdicts = ranks.from_main(judge.grade(shown, store) if ranks.is_main() else [])
    odds = [None if verdict.p is None else log_odds(verdict.p) for verdict in verdicts]
    opinions = Opinions(
        [verdict.verdict for verdict in verdicts],
        None,
        odds,
        [verdict.error for verdict in verdicts],
        probabilities=[verdict.p for verdict in verdicts],
    )
    return opinions, judge.describe_errors(verdicts)


def list_evidence(
    examples: Sequence[PairExample] | Sequence[AnswerExample], opinions: Opinions
) -> Iterator[dict[str, Any]]:
    """Yield a row for each example, without its texts, which are in the data."""
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"id": example.item.id, "cluster": example.item.cluster, "verdict": opinions.verdicts[i]}
        if isinstance(example, AnswerExample):
            row["label"] = example.label
            if opinions.probabilities is not None and opinions.probabilities[i] is not None:
                row["p"] = opinions.probabilities[i]
        else:
            row |= {"source": example.item.category, "reference": example.verdict, "votes": example.votes}
            row["characters"] = [*example.lengths]
        if opinions.swapped is not None:
            row["swapped"] = opinions.swapped[i]
        if opinions.errors[i]:
            row["error"] = opinions.errors[i]
        if opinions.scores is not None:
            row["scores"] = [*opinions.scores[i]]
        yield row


def describe_right_to_decide(metrics: Mapping[str, Any]) -> str:
    why_not = metrics["why_not"]
    return f"too little to decide gates: {why_not}" if why_not else f"enough to decide gates ({MIN_AGREEMENT:g})"


def summarize_pairs(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of a judge of pairs in words, first whether it may decide gates."""
    card = metrics["card"]
    agreed = in_words(metrics["judge_agreement"], ".2f")
    verdicts = counted(card["agreement"]["verdicts"], "verdict")
    may_decide = describe_right_to_decide(metrics)
    yield f"{metrics['judge']} agrees with {metrics['reference']} on {agreed} of {verdicts}, {may_decide}"
    if "accuracy" in card:
        lengths = [
            f"{in_words(card['by_length'][key], '.2f')} where it is the {key} one"
            for key in (LONGER, SHORTER)
            if key in card["by_length"]
        ]
        accuracy = in_words(card["accuracy"], ".2f")
        line = f"it prefers the better answer in {accuracy} of the pairs that have one"
        yield f"{line}; {', '.join(lengths)}" if lengths else line
    if card["swap"]:
        consistent, shown_first = (in_words(card["swap"][key], ".2f") for key in ("consistency", "shown_first"))
        yield f"{consistent} of its verdicts survive a swap; the answer that is shown first wins {shown_first}"
    if card["errors"]:
        pairs = counted(card["errors"], "pair")
        yield f"it gives no verdict, or one in one order alone, on {pairs}: counted as wrong"
    for n, interval in card.get("best_of", {}).items():
        prompts = counted(interval["n"], "prompt")
        yield f"it finds the best of {n} answers in {in_words(interval, '.2f')} of {prompts}"
    if "calibration" in card:
        yield calibration_in_words(card["calibration"])
    if "between_people" in card:
        yield f"people agree with each other on {in_words(card['between_people'], '.2f')} of such pairs"


def summarize_answers(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of a judge of single answers in words, first whether it may decide gates."""
    card = metrics["card"]
    by_label = ", ".join(f"{in_words(card['by_label'][name], '.2f')} labelled {name}" for name in YES_AND_NO)
    labels = " and ".join(f"{card['labels'][name]:,} {name}" for name in YES_AND_NO)
    yield f"{metrics['judge']} is right on {by_label} ({labels}), {describe_right_to_decide(metrics)}"
    agreed = in_words(metrics["judge_agreement"], ".2f")
    answers = counted(card["agreement"]["verdicts"], "answer")
    yield f"in all it agrees with {metrics['reference']} on {agreed} of {answers}"
    if "calibration" in card:
        yield calibration_in_words(card["calibration"])
