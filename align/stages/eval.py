"""`stage=eval`: compare models on a suite of tasks, or an artifact with the model it was trained from, or test a judge.

    systems answer the items of the tasks; probes use likelihoods       align/evals/suite/answers.py, likelihoods.py
    checks or the judge score the answers; collapse is detected         align/evals/suite/scores.py
    the first system is compared with each other one; gates decide      align/evals/suite/results.py, gates.py

Without `stage.systems` the systems are the artifact and what it started from. `eval=judge` measures a judge on labelled
examples (align/evals/judges/report.py). The first half of this file resolves inputs and reads data before the run has a
name; only the second half needs torch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import Connection

from align import ranks
from align.annotate.exchange.importing import ImportRow, add_row, read_item_rows
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import compute_gold_accuracy, compute_repeat_consistency
from align.annotate.figures.project import ProjectView, compute_view_figures, read_view
from align.annotate.store import AnnotationItem as ProjectItem
from align.annotate.store import Store, configure_project
from align.annotate.store.database import make_item_id
from align.annotate.store.ledger import find_project_tombstone, read_ledger_head
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.projects import MAX_OVERLAP, compute_overlap, read_settings, read_settings_history
from align.config.groups import JUDGE, DataConfig
from align.config.identity import select_identity
from align.config.root import Config, find_store_url, to_plain_dict
from align.config.scorers import build_reward_spec
from align.config.settings import Settings, get_defaults, replace_values
from align.config.training import require_preference_data
from align.core.errors import NOT_PASSED, InputError, require
from align.core.files import parse_user_path
from align.core.redaction import drop_masks, mask_secrets
from align.core.types import Conversation, Preference, StageResult
from align.data.chat.encode import compute_max_prompt_tokens
from align.data.pairs import build_pair_inputs, read_held_out_feedback, read_judged_pairs, sample_records
from align.data.read.drops import count_dropped
from align.data.read.records import LABELLED_HELP
from align.data.sources import DataSource, build_data_inputs, build_files_input, prepare_record, read_source_prompts
from align.data.trained_ids import TrainedQuestions, collect_trained_questions, find_store_key
from align.evals.collapse import Measurement, describe_collapse, describe_new_phrase
from align.evals.endpoint import read_api_key
from align.evals.judges.identity import (
    JudgeIdentity,
    find_scorer_relation,
    find_voting_parts,
    get_scorer_title,
    identify_scorer,
    list_scorer_parts,
)
from align.evals.judges.judge_verdict import JudgeVerdict
from align.evals.judges.llm_judge import (
    LLMJudge,
    YesNoQuestion,
    collect_judge_usage,
    describe_judge_usage,
    describe_yes_answer,
    parse_judge,
    parse_price,
    parse_question,
)
from align.evals.judges.report import (
    FILE,
    SCHEMA,
    YES_AND_NO,
    AnswerExample,
    JudgeReport,
    PairExample,
    build_answer_examples,
    build_pair_examples,
    collect_answer_opinions,
    collect_pair_opinions,
    describe_reward_bench,
    digest_examples,
    drop_trained_pairs,
    explain_shortfall,
    iter_judged_rows,
    load_reports,
    measure_judge_on_answers,
    measure_judge_on_pairs,
    read_report,
)
from align.evals.stats.decisions import Decision, Look
from align.evals.suite.gates import FIELD as GATES_FIELD
from align.evals.suite.gates import (
    EvalGate,
    build_junit_xml,
    build_verdict_file,
    choose_gate_reports,
    decide_gates,
    decide_on_collapse,
    describe_decision,
    describe_plan,
    is_family_passed,
    parse_gates,
)
from align.evals.suite.people import (
    PEOPLE,
    PairQuestion,
    ProjectQuestion,
    choose_items,
    count_votes_to_ask,
    derive_display_key,
    derive_order_key,
    describe_pairs_not_asked,
    describe_votes,
    draw_display_orders,
    votes_to_verdicts,
)
from align.evals.suite.results import (
    ScoredTask,
    compute_results,
    describe_system,
    describe_task_results,
    iter_answer_rows,
    iter_verdict_rows,
)
from align.evals.suite.systems import System, describe_self_judging, match_answers, resolve_systems
from align.evals.suite.tasks import (
    DEFAULT_TASK,
    EvalItem,
    EvalTask,
    Tasks,
    build_items,
    build_task_input,
    drop_trained_items,
    load_task_items,
    mark_nearly_trained_items,
    parse_tasks,
    repeat_items,
)
from align.evals.text import QUOTED_LETTERS
from align.models.base import (
    build_run_label,
    find_adapter_folder,
    find_artifact,
    find_base_of_artifact,
    find_reference_artifact,
    to_artifact,
)
from align.report import format_interval
from align.report.figure_text import pluralize
from align.report.judge_page import iter_summary_lines
from align.reward.checkers.checked import combine_code_settings
from align.reward.inputs import (
    load_reward_artifacts,
    require_matching_reasoning,
    require_row_checks,
    resolve_reward_inputs,
)
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerStore
from align.run import Artifact, Input, Manifest, Run, json_digest, write_json
from align.run.files import write_text
from align.stages.runner import StageInputs, load_input_artifact, open_rollout_engine, open_store, resolve_stage_start
from align.track import get_peak_rss_mb, truncate_text

if TYPE_CHECKING:
    from align.evals.suite.answers import Sampling, TaskAnswers
    from align.evals.suite.scores import Judge

PRELOAD = ("align.evals.suite.samples", "align.evals.suite.likelihoods", "align.rollout.registry")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""
MIN_PROMPTS = 64
"""Minimum number of prompts for a result that decides: with 64, the 95 % interval of a win rate is about ±0.12."""
SEEN = "dropped_seen"
"""Name of the metric that counts the prompts left out because the model was trained on them."""
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
HOW_TO_NAME_LLM = "Add stage.judge={url: http://127.0.0.1:8000/v1, model: NAME}."
POLICY = "policy"
"""Name of the evaluated artifact in a comparison with the model it was trained from."""
START = "start"
"""Name of the model that the evaluated artifact was trained from, in a comparison with it."""
ANSWER_SETTINGS = ("seed", "device", "dtype", "model", "method", "data", "rollout")
"""Parts of the configuration on which the sampled answers depend, from which a project name is derived."""
WORD = re.compile(r"[^\W_]+")
GOLD_HELP = 'Write {"prompt": "…", "answers": ["…", "…"], "expected": [[0], [1]]}.'
VERDICTS = "verdicts"
"""Name of the folder in a run's artifact with one file of the verdict of each gate."""
VOTES = "people.json"
"""Name of the file in a run's artifact with the number of people's votes and their reliability."""
PROJECT_SETTINGS = {
    "title": "Two answers",
    "order": "priority",
    "turned_by_item": True,
    "gold_share": 0.1,
    "repeat_share": 0.1,
}
"""Settings of a new annotation project. Changes that people make to them later stay, see also `needs_more_votes`."""
MANIFEST_FIGURES = ("by", "role", "asks", "yes", "items", "dropped", "systems", "against")
"""Keys of a task's results that go into the manifest's metrics too; the others are only in `results.json`."""


# Inputs


def inputs(config: Config) -> StageInputs:
    """Resolve the models to evaluate, the prompts and the judge of `stage=eval`, and raise InputError if they do not
    fit.

    That is an artifact and the model it was trained from, or the models and tasks of a suite, or a judge and examples.
    """
    if config.eval.measures == JUDGE:
        title = "grader" if config.eval.asks else f"judge-{config.reward.name}"
        records = build_judge_inputs(config)
        return StageInputs(config, title, None, records, partial(read_examples, config, records))
    refuse_inapplicable_settings(config)
    if config.stage.systems is not None:
        suite = resolve_suite(config)
        first = suite.first_model
        config = replace_values(config, method=replace_values(config.method, name=first.method if first else "auto"))
        title = f"{build_run_label(first.base, first.method)}-{suite.name}" if first and first.base else suite.name
        base = first.base if first else None
        return StageInputs(config, title, base, suite.records, partial(load_suite_items, config, suite))
    is_auto = config.method.name == "auto"
    artifact, base, config = resolve_stage_start(config, config.artifact, "artifact")
    if is_auto and artifact.whole:  # a whole model is loaded without a method
        config = replace_values(config, method=replace_values(config.method, name="full"))
    root = config.run.folder
    start = None
    if config.init != Config().init or artifact.manifest is None:
        start = find_artifact(config.init, root, config.model.path, config.model.revision, "init")
    reference = find_reference_artifact(artifact, start, root)
    data = build_data_inputs(DataSource.from_settings(config.data))
    judge = resolve_reward_inputs(build_reward_spec(config.reward), root, base)
    require_matching_reasoning(load_reward_artifacts(judge), config.rollout.reasoning)
    reward = to_plain_dict(config)["reward"]
    judge_standing = find_scorer_relation(artifact, list_scorer_parts(reward, judge), root)
    judge_standing.require_independent(get_scorer_title(reward, judge), artifact.ref, config.stage.allow_proxy)
    records = {"artifact": artifact.as_input(), **data, **judge}
    if reference is not None:
        if not artifact.whole and find_base_of_artifact(reference, "init").digest != base.digest:
            raise InputError("init", reference.ref, f"is on another base than {artifact.ref}", "Name one on this base.")
        records["init"] = reference.as_input()
    rows = partial(read_unseen_prompts, config, artifact)
    return StageInputs(config, build_run_label(base, config.method.name), base, records, rows)


class UnseenPrompts(NamedTuple):
    """The prompts to evaluate an artifact on, and the number of prompts left out because it was trained on them.

    Attributes:
        prompts: the prompts.
        trained_questions: the record of the artifact's training data.
        left_out: number of prompts left out because training saw them.
    """

    prompts: Sequence[Conversation]
    trained_questions: TrainedQuestions
    left_out: int


def read_unseen_prompts(config: Config, artifact: Artifact) -> UnseenPrompts:
    """Read the held-out prompts to evaluate an artifact on. With `stage.seen=drop`, leave out any it was trained on.

    Raises:
        InputError: `stage.seen=drop`, and the artifact was trained on all prompts.
    """
    stage = config.stage
    source = replace(DataSource.from_settings(config.data), limit=None)  # the limit applies after prompts were left out
    test_prompts = read_source_prompts(source, "test", config.seed)
    trained_questions = collect_trained_questions(
        artifact, config.run.folder, partial(find_store_key, find_store_url(config)), config.data.system or None
    )
    dropped = 0
    if stage.seen == "drop":
        count = len(test_prompts)
        unseen = [prompt for prompt in test_prompts if not trained_questions.asks(prompt.messages)]
        problem = f"leaves no prompt to measure on: {artifact.ref} was trained on all {pluralize(count, 'prompt')}"
        remedy = "Give a file of its own to measure on (data.eval_path=FILE), or write stage.seen=report."
        require(bool(unseen), "stage.seen", "drop", problem, remedy)
        dropped = count - len(unseen)
        count_dropped(SEEN, dropped)
        if dropped:
            print(f"{dropped} of {pluralize(count, 'prompt')} left out: training saw them")
        test_prompts = unseen
    test_prompts = test_prompts[: config.data.limit][: stage.prompts]
    require_row_checks(build_reward_spec(config.reward), test_prompts)
    return UnseenPrompts(test_prompts, trained_questions, dropped)


def refuse_inapplicable_settings(config: Config) -> None:
    """Raise InputError if the configuration mixes settings for comparing several models and for one artifact.

    The former, such as `eval.tasks` and `stage.judge`, need `stage.systems`; the latter are `artifact` and `init`.
    Settings of `eval=judge` and of people's votes that do not apply are refused too.
    """
    suite = config.eval
    stage = config.stage
    for key, value in (("votes", stage.votes), ("gold", stage.gold)):
        problem = "applies only if people judge"
        require(value is None or stage.judge == PEOPLE, f"stage.{key}", value, problem, "Add stage.judge=people.")
    problem = "applies to eval=judge, and this evaluation measures systems"
    remedy = "Write eval.tasks=[{name: NAME, asks: QUESTION}]."
    require(not suite.asks, "eval.asks", suite.asks, problem, remedy)
    remedy = "Add stage.systems={new: …, old: …}."
    if stage.systems is None:
        for key, value in (("tasks", suite.tasks), ("gates", suite.gates)):
            problem = "applies to several systems, and stage.systems is not set"
            require(value is None, f"eval.{key}", value, problem, remedy)
        require(
            not stage.allow_code,
            "stage.allow_code",
            True,
            "applies to tasks with checks, and no task has one",
            "Drop it.",
        )
        problem = "applies to several systems, and stage.systems is not set"
        require(stage.judge == "reward", "stage.judge", stage.judge, problem, remedy)
        require(stage.answers == 1, "stage.answers", stage.answers, problem, remedy)
        return
    remedy = "Name who answers in stage.systems alone."
    for key, value, default in (("artifact", config.artifact, Config().artifact), ("init", config.init, Config().init)):
        require(
            value == default,
            key,
            value,
            "applies to the evaluation of one artifact, and stage.systems names several",
            remedy,
        )
    problem = (
        "applies to the evaluation of one artifact; with stage.systems, prompts from the training data are "
        "always left out"
    )
    require(stage.seen == "drop", "stage.seen", stage.seen, problem, "Drop it.")


class Suite(NamedTuple):
    """The models ("systems"), tasks, gates and judge of an evaluation, resolved before the run has a name.

    Attributes:
        name: name of the suite.
        records: inputs of the run: systems, files of tasks, data, the judge and its reports.
        judge: judge of the tasks without checks, see `stage.judge`.
        reports: the judge's reports that `stage.card` names.
        first_model: the first system with a base; None if all systems are files of answers or servers.
    """

    systems: Sequence[System]
    tasks: Sequence[EvalTask]
    name: str
    records: dict[str, Input]
    gates: Sequence[EvalGate]
    judge: Literal["reward", "people"] | LLMJudge
    reports: Sequence[JudgeReport]
    first_model: System | None


def resolve_suite(config: Config) -> Suite:
    """Resolve the models, tasks, gates and judge of an evaluation suite from the configuration.

    Raises:
        InputError: one of them is invalid.
        MissingArtifact: a system or a reward model does not exist.
    """
    root = config.run.folder
    systems = resolve_systems(
        config.stage.systems,
        root,
        first=config.stage.first,
        path=config.model.path,
        revision=config.model.revision,
        method=config.method.name,
    )
    tasks = parse_tasks(config.eval.tasks, combine_code_settings(config.stage.allow_code, config.stage.unsafe_code))
    gates = parse_gates(config.eval.gates, tasks, [system.name for system in systems])
    probe_name = next((task.name for task in tasks if task.probe is not None), None)
    for system in systems:
        problem = f"only answers chats, and task {probe_name} measures log-likelihoods, which needs the model itself"
        remedy = "Leave out the system, or the task."
        require(probe_name is None or system.base is not None, system.field, system.ref, problem, remedy)
    first = systems[0]
    problem = "is no artifact, and gates decide about an artifact"
    require(not gates or first.artifact is not None, first.field, first.ref, problem, "Name the artifact first.")
    records = {f"systems.{system.name}": system.record for system in systems}
    records |= {f"tasks.{task.name}": build_task_input(task) for task in tasks if task.has_own_prompts}
    if not all(task.has_own_prompts for task in tasks):
        records |= build_data_inputs(DataSource.from_settings(config.data))
    model = next((system for system in systems if system.base is not None), None)
    judge = parse_judge(config.stage.judge)
    questions = [task for task in tasks if task.asks]
    for task in questions:
        problem = f"needs a language model as judge, and stage.judge={config.stage.judge} is none"
        asks = truncate_text(task.asks, QUOTED_LETTERS)
        require(isinstance(judge, LLMJudge), f"{task.field}, asks", asks, problem, HOW_TO_NAME_LLM)
    if isinstance(judge, LLMJudge):
        graders = [judge.with_question(task.asks).identity.digest for task in questions]
        identity = json_digest([judge.identity.digest, *graders]) if graders else judge.identity.digest
        records |= {"judge": judge.endpoint.record(identity)}
    elif judge == PEOPLE:
        records |= build_vote_inputs(config, records, [system.name for system in systems])
    else:
        scorers = resolve_reward_inputs(build_reward_spec(config.reward), root, model and model.base)
        require_matching_reasoning(load_reward_artifacts(scorers), config.rollout.reasoning)
        records |= scorers
    reports, report_records = load_reports(config.stage.card, root)
    records |= report_records
    # Tasks without the name of a suite.
    has_own_tasks = config.eval.tasks is not None and config.eval.name == DEFAULT_TASK
    name = "tasks" if has_own_tasks else config.eval.name
    return Suite(systems, tasks, name, records, gates, judge, reports, model)


@dataclass(frozen=True, slots=True)
class LoadedSuite:
    """An evaluation suite with the items of its tasks, and the items left out because a model was trained on them.

    Attributes:
        tasks: the tasks with their items.
        files: see `align.evals.suite.answers.Files`.
        left_out: task → number of items left out because a system was trained on them.
        unknown: sentences on training data of the systems that is not known.
        reports: gate → report of the judge that decides it, for the gates on judged tasks.
    """

    suite: Suite
    tasks: Tasks
    files: Mapping[str, Mapping[tuple[str, str], Sequence[str]]]
    left_out: Mapping[str, int]
    unknown: Sequence[str]
    reports: Mapping[str, JudgeReport]


def load_suite_items(config: Config, suite: Suite) -> tuple[LoadedSuite]:
    """Read the items of a suite's tasks, and leave out items that an evaluated model was trained on.

    Also checks that the judge and the endpoints can be used. Returns a tuple of one, the stage's argument.

    Raises:
        InputError: a task has no item left, a judge was the reward of a system or may not decide a gate, or an endpoint
            cannot be used.
    """
    stage = config.stage
    root = config.run.folder
    system_prompt = config.data.system or None
    artifacts = {system.name: system.artifact for system in suite.systems if system.artifact is not None}
    trained_questions = [
        collect_trained_questions(artifact, root, partial(find_store_key, find_store_url(config)), system_prompt)
        for artifact in artifacts.values()
    ]
    tasks, counts = drop_trained_items([(task, read_items(config, task)) for task in suite.tasks], trained_questions)
    for name, count in counts.items():
        if count:
            print(f"{name}: {pluralize(count, 'item')} left out: training saw them")
    unknown = [sentence for questions in trained_questions for sentence in questions.unknown]
    if stage.near is not None:
        tasks, near_unknown = mark_nearly_trained_items(tasks, artifacts, root, find_store_url(config), stage.near)
        unknown += near_unknown
    limit = min(stage.prompts, config.data.limit or stage.prompts)
    tasks = [(task, items[: task.prompts or (None if task.has_own_prompts else limit)]) for task, items in tasks]
    tasks = [(task, items if task.probe is not None else repeat_items(items, stage.answers)) for task, items in tasks]
    reports = choose_reports(config, suite, tasks)
    for system in suite.systems:
        if system.endpoint is not None:
            read_api_key(system.endpoint)
            tool_item = next((item.id for _, items in tasks for item in items if item.prompt.tools), None)
            problem = f"would call the tools of item {tool_item}, and tool calls cannot be scored as text"
            require(tool_item is None, system.field, system.ref, problem, "Leave out items with tools, or the system.")
    named_items = [(task.name, item) for task, items in tasks for item in items]
    files = {system.name: match_answers(system, named_items) for system in suite.systems if system.is_file}
    return (LoadedSuite(suite, tasks, files, counts, [*dict.fromkeys(unknown)], reports),)


def read_items(config: Config, task: EvalTask) -> Sequence[EvalItem]:
    """Read all prompts of an evaluation task with their checks, from its own file, from lm-eval or from `data=`.

    Raises:
        InputError: the task has no item, or a row is invalid.
    """
    if task.probe is not None and task.probe.harness is not None:
        from align.evals.suite.lm_eval import load_harness_items  # lm-eval is an extra

        return load_harness_items(task, task.probe.harness)
    allow_code = combine_code_settings(config.stage.allow_code, config.stage.unsafe_code)
    if task.path:
        return load_task_items(task, config.data.system or None, allow_code)
    source = replace(DataSource.from_settings(config.data), limit=None)
    return build_items(task, read_source_prompts(source, "test", config.seed), allow_code)


def choose_reports(config: Config, suite: Suite, tasks: Tasks) -> Mapping[str, JudgeReport]:
    """Return for each gate the report of the judge's agreement with people that allows the judge to decide it.

    Gates on tasks without a judge need none.

    Raises:
        InputError: the judge cannot be used, was a system's reward, or may not decide a gate; or `stage.judge=people`
            and no task needs a judge.
    """
    judged_tasks = [task.name for task, items in tasks if items[0].check is None and task.probe is None]
    problem = "has nothing to judge: every task has checks or is a probe"
    remedy = "Drop it, or add a task without checks."
    require(bool(judged_tasks) or suite.judge != PEOPLE, "stage.judge", PEOPLE, problem, remedy)
    is_proxy = False
    if judged_tasks and isinstance(suite.judge, LLMJudge):
        read_api_key(suite.judge.endpoint)
    elif judged_tasks and suite.judge != PEOPLE:
        reward = to_plain_dict(config)["reward"]
        root = config.run.folder
        title = get_scorer_title(reward, suite.records)
        parts = list_scorer_parts(reward, suite.records)
        for system in suite.systems:
            if system.artifact is not None:
                judge_standing = find_scorer_relation(system.artifact, parts, root)
                judge_standing.require_independent(title, system.ref, config.stage.allow_proxy)
                is_proxy = is_proxy or bool(judge_standing.proxy)
    identity: JudgeIdentity | None = None  # people have no identity
    if isinstance(suite.judge, LLMJudge):
        identity = suite.judge.identity
    elif suite.judge != PEOPLE:
        identity = identify_scorer(build_reward_spec(config.reward), suite.records)
    judge_of_task = dict.fromkeys(judged_tasks, identity)
    if isinstance(suite.judge, LLMJudge):
        judge_of_task |= {task.name: suite.judge.with_question(task.asks).identity for task, _ in tasks if task.asks}
    return choose_gate_reports(suite.gates, judge_of_task, suite.reports, config.stage.card, is_proxy)


def build_vote_inputs(config: Config, records: Mapping[str, Input], systems: Sequence[str]) -> dict[str, Input]:
    """Return the run's inputs for people as the judge: the annotation project up to its last vote, and the gold pairs.

    Args:
        records: the other inputs of the run.
        systems: names of the systems, which people must not read.

    Raises:
        InputError: the project's name contains a system's, the project was erased, or `stage.gold` is no file of gold
            pairs.
    """
    stage = config.stage
    project = choose_project_name(config, records)

    def to_words(name: str) -> str:
        return f" {' '.join(WORD.findall(name.lower()))} "

    revealed = next((name for name in systems if to_words(name) in to_words(project)), None)
    problem = f"its name contains the system's name {revealed}, and annotators see it: they would not judge blindly"
    require(revealed is None, "project", project, problem, "Choose a project name without names of systems.")
    gold_record = {}
    if stage.gold is not None:
        read_gold_pairs(parse_user_path(stage.gold, "stage.gold"))
        gold_record = {"gold": build_files_input(stage.gold, "stage.gold")}
    with open_store(config) as store, store.reading() as db:
        row = find_project_tombstone(db, project)
        problem = f"it was erased (row {row} of the ledger), and its name is not used again"
        if config.project == Config().project:
            problem += "; without project=, this evaluation always has this name"
        require(row is None, "project", project, problem, "Name another project: project=NAME.")
        head = read_ledger_head(db, project, votes_only=True)
    # A project without votes is identified by its store and name.
    place = json_digest([drop_masks(mask_secrets(find_store_url(config))), project])
    return {"votes": Input(head.hash if head.seq else place, project=project, seq=head.seq), **gold_record}


def choose_project_name(config: Config, records: Mapping[str, Input]) -> str:
    """Return the name of the annotation project for people's votes: `project=`, or by default `people-` with a digest.

    The digest is over the models, the tasks and the settings of sampling.
    """
    if config.project != Config().project:
        return config.project
    settings = select_identity("eval", to_plain_dict(config), records)
    digests = {
        key: record.digest for key, record in records.items() if key.partition(".")[0] in ("data", "systems", "tasks")
    }
    tasks = [{key: value for key, value in task.items() if key != "path"} for task in config.eval.tasks or ()]
    answer_settings = {key: settings.get(key) for key in ANSWER_SETTINGS}
    identity = [answer_settings, tasks, config.stage.prompts, config.stage.answers, digests]
    return f"people-{json_digest(identity)[:8]}"


def read_gold_pairs(path: Path) -> list[ImportRow]:
    """Read answer pairs with a known better answer from a file, which are shown among others to test annotators.

    Raises:
        InputError: a row has no expected order, or not two answers.
    """
    rows = read_item_rows(path, "gold", "stage.gold")
    for row in rows:
        is_valid = row.expected is not None and len(row.answers) == 2
        require(is_valid, row.where, row.id, "is no pair with a known order", GOLD_HELP)
    return rows


# Inputs of `eval=judge`


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
    decided, tied = read_judged_pairs(source, find_store_url(config), config.project, config.data.allow_simulated)
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


# The run


def run(run: Run, config: Config, *rows: Any) -> StageResult:
    with collect_judge_usage() as usage:
        if config.eval.measures == JUDGE:
            result = measure_and_publish_judge(run, config, *rows)
        elif config.stage.systems is not None:
            result = compare_systems(run, config, *rows)
        else:
            result = compare_with_start(run, config, *rows)
    if not usage.asked:
        return result
    price = parse_price(config.stage.judge)
    cost = None if price is None else usage.compute_cost(price)
    metrics = {**result.metrics, "judge_usage": asdict(usage) | ({} if cost is None else {"cost": cost})}
    return replace(result, metrics=metrics, summary=(*result.summary, describe_judge_usage(usage, cost)))


def make_sampling(run: Run, config: Config, seed_of: Callable[[System, EvalItem], int] | None = None) -> Sampling:
    """Build the settings for sampling answers from the configuration: seed, device, dtype, lengths, temperature,
    engine.

    Args:
        seed_of: see `Sampling`.
    """
    from align.evals.suite.answers import Sampling, list_computing_versions
    from align.models.load import choose_device, choose_dtype, read_configurations
    from align.rollout.engine_process import VLLM, find_engine_version

    rollout = config.rollout
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    engine = [rollout.engine, *list_computing_versions(device)]
    # Servers that run already are identified by their URLs, since their version is unknown.
    if rollout.engine == "vllm":
        servers = rollout.urls or [find_engine_version(VLLM, rollout.python, "rollout.python")]
        engine += [*servers, rollout.dtype, *rollout.words]

    def open_system_engine(system: System, tokenizer: Any) -> Any:
        assert system.base is not None
        generation_config = read_configurations(system.base).generation_config
        return open_rollout_engine(run, config, system.base, system.method, tokenizer, generation_config)

    return Sampling(
        root=config.run.folder,
        seed=config.seed,
        device=device,
        dtype=dtype,
        dtype_setting=config.dtype,
        max_length=config.data.max_length,
        template=config.data.template,
        template_kwargs=config.data.template_kwargs,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        batch_size=rollout.batch_size,
        hides_reasoning=rollout.reasoning == "hide",
        engine=" ".join(engine),
        open_engine=open_system_engine,
        seed_of=seed_of,
    )


class ScoringResult(NamedTuple):
    """The scored answers of all tasks, and for each model if its answers collapsed to few texts.

    Attributes:
        tasks: the scored tasks.
        notes: notes on the judge.
        collapse: task → system → the measurement whether its answers collapsed to few texts.
    """

    tasks: list[ScoredTask]
    notes: list[str]
    collapse: Mapping[str, Mapping[str, Measurement]]


def score_and_measure_tasks(
    config: Config, tasks: Sequence[TaskAnswers], load_judge: Callable[[Sequence[TaskAnswers]], Judge]
) -> ScoringResult:
    """Score the answers to all tasks by checks or by the judge, and measure how varied each model's answers are.

    Args:
        load_judge: loads the judge, given the tasks without checks.
    """
    from align.evals.suite.scores import measure_tasks, score_tasks

    allow_code = combine_code_settings(config.stage.allow_code, config.stage.unsafe_code)
    judged_tasks = [task for task in tasks if task.is_judged]
    judge = load_judge(judged_tasks) if judged_tasks else None
    scored = score_tasks(tasks, judge, allow_code)
    notes = [*(judge.notes if judge else ()), *(note for task in scored for note in task.notes)]
    collapse = measure_tasks(tasks, judge, config.eval.closed, allow_code, config.rollout.reasoning == "hide")
    return ScoringResult(scored, notes, collapse)


def load_reward_as_judge(run: Run, config: Config, sampling: Sampling, systems: Sequence[System]) -> Judge:
    """Load the reward model or function of `reward=` as the judge of these models' answers."""
    from align.evals.suite.scores import load_reward_judge

    reward = run.manifest.config["reward"]
    artifacts = [system.artifact for system in systems if system.artifact is not None]
    spec = build_reward_spec(config.reward)
    return load_reward_judge(reward, spec, run.inputs, artifacts, config.run.folder, sampling)


# An artifact and its start


def compare_with_start(
    run: Run, config: Config, prompts: Sequence[Any], trained_questions: TrainedQuestions, left_out: int
) -> StageResult:
    """Compare an artifact with the model it was trained from: sample answers of both to held-out prompts, and judge
    them.

    Writes `samples.jsonl` and `metrics.json`, with win rate, KL divergence and collapse.

    Args:
        prompts: the prompts that both answer.
        trained_questions: the record of the artifact's training data.
        left_out: number of prompts left out because training saw them.
    """
    from align.evals.suite.answers import ask_systems
    from align.evals.suite.samples import build_samples, measure_kl, summarise_samples, summarise_unseen, write_samples
    from align.models.load import get_context_length, read_configurations
    from align.rollout.engine import derive_place_seed, warn_about_cut_answers
    from align.rollout.strip_reasoning import warn_about_empty_answers

    policy, ref = find_policy_and_start(run, config)

    def seed_of(system: System, item: EvalItem) -> int:
        return derive_place_seed(config.seed, "eval", "policy" if system.name == POLICY else "ref", int(item.id))

    sampling = make_sampling(run, config, seed_of)
    items = [EvalItem(str(i), prompt.id or str(i), "", prompt, None) for i, prompt in enumerate(prompts)]
    [task] = ask_systems(sampling, [policy, ref], [(EvalTask(DEFAULT_TASK), items)], {})
    kl = measure_kl(sampling, policy, ref, task.rollouts[POLICY])
    sampling.loaded.clear()
    [scored], notes, collapse = score_and_measure_tasks(
        config, [task], lambda judged: load_reward_as_judge(run, config, sampling, [policy])
    )
    role = scored.role
    samples = build_samples(task, scored, kl, trained_questions)
    notes = [*notes, *describe_changed_settings(policy, config), *trained_questions.unknown]
    policy_collapse = collapse[DEFAULT_TASK][POLICY]
    metrics = {
        **summarise_samples(samples, role),
        **policy_collapse.as_dict(),
        "dropped": task.dropped,
        "judge": scored.by,
        "judge_is": role,
        "judge_notes": notes,
        **summarise_unseen(samples, role),
        "seen_unknown": len(trained_questions.unknown),
        "peak_rss_mb": get_peak_rss_mb(),
    }
    write_samples(run.artifact / "samples.jsonl", samples)
    write_json(run.artifact / "metrics.json", metrics)

    win_rate = metrics["win_rate"]
    risen_word = metrics["most_risen_word"]
    scores = metrics[role]
    distinct = metrics["distinct2"]
    greedy = metrics["variety"].get("greedy", {})
    headline = (
        f"win rate {format_interval(win_rate)} on {win_rate['n']} prompts by {scored.by}, {role} {scores['ref']:.3f} → "
        f"{scores['policy']:.3f}, KL {metrics['kl']:.2f} nats, distinct-2 {distinct['ref']:.3f} → "
        f"{distinct['policy']:.3f}"
    )
    word_rates = f"{risen_word['ref']:.0%} → {risen_word['policy']:.0%}"
    lines = [
        *describe_collapse({"the policy": policy_collapse.collapse}),
        *describe_cached_answers(sampling),
        headline,
        f"the word that rose most: {risen_word['word']!r}, in {word_rates} of the answers",
        *describe_new_phrase(policy_collapse.collapse, greedy.get("new_phrase"), START),
    ]
    owners = {"ref": "start's ", "policy": "policy's "}
    for side, owner in owners.items():
        lines += warn_about_cut_answers(1 - metrics["eos_rate"][side], config.rollout.max_new_tokens, owner)
    for side, owner in owners.items():
        lines += warn_about_empty_answers(metrics["empty_rate"][side], sampling.hides_reasoning, owner)
    lines += notes
    if "seen" in metrics:
        line = f"training saw {metrics['seen']:,} of these prompts"
        if unseen := metrics.get("unseen"):
            line += f"; win rate {format_interval(unseen['win_rate'])} on the {unseen['win_rate']['n']} others"
        lines.append(line)
    if task.dropped:
        context = get_context_length(read_configurations(run.base))
        room = compute_max_prompt_tokens(context, config.data.max_length, config.rollout.max_new_tokens)
        lines.append(f"not asked: {pluralize(task.dropped, 'prompt')} longer than {room} tokens")
    warning = explain_few_prompts(len(samples), config.data, config.stage.prompts, seen=left_out, too_long=task.dropped)
    return StageResult(metrics, (warning, *lines) if warning else tuple(lines))


class PolicyAndStart(NamedTuple):
    """An evaluated artifact and the model it was trained from, which are compared.

    Attributes:
        policy: the artifact.
        start: the adapter or model that its training started from, with the artifact's tokenizer.
    """

    policy: System
    start: System


def find_policy_and_start(run: Run, config: Config) -> PolicyAndStart:
    """Return the evaluated artifact and the model it was trained from, each as a System to sample answers from.

    These are two adapters on one base, an adapter and its base, or two whole models.
    """
    record = run.inputs["artifact"]
    title = f"artifact={record.ref}"
    artifact = load_input_artifact(run, "artifact")
    method = "lora" if artifact.whole else config.method.name
    policy = System(POLICY, record.ref, artifact, run.base, method, record, label=title)
    start = None
    if "init" in run.inputs:
        start = load_input_artifact(run)
    base = run.base
    if artifact.whole:
        assert start is not None, "inputs() raises InputError for such an artifact"
        base = find_base_of_artifact(start, "init")
    elif start is None or find_adapter_folder(start) is None:
        start = to_artifact(base)
    start_title = f"what {title} started from"
    ref = System(START, start.ref, start, base, method, start.as_input(), tokenized_as=policy, label=start_title)
    return PolicyAndStart(policy, ref)


def explain_few_prompts(measured: int, data: DataConfig, max_prompts: int, *, seen: int = 0, too_long: int = 0) -> str:
    """Return a warning if fewer than `MIN_PROMPTS` prompts were evaluated, with the setting to change.

    Returns an empty text for a larger evaluation.

    Args:
        measured: number of prompts that were answered.
        data: the settings of the data.
        max_prompts: `stage.prompts`.
        seen: number of prompts left out because training saw them.
        too_long: number of prompts left out because they are too long.
    """
    if measured >= MIN_PROMPTS:
        return ""
    before = measured + too_long
    if before == max_prompts:
        cause = f"stage.prompts={max_prompts} limits the number. Raise it"
    elif before == data.limit:
        cause = f"data.limit={data.limit} limits the number. Raise it, or leave it out"
    elif before >= MIN_PROMPTS:
        cause = (
            f"{pluralize(too_long, 'prompt')} did not fit. Raise data.max_length={data.max_length}, or lower "
            "rollout.max_new_tokens"
        )
    elif before + seen >= MIN_PROMPTS:
        cause = (
            f"stage.seen=drop left out {pluralize(seen, 'prompt')} that training saw. Measure on other prompts: "
            "data.eval_path=FILE"
        )
    else:
        cause = explain_small_data(data)
    prompts = pluralize(measured, "prompt")
    return (
        f"this result is no basis for a decision: it is measured on {prompts}, and at least {MIN_PROMPTS} are "
        f"needed; {cause}"
    )


def explain_small_data(data: DataConfig) -> str:
    """Return a sentence about the `data.` setting that leaves too few held-out prompts, and how to change it."""
    if data.eval_path is not None:
        return f"data.eval_path={data.eval_path} has too few. Give a larger file"
    if data.name == "manifest":
        return (
            f"the data set {data.path} has too few held-out questions. Make it again with more held out (stage=data "
            "data.held_out=SHARE)"
        )
    if data.name == "reasoning_gym":
        return "too few questions are held out. Raise size in data.tasks, or data.held_out, before training"
    if data.name == "annotations":
        return "the project has too few held-out questions. Measure on a file: data=files data.path=FILE"
    return (
        f"data.held_out={data.held_out:g} holds out too few questions of {data.path or data.name}. Raise it before "
        f"training "
        "(data.held_out=0.3), or measure on a file of its own: data.eval_path=FILE"
    )


def describe_changed_settings(policy: System, config: Config) -> list[str]:
    """Return a sentence on sampling settings, such as the temperature, that differ from those of the policy's PPO run.

    Returns an empty list if all are equal or the policy is not from PPO.
    """
    manifest: Manifest | None = policy.artifact.manifest if policy.artifact else None
    if manifest is None or manifest.stage != "ppo":
        return []
    training_settings = manifest.config["rollout"]
    eval_settings = to_plain_dict(config)["rollout"]
    keys = ("temperature", "max_new_tokens", "reasoning")
    changed = [key for key in keys if training_settings.get(key) != eval_settings[key]]
    if not changed:
        return []
    before = ", ".join(f"rollout.{key}={training_settings.get(key)}" for key in changed)
    now = ", ".join(f"rollout.{key}={eval_settings[key]}" for key in changed)
    return [f"{policy.ref} was optimised with {before}, and answers here with {now}"]


# Systems on the tasks of a suite


def compare_systems(run: Run, config: Config, loaded_suite: LoadedSuite) -> StageResult:
    """Sample the answers of all models of a suite, score them, and compare the first model with each other one.

    Writes `answers.jsonl`, `verdicts.jsonl`, `results.json` and the gates' verdict files.
    """
    from align.evals.suite.answers import ask_systems
    from align.evals.suite.likelihoods import measure_probes
    from align.evals.suite.scores import combine_verdicts_by_system

    suite = loaded_suite.suite
    looks = find_earlier_looks(config.run.folder, suite)
    sampling = make_sampling(run, config)
    answered_tasks = [(task, items) for task, items in loaded_suite.tasks if task.probe is None]
    scored: list[ScoredTask] = []
    notes: list[str] = []
    collapse: Mapping[str, Mapping[str, Measurement]] = {}
    if answered_tasks:
        answers = ask_systems(sampling, suite.systems, answered_tasks, loaded_suite.files)
        sampling.loaded.clear()
        scored, notes, collapse = score_and_measure_tasks(
            config, answers, partial(load_judge, run, config, sampling, suite)
        )
    models = [system for system in suite.systems if system.base is not None]
    probes = measure_probes(sampling, models, loaded_suite.tasks, run.artifact)
    by_name = {task.name: task for task in scored} | probes
    scored = [by_name[task.name] for task, _ in loaded_suite.tasks]
    write_json_lines(run.artifact / "answers.jsonl", iter_answer_rows(scored))
    write_json_lines(run.artifact / "verdicts.jsonl", iter_verdict_rows(scored))

    first = suite.systems[0].name
    system_collapse = combine_verdicts_by_system(collapse, [system.name for system in suite.systems])
    decisions = decide_gates(suite.gates, scored, config.eval.gate_family, looks)
    gates = {
        gate.name: (gate, decide_on_collapse(gate, decisions[gate.name], first, system_collapse[first]))
        for gate in suite.gates
    }
    results = compute_results(scored, config.stage.level, config.stage.shown)
    notes = [*dict.fromkeys([*notes, *loaded_suite.unknown])]
    systems = [describe_system(system) for system in suite.systems]
    measurements = {
        task: {system: measurement.as_dict() for system, measurement in by_system.items()}
        for task, by_system in collapse.items()
    }
    content = {"systems": systems, "tasks": results, "collapse": measurements, "notes": notes}
    write_json(run.artifact / "results.json", content)

    likelihoods = sampling.likelihoods
    collapse_figures = {name: verdict.as_dict() for name, verdict in system_collapse.items()}
    # Lists of runs show the first task's comparison of the first two systems.
    comparison = next(iter(next(iter(results.values()))["against"].values()), {})
    metrics = {
        "systems": systems,
        "tasks": {name: {k: v for k, v in task.items() if k in MANIFEST_FIGURES} for name, task in results.items()},
        "answers_made": sampling.answers.now,
        "dropped_seen": sum(loaded_suite.left_out.values()),
        "judge_notes": notes,
        "peak_rss_mb": get_peak_rss_mb(),
        **({"likelihoods_made": likelihoods.now} if likelihoods.now or likelihoods.before else {}),
        **{key: comparison[key] for key in ("win_rate", "difference") if key in comparison},
        **(publish_verdicts(run, loaded_suite, gates, config.eval.gate_family) if gates else {}),
        "collapse": {**collapse_figures[first], "systems": collapse_figures},
    }
    lines = [
        *(describe_collapse(system_collapse) if collapse else []),
        *describe_cached_answers(sampling),
        *(line for name, task in results.items() for line in describe_task_results(first, name, task)),
        *(describe_decision(gate, decision) for gate, decision in gates.values()),
    ]
    for task, by_system in collapse.items():
        greedy = measurements[task][first]["variety"].get("greedy", {})
        reference = suite.systems[1].name
        for line in describe_new_phrase(by_system[first].collapse, greedy.get("new_phrase"), reference):
            lines.append(f"{task}, {first}: {line}")
    return StageResult(metrics, (*lines, *notes))


def load_judge(
    run: Run, config: Config, sampling: Sampling, suite: Suite, judged_tasks: Sequence[TaskAnswers]
) -> Judge:
    """Load the judge of a suite: a reward, a language model behind an endpoint, or people's votes.

    For people, the answer pairs are added to the annotation project and its votes are read.

    Args:
        judged_tasks: the answers to judge. Pairs of them are put before people here, if people are the judge.
    """
    from align.evals.suite.scores import Judge, score_by_llm, score_by_people

    if isinstance(suite.judge, LLMJudge):
        store = AnswerStore(config.run.folder / ANSWERS)
        notes = describe_self_judging(suite.judge.endpoint, suite.systems)
        return Judge(partial(score_by_llm, suite.judge, store, sampling.hides_reasoning), notes)
    if suite.judge == PEOPLE:
        verdicts, notes = ranks.broadcast(
            fill_project_and_read_votes(run, config, judged_tasks) if ranks.is_main() else ProjectVotes({}, [])
        )
        return Judge(partial(score_by_people, verdicts), notes)
    trained_systems = [system for system in suite.systems if system.artifact is not None and system.artifact.manifest]
    return load_reward_as_judge(run, config, sampling, trained_systems)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a file, one JSON object per line, or write no file if there are no rows."""
    if text := "".join(f"{json.dumps(row)}\n" for row in rows):
        write_text(path, text)


def describe_cached_answers(sampling: Sampling) -> list[str]:
    """Return sentences on the numbers of answers and log-likelihoods that were taken from the cache of earlier runs."""
    counts = (("answer", sampling.answers), ("log-likelihood", sampling.likelihoods))
    return [
        f"{count.before:,} of {pluralize(count.before + count.now, noun)} were taken from the cache"
        for noun, count in counts
        if count.before
    ]


def publish_verdicts(
    run: Run, loaded_suite: LoadedSuite, gates: Mapping[str, tuple[EvalGate, Decision]], family: str
) -> dict[str, Any]:
    """Write the gates' verdict files and `junit.xml`, and return the gates' outcomes and the exit status as metrics."""
    digests = {"artifact": loaded_suite.suite.systems[0].record.digest}
    for name, record in run.inputs.items():
        if name.startswith(("tasks.", "systems.", "card")):
            digests[name] = record.digest
    folder = run.artifact / VERDICTS
    folder.mkdir(exist_ok=True)
    for name, (gate, decision) in gates.items():
        judge_report = loaded_suite.reports[name].as_dict() if name in loaded_suite.reports else None
        write_json(folder / f"{name}.json", build_verdict_file(gate, decision, digests, judge_report))
    write_text(run.artifact / "junit.xml", build_junit_xml(run.name, gates, family))
    outcomes = {name: decision.outcome for name, (_, decision) in gates.items()}
    return {"gates": outcomes, "exit_status": 0 if is_family_passed(outcomes.values(), family) else NOT_PASSED}


def find_earlier_looks(root: Path, suite: Suite) -> dict[str, list[Look]]:
    """Return name of a gate → its earlier evaluations, in order, for gates that may be evaluated again as data arrive.

    They are those of finished runs on the same artifact and the same other system.

    Raises:
        InputError: the plan of a gate changed since an earlier evaluation, or a verdict file cannot be read.
    """
    from align.registry.gates import iter_verdicts

    fields = {
        gate.name: (f"{GATES_FIELD}[{i}]", gate)
        for i, gate in enumerate(suite.gates)
        if gate.max_n is not None or suite.judge == PEOPLE
    }
    looks: dict[str, list[Look]] = {name: [] for name in fields}
    verdicts = [verdict for verdict in iter_verdicts(root) if verdict.run is not None] if fields else []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.run.publication if verdict.run else (0, "")):
        field, gate = fields.get(verdict.gate, ("", None))
        if gate is None or verdict.condition != gate.condition or not verdict.looks:
            continue
        compared = {"artifact": suite.systems[0].record.digest}
        compared |= {
            f"systems.{system.name}": system.record.digest for system in suite.systems if system.name == gate.against
        }
        if any(verdict.inputs.get(name) != digest for name, digest in compared.items()):
            continue
        plan = describe_plan(gate)
        problem = f"was evaluated before, by {verdict.source}, with another plan: {verdict.plan}"
        remedy = "Keep the plan, or give the gate another name."
        require(verdict.plan == plan, field, plan, problem, remedy)
        known = looks[gate.name]
        for look in (Look(**values) for values in verdict.looks):
            if look.data not in {each.data for each in known} and (not known or look.n > known[-1].n):
                known.append(look)
    return looks


# People as the judge of a suite, through a project of the annotation app


class ProjectVotes(NamedTuple):
    """The verdicts of people on the answer pairs of an evaluation, and notes about them.

    Attributes:
        verdicts: (task, name of the second system) → the verdicts.
        notes: notes on the verdicts.
    """

    verdicts: Mapping[tuple[str, str], Sequence[JudgeVerdict]]
    notes: Sequence[str]


def fill_project_and_read_votes(run: Run, config: Config, tasks: Sequence[TaskAnswers]) -> ProjectVotes:
    """Add the answer pairs of an evaluation to its annotation project, as far as missing, and read people's votes on
    them.

    Creates the project if it does not exist. Writes `people.json` into the artifact.

    Raises:
        InputError: the project was erased, or has items of something else.
    """
    from align.evals.suite.scores import iter_pair_questions

    project = run.inputs["votes"].project
    last_seq = run.inputs["votes"].seq
    hides_reasoning = config.rollout.reasoning == "hide"
    pairs = [question for task in tasks for question in iter_pair_questions(task, hides_reasoning)]
    displayable = [question for question in pairs if not question.pair.prompt.uses_tools]
    questions = [question for question in displayable if not question.is_tie]
    gold = read_gold_pairs(parse_user_path(config.stage.gold, "stage.gold")) if config.stage.gold else []
    counts = {
        "pairs": len(pairs),
        "same_text": len(displayable) - len(questions),
        "with_tools": len(pairs) - len(displayable),
    }
    if not questions:
        verdicts = votes_to_verdicts(displayable, {}, (), b"")  # without a key: all of them count, in any order
        notes = describe_pairs_not_asked(counts, counts["same_text"])
        return ProjectVotes(verdicts, [*notes, "no pair is left to ask people about"])
    with open_store(config) as store:
        configure_project(store, project)
        secret = store.key(project)
        assert secret is not None, "configure() raises InputError for an erased project"
        project_items = fill_project(store, project, secret, questions, config.stage.votes, gold, config.seed)
        with store.reading():  # one transaction, so that both see the same votes
            view = read_view(store, project).through(last_seq)
            rankings = load_counted_rankings(store, project, config.data.allow_simulated, last_seq)
    verdicts = votes_to_verdicts(displayable, project_items, rankings, derive_order_key(secret, config.seed))
    # Pairs with the same text are ties without a vote, and so without a voter.
    ties = sum(not verdict.by for pair_verdicts in verdicts.values() for verdict in pair_verdicts)
    counts |= {"same_text_counted": ties, "asked": len(project_items)}
    figures = {"project": project, **counts, **summarize_votes(view, project)}
    write_json(run.artifact / VOTES, figures)
    command = ["python", "-m", "align", "stage=annotate", f"project={project}"]
    if config.run.root != Config().run.root:
        command.append(f"run.root={config.run.root}")
    url = config.store.url
    if url and mask_secrets(url) == url:  # a URL with a password is set in the environment instead
        command.append(f"store.url={url}")
    vote_notes = describe_votes(figures, shlex.join(command), bool(config.run.name))
    return ProjectVotes(verdicts, [*describe_pairs_not_asked(counts, ties), *vote_notes])


def fill_project(
    store: Store,
    project: str,
    secret: bytes,
    questions: Sequence[PairQuestion],
    votes: int | None,
    gold: Sequence[ImportRow],
    seed: int,
) -> dict[str, ProjectQuestion]:
    """Add answer pairs to the annotation project until it can collect `votes` votes, and return them by item id.

    Creates the project if it does not exist. All pairs are added in one transaction, so that an interrupted run adds
    none. Items that exist keep the order of their two answers.

    Args:
        secret: the project's key.
        votes: number of votes to collect; None for one vote on each pair and some more.
        gold: gold pairs to add.

    Raises:
        InputError: the project has items of something else, or too many votes are requested.
    """
    question_of = {make_item_id(project, question.key(secret)): question for question in questions}
    items = {item.id: item for item in store.items(project)}
    foreign = items.keys() - question_of.keys() - read_view(store, project).expected.keys()
    problem = f"it holds {pluralize(len(foreign), 'item')} of something other than this evaluation"
    require(not foreign, "project", project, problem, "Name another project: project=NAME.")
    existing = {
        id: find_first_answer_id(project, question_of[id], item) for id, item in items.items() if id in question_of
    }

    vote_count = count_votes_to_ask(votes, len(question_of))
    limit = MAX_OVERLAP * len(question_of)
    remedy = f"Ask for up to {limit:,}, or about more prompts."
    require(
        vote_count <= limit,
        "stage.votes",
        votes,
        f"are too many votes for {pluralize(len(question_of), 'pair')}",
        remedy,
    )
    order = derive_order_key(secret, seed)
    absent = [id for id in choose_items(question_of, existing, vote_count, order) if id not in existing]
    erased = [id for id in absent if store.find_first_row(project, item=id) is not None]
    new = [id for id in absent if id not in erased]
    new_gold = [row for row in gold if make_item_id(project, row.key) not in items]
    with store.transaction() as db:
        if not existing and not erased:
            configure_project(store, project, PROJECT_SETTINGS)
        if new or needs_more_votes(db, project, existing, erased, vote_count):
            configure_project(store, project, compute_overlap([*existing, *new], vote_count))
        settings = read_settings(db, project)
        # Items with the first system's answer first, minus items with it second.
        ahead = sum(1 if answer_id.endswith("-0") else -1 for answer_id in existing.values())
        groups = [(question_of[id].other, settings.count_wanted_votes(id)) for id in new]
        shows_first = draw_display_orders(groups, derive_display_key(secret, seed, len(existing)), ahead)
        for id, first_is_shown_first in zip(new, shows_first, strict=True):
            question = question_of[id]
            priority = 1 - question.draw(order)
            candidates = question.candidates(first_is_shown_first)
            store.add_item(project, question.key(secret), question.prompt, candidates, priority=priority)
        for row in new_gold:
            add_row(store, project, row)
    questions_and_items = [(question_of[item.id], item) for item in store.items(project) if item.id in question_of]
    return {
        item.id: ProjectQuestion(question, find_first_answer_id(project, question, item))
        for question, item in questions_and_items
    }


def needs_more_votes(
    db: Connection, project: str, existing: Collection[str], erased: Collection[str], votes: int
) -> bool:
    """Return whether a project's overlap, its number of votes per item, has to be raised to collect `votes` votes.

    It is not raised if an earlier run of this evaluation has set the same overlap: then a person has changed it since.

    Args:
        existing: ids of the project's items.
        erased: ids of its erased items.
        votes: number of votes to collect.
    """
    if not existing or sum(map(read_settings(db, project).count_wanted_votes, existing)) >= votes:
        return False
    overlap = compute_overlap([*existing, *erased], votes).items()
    return not any(overlap <= asdict(settings).items() for _, settings in read_settings_history(db, project))


def find_first_answer_id(project: str, question: PairQuestion, item: ProjectItem) -> str:
    """Return the id of the candidate in an annotation item that is the answer of the evaluation's first model.

    Raises:
        InputError: the item has another prompt or other answers than the question.
    """
    answer_id = question.find_first_answer(item)
    if answer_id is None:
        problem = f"item {question.pair.id} of task {question.task} has another prompt or other answers in this project"
        raise InputError("project", project, problem, "Name another project: project=NAME.")
    return answer_id


def summarize_votes(view: ProjectView, project: str) -> dict[str, Any]:
    """Return the number of people's votes in an annotation project and their reliability, as a JSON object.

    It lists the annotators by pseudonym.
    """
    project_figures = compute_view_figures(view, project)
    gold, gold_votes, gold_right = compute_gold_accuracy(view.rankings, view.expected)
    repeats = compute_repeat_consistency(view.rankings)
    people = [
        {
            "pseudonym": person["pseudonym"],
            "votes": person["rankings"],
            "skips": sum(person["skips"].values()),
            **{key: person[key] for key in ("ties", "gold", "gold_votes", "gold_right", "repeats")},
            "shown_first": person["position"]["share"],
        }
        for person in project_figures["people"]
        if person["rankings"] or sum(person["skips"].values())  # without people whose votes were all taken back
    ]
    return {
        "votes": len(view.work),
        "wanted": sum(view.votes_wanted.values()),
        "skips": len(view.skips),
        "settled": len(view.reviewed_items),
        "agreement": project_figures["agreement"],
        "shown_first": project_figures["position"]["share"],
        "longer": project_figures["length"]["share"],
        **as_json({"gold": gold, "gold_votes": gold_votes, "gold_right": gold_right, "repeats": repeats}),
        "people": people,
    }


# The run of `eval=judge`


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
