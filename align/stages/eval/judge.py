"""`eval=judge`: measure a judge on labelled answers or answer pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.annotate.store.vote_selection import VoteSelection
from align.config.root import Config, find_store_url
from align.config.scorers import build_reward_spec
from align.config.settings import Settings, get_defaults
from align.config.training import require_preference_data
from align.core.errors import InputError, require
from align.core.types import Preference, StageResult
from align.data.pairs import VoteSource, build_pair_inputs, read_held_out_feedback, read_judged_pairs, sample_records
from align.data.read.conversations import LABELLED_HELP
from align.data.read.drops import count_dropped
from align.data.sources import DataSource, build_data_inputs, prepare_record
from align.data.trained_ids import SEEN, collect_trained_questions, find_store_key
from align.evals.endpoint import read_api_key
from align.evals.judges.examples import (
    YES_AND_NO,
    AnswerExample,
    PairExample,
    build_answer_examples,
    build_pair_examples,
    digest_examples,
    drop_trained_pairs,
)
from align.evals.judges.figures import describe_reward_bench, measure_judge_on_answers, measure_judge_on_pairs
from align.evals.judges.identity import find_voting_parts, identify_scorer, list_scorer_parts
from align.evals.judges.llm_judge import (
    HOW_TO_NAME_LLM,
    LLMJudge,
    YesNoQuestion,
    describe_yes_answer,
    parse_judge,
    parse_question,
)
from align.evals.judges.opinions import collect_answer_opinions, collect_pair_opinions, iter_judged_rows
from align.evals.judges.report import FILE, SCHEMA, explain_shortfall, read_report
from align.report.figure_text import pluralize
from align.report.judge_page import iter_summary_lines
from align.reward.inputs import load_reward_artifacts, require_matching_reasoning, resolve_reward_inputs
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerStore
from align.run import Input, Run, write_json
from align.run.files import write_json_lines
from align.stages.runner import StageInputs
from align.track import get_peak_rss_mb

LEARNS_VERDICTS = ("reward", "dpo", "kto")
"""Stages that train on verdicts. A reward model is not measured on the examples that it learned in such a run.

Other stages imitate answers, from which no verdict is learned.
"""
READ_SETTINGS = {
    "eval": ("name", "measures", "asks"),
    "stage": ("judge", "level"),
    "model": (),
    "method": (),
    "rollout": (),
}
"""Group of the configuration → its settings that `eval=judge` reads. An evaluation of models reads all of them."""
ASKS = "eval.asks"


class JudgedExamples(NamedTuple):
    """A judge, and the labelled answers or answer pairs on which its agreement with the labels is measured.

    Attributes:
        judge: `reward` for the scorer of `reward=`, or a language model.
        examples: the examples, without any that a reward model of the judge learned from.
        reference: name of the source of the verdicts, such as people.
        left_out: number of pairs left out because the judge learned from them.
        notes: sentences on the judge's training and on the labels.
    """

    judge: Literal["reward"] | LLMJudge
    examples: Sequence[PairExample] | Sequence[AnswerExample]
    reference: str
    left_out: int
    notes: Sequence[str]


def resolve_judge_inputs(config: Config) -> StageInputs:
    """Resolve the judge to measure and the labelled examples, see `build_judge_inputs`."""
    title = "grader" if config.eval.asks else f"judge-{config.reward.name}"
    records = build_judge_inputs(config)
    return StageInputs(config, title, None, records, partial(read_examples, config, records))


def build_judge_inputs(config: Config) -> dict[str, Input]:
    """Return the labelled examples and the judge of `eval=judge` as inputs for the manifest, by name.

    Raises:
        InputError: a setting does not apply, `stage.judge` is no judge, or a reward model was trained without the
            reasoning that the answers contain.
        MissingArtifact: a reward model does not exist.
    """
    refuse_unread_settings(config)
    judge = find_judge(config)
    source = DataSource.from_settings(config.data)
    if config.eval.asks:
        problem = "holds no answers with labels"
        remedy = f"Use data=files with data.path=LABELLED.jsonl, or data=manifest. {LABELLED_HELP}"
        require(source.name in ("files", "manifest"), "data", source.name, problem, remedy)
        inputs = build_data_inputs(source)
    else:
        require_preference_data(config.data, True)
        inputs = build_pair_inputs(source, find_store_url(config), config.project)
    if isinstance(judge, LLMJudge):
        return {**inputs, "judge": judge.endpoint.record(judge.identity.digest)}
    scorers = resolve_reward_inputs(build_reward_spec(config.reward), config.run.folder, None)
    require_matching_reasoning(load_reward_artifacts(scorers), config.data.reasoning, "data.reasoning")
    return {**inputs, **scorers}


def refuse_unread_settings(config: Config) -> None:
    """Raise InputError if a setting that `eval=judge` does not read is not at its default.

    These are the settings of models that generate answers, and `data.eval_path`.
    """
    defaults = Config()
    unread: dict[str, Any] = {}
    for key in ("artifact", "init"):
        if getattr(config, key) != getattr(defaults, key):
            unread[key] = getattr(config, key)
    if config.method.name != defaults.method.name:
        unread["method"] = config.method.name
    for group, names in READ_SETTINGS.items():
        settings: Settings = getattr(config, group)
        for name, default in get_defaults(type(settings)).items():
            if name not in names and getattr(settings, name) != default:
                unread[f"{group}.{name}"] = getattr(settings, name)
    for key, value in unread.items():
        problem = "applies to systems that generate answers, and eval=judge measures the judge on existing answers"
        raise InputError(key, value, problem, "Drop it.")
    problem = "names held-out data beside training data, and this evaluation trains nothing"
    require(config.data.eval_path is None, "data.eval_path", config.data.eval_path, problem, "Name it as data.path.")


def find_judge(config: Config) -> Literal["reward"] | LLMJudge:
    """Return the judge that `eval=judge` measures: the scorer of `reward=`, or a language model behind an endpoint.

    Raises:
        InputError: `stage.judge` is no judge or is people, or it is no language model, which `eval.asks` needs.
    """
    judge = parse_judge(config.stage.judge)
    if config.eval.asks:
        question = parse_question(config.eval.asks, ASKS)
        if not isinstance(judge, LLMJudge):
            problem = f"needs a language model as judge, and stage.judge={judge} is none"
            raise InputError(ASKS, config.eval.asks, problem, HOW_TO_NAME_LLM)
        return judge.with_question(question)
    if judge == "people":
        problem = "are the reference that a judge is measured against"
        raise InputError("stage.judge", judge, problem, "Name a judge, and the people's project: data=annotations.")
    return judge


def read_examples(config: Config, inputs: dict[str, Input]) -> tuple[JudgedExamples]:
    """Read the labelled answers or answer pairs on which `eval=judge` measures the judge, in a tuple of one.

    Raises:
        InputError: there is no example, the judge learned from all of them, the verdicts are its own, a label has no
            answer, or the endpoint cannot be used.
    """
    judge = find_judge(config)
    if isinstance(judge, LLMJudge):
        read_api_key(judge.endpoint)
        if config.eval.asks:
            return (read_answers(config, judge),)
    return (read_pairs(config, judge, inputs),)


def read_answers(config: Config, judge: LLMJudge) -> JudgedExamples:
    """Read the held-out answers with a yes-or-no label, for a judge of single answers.

    Raises unless both labels occur.
    """
    source = DataSource.from_settings(config.data)
    all_answers, ambiguous = build_answer_examples(read_held_out_feedback(source))
    answers = sample_records(all_answers, config.data.limit, config.seed)
    for name, verdict in YES_AND_NO.items():
        problem = (
            f"has no answer labelled {name} ({str(bool(verdict)).lower()}), and a grader is measured on both labels"
        )
        has_label = any(answer.verdict == verdict for answer in answers)
        require(has_label, "data", source.path or source.name, problem, "Give answers with both labels.")
    notes = [f"the training data of {judge.title} is not known"]
    if ambiguous:
        notes.append(f"{pluralize(ambiguous, 'answer')} left out: equally many labels say yes and no")
    return JudgedExamples(judge, answers, name_source(config), 0, notes)


def read_pairs(config: Config, judge: Literal["reward"] | LLMJudge, inputs: dict[str, Input]) -> JudgedExamples:
    """Read the held-out preference pairs for a judge of answer pairs, without prompts that the judge was trained on.

    Raises:
        InputError: no pair is left, or the judge made some of the labels itself.
    """
    source = DataSource.from_settings(config.data)
    root = config.run.folder
    selection = VoteSelection.from_settings(config.data)
    last_row = inputs["data"].seq if inputs["data"].seq >= 0 else None
    votes = VoteSource(find_store_url(config), config.project, selection, last_row)
    decided, tied = read_judged_pairs(source, votes)
    if judge == "reward":
        refuse_own_verdicts(config, inputs, [*decided, *tied])
    decided, tied = ([prepare_record(pref, source) for pref in side] for side in (decided, tied))
    pairs = build_pair_examples(decided, tied, config.seed)
    system_prompt = config.data.system or None
    trained_questions = [
        collect_trained_questions(
            model, root, partial(find_store_key, find_store_url(config)), system_prompt, LEARNS_VERDICTS
        )
        for model in load_reward_artifacts(inputs)
    ]
    unlearned = drop_trained_pairs(pairs, trained_questions)
    left_out = len(pairs) - len(unlearned)
    problem = f"has nothing to measure on: the judge was trained on the prompts of all {pluralize(len(pairs), 'pair')}"
    require(bool(unlearned), "data", config.data.path or config.project, problem, "Give pairs that were held out.")
    count_dropped(SEEN, left_out)
    if left_out:
        print(f"{pluralize(left_out, 'pair')} of {len(pairs):,} left out: the judge was trained on their prompts")
    notes = [*dict.fromkeys(sentence for questions in trained_questions for sentence in questions.unknown)]
    if isinstance(judge, LLMJudge):
        notes.append(f"the training data of {judge.title} is not known")
    examples = sample_records(unlearned, config.data.limit, config.seed)
    return JudgedExamples(judge, examples, name_reference(config, [*decided, *tied]), left_out, notes)


def refuse_own_verdicts(config: Config, inputs: dict[str, Input], prefs: Sequence[Preference]) -> None:
    """Raise InputError if the reward that is measured made some of the labels itself, as a simulated annotator."""
    parts = list_scorer_parts(build_reward_spec(config.reward), inputs)
    own_parts = {part for scorer in {pref.scorer for pref in prefs} for part in find_voting_parts(parts, scorer)}
    problem = (
        f"made some verdicts of {config.data.path or config.project} itself, so it would be measured against itself"
    )
    remedy = "Measure it on verdicts of people or of another judge."
    require(not own_parts, "reward", ", ".join(sorted(own_parts)), problem, remedy)


def name_source(config: Config) -> str:
    """Return the name of the labelled data for a judge's report: that of a file or of the run that made a data set."""
    path = Path(config.data.path or "")
    return (path.parent if path.name == "artifact" else path).name or config.data.name


def name_reference(config: Config, prefs: Sequence[Preference]) -> str:
    """Return a phrase for a judge's report about the origin of the labels: people, simulated annotators, or a file."""
    if config.data.name != "annotations":
        return name_source(config)
    simulated = sorted({pref.scorer or "a scorer" for pref in prefs if pref.source == "simulated"})
    people = ["people"] if any(pref.source != "simulated" for pref in prefs) else []
    return " and ".join([*people, *(f"a simulated annotator ({name})" for name in simulated)])


def measure_and_publish_judge(run: Run, config: Config, labelled: JudgedExamples) -> StageResult:
    """Get a judge's verdicts on labelled examples, and write its agreement with the labels to the artifact.

    The files are `card.json` and `verdicts.jsonl`.
    """
    judge = labelled.judge
    reward = build_reward_spec(config.reward)
    identity = judge.identity if isinstance(judge, LLMJudge) else identify_scorer(reward, run.inputs)
    store = AnswerStore(config.run.folder / ANSWERS)
    level = config.stage.level
    notes = [*labelled.notes]
    too_long = 0
    if isinstance(judge, LLMJudge) and isinstance(judge.question, YesNoQuestion):
        answers = [example for example in labelled.examples if isinstance(example, AnswerExample)]
        examples: Sequence[PairExample] | Sequence[AnswerExample] = answers
        opinions, remarks = collect_answer_opinions(judge, answers, store)
        figures = measure_judge_on_answers(answers, opinions, level)
    else:
        pairs = [example for example in labelled.examples if isinstance(example, PairExample)]
        if isinstance(judge, LLMJudge):
            opinions, remarks = collect_pair_opinions(judge, pairs, store)
        else:
            from align.evals.judges.pair_scores import score_pairs, write_scored_pairs
            from align.models.load import choose_device, choose_dtype

            device = choose_device(config.device)
            dtype = choose_dtype(config.dtype, device)
            data_name = config.data.path or config.project
            pairs, opinions = score_pairs(reward, load_reward_artifacts(run.inputs), pairs, data_name, device, dtype)
            write_scored_pairs(run.folder / "held_out.jsonl", pairs, opinions)
            remarks = []
        too_long = len(labelled.examples) - len(pairs)
        examples = pairs
        figures = measure_judge_on_pairs(pairs, opinions, level)
    notes += remarks
    path = run.artifact / FILE
    data: dict[str, Any] = {"digest": digest_examples(examples)}
    data |= {"answers": len(examples)} if identity.asks else {"pairs": len(examples), "left_out": labelled.left_out}
    header = {"schema_version": SCHEMA, "judge": identity.as_dict(), "reference": labelled.reference, "data": data}
    write_json(path, {**header, "level": level, **figures})
    write_json_lines(run.artifact / "verdicts.jsonl", iter_judged_rows(examples, opinions))
    shortfall = explain_shortfall(read_report(path))
    metrics = {
        "judge": identity.title,
        "reference": labelled.reference,
        "judge_agreement": figures["agreement"]["raw"],
        "card": figures,
        "decides": not shortfall,
        "why_not": shortfall,
        "judge_notes": notes,
        "peak_rss_mb": get_peak_rss_mb(),
    }
    if identity.asks:
        metrics |= {"asks": identity.asks, "yes": describe_yes_answer(identity.asks)}
        return StageResult(metrics, (*iter_summary_lines(metrics), *notes))
    metrics["dropped_too_long"] = too_long
    if too_long:
        notes = [f"{pluralize(too_long, 'pair')} longer than a reward model's context, and left out", *notes]
    return StageResult(metrics, (*iter_summary_lines(metrics), *describe_reward_bench(figures), *notes))
