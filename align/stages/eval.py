"""`stage=eval`: systems on the tasks of a suite, an artifact against what it started from, or a judge.

    the systems answer the items of the tasks, the probes are weighed     align/evals/suite/answers.py, likelihoods.py
    checks or the judge score the answers; is a system collapsed?         align/evals/suite/scores.py
    the first system is compared with each other one; gates decide        align/evals/suite/results.py, gates.py

Without `stage.systems` the systems are the artifact and its start. `eval=judge` measures a judge on examples whose
verdict is known (align/evals/judges/report.py). What is read before the run has a name is the first half of this file;
only the second half needs torch.
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
from align.annotate.store import Store, configure
from align.annotate.store.database import make_item_id
from align.annotate.store.ledger import find_project_tombstone, read_head
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.projects import MAX_OVERLAP, compute_overlap, read_settings, read_settings_history
from align.config.groups import JUDGE, DataConfig
from align.config.identity import select_identity
from align.config.root import Config, find_store_url, to_plain_dict
from align.config.scorers import build_reward_spec
from align.config.settings import Settings, get_defaults, replace_values
from align.config.training import require_pairs
from align.core.errors import NOT_PASSED, InputError, require
from align.core.files import parse_user_path
from align.core.redaction import drop_masks, mask_secrets
from align.core.types import Preference, StageResult
from align.data.chat.encode import prompt_room
from align.data.pairs import build_pair_inputs, read_held_out_feedback, read_verdicts, sample_records
from align.data.read.drops import count_dropped
from align.data.read.records import LABELLED_HELP
from align.data.sources import DataSource, build_data_inputs, build_files_input, prepare_record, read_source_prompts
from align.data.trained_ids import TrainedQuestions, collect_trained_questions, find_store_key
from align.evals.collapse import Measurement, describe_collapse, describe_new_phrase
from align.evals.endpoint import read_api_key
from align.evals.judges.identity import (
    JudgeIdentity,
    find_scorer_relation,
    get_scorer_title,
    identify_scorer,
    list_scorer_parts,
)
from align.evals.judges.judge_verdict import JudgeVerdict
from align.evals.judges.llm_judge import (
    LLMJudge,
    YesNoQuestion,
    collect_judge_usage,
    get_yes_phrase,
    parse_judge,
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
    digest_examples,
    drop_trained_pairs,
    explain_shortfall,
    iter_judged_rows,
    load_reports,
    measure_judge_on_answers,
    measure_judge_on_pairs,
    read_report,
)
from align.evals.stats import Decision
from align.evals.suite.gates import (
    EvalGate,
    build_junit_xml,
    build_verdict_file,
    check_gates,
    decide_gate,
    decide_on_collapse,
    describe_decision,
    parse_gates,
)
from align.evals.suite.people import (
    PEOPLE,
    PairQuestion,
    choose_items,
    count_votes_to_ask,
    derive_order_key,
    derive_sides_key,
    describe_pairs_not_asked,
    describe_votes,
    draw_sides,
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
from align.evals.suite.systems import System, describe_self_judging, match_answers, open_systems
from align.evals.suite.tasks import (
    DEFAULT_TASK,
    EvalItem,
    EvalTask,
    Tasks,
    build_items,
    build_task_input,
    drop_seen,
    load_items,
    mark_nearly_trained,
    parse_tasks,
    repeat_items,
)
from align.evals.text import QUOTED_LETTERS
from align.models.base import adapter_folder, as_artifact, base_of, find_artifact, find_reference, label
from align.report import in_words
from align.report.figure_text import counted
from align.report.judge_page import list_lines
from align.reward.checkers.checked import combine_code_settings
from align.reward.inputs import check_reasoning_matches, check_rows, load_reward_artifacts, reward_inputs
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerStore
from align.run import Artifact, Input, Manifest, Run, json_digest, write_json
from align.run.files import write_text
from align.stages.runner import Inputs, find_input, find_start, open_rollout_engine, open_store
from align.track import get_peak_rss_mb, truncate_text

if TYPE_CHECKING:
    from align.evals.suite.answers import Sampling, TaskAnswers
    from align.evals.suite.scores import Judge

PRELOAD = ("align.evals.suite.samples", "align.evals.suite.likelihoods", "align.rollout.registry")
"""See `align.stages.load_stage`."""
ENOUGH = 64
"""Prompts: at 64, a win rate's 95 % interval is about 0.12 to each side of it."""
SEEN = "dropped_seen"
"""Counts the prompts that are not asked because training saw them."""
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
HOW_TO_NAME_LLM = "Add stage.judge={url: http://127.0.0.1:8000/v1, model: NAME}."
POLICY = "policy"
START = "start"
"""The artifact and what it started from, as systems."""
DECIDE = ("seed", "device", "dtype", "model", "method", "data", "rollout")
"""Parts of the configuration that decide the answers and the prompts."""
WORD = re.compile(r"[^\W_]+")
GOLD_HELP = 'Write {"prompt": "…", "answers": ["…", "…"], "expected": [[0], [1]]}.'
VERDICTS = "verdicts"
"""Of a run's artifact, for verdict files."""
VOTES = "people.json"
"""Of a run's artifact: how many votes there are, and how far they can be believed."""
OPENED_WITH = {
    "title": "Two answers",
    "order": "priority",
    "turned_by_item": True,
    "gold_share": 0.1,
    "repeat_share": 0.1,
}
"""Settings of a project that is opened. If a person changes them afterwards, that stays; see also `wants_more`."""
IN_MANIFEST = ("by", "role", "asks", "yes", "items", "dropped", "systems", "against")
"""Figures of a task that the manifest has too; the others are in `results.json`."""


# Inputs


def inputs(config: Config) -> Inputs:
    if config.eval.measures == JUDGE:
        title = "grader" if config.eval.asks else f"judge-{config.reward.name}"
        records = find_judge_inputs(config)
        return Inputs(config, title, None, records, partial(read_examples, config, records))
    check_one_kind(config)
    if config.stage.systems is not None:
        suite = find_suite(config)
        first = suite.first_model
        config = replace_values(config, method=replace_values(config.method, name=first.method if first else "auto"))
        title = f"{label(first.base, first.method)}-{suite.name}" if first and first.base else suite.name
        base = first.base if first else None
        return Inputs(config, title, base, suite.records, partial(read_work, config, suite))
    is_auto = config.method.name == "auto"
    artifact, base, config = find_start(config, config.artifact, "artifact")
    if is_auto and artifact.whole:  # it is measured as it is
        config = replace_values(config, method=replace_values(config.method, name="full"))
    root = config.run.folder
    named = config.init != Config().init or artifact.manifest is None
    asked = find_artifact(config.init, root, config.model.path, config.model.revision, "init") if named else None
    reference = find_reference(artifact, asked, root)
    data = build_data_inputs(DataSource.from_settings(config.data))
    judge = reward_inputs(build_reward_spec(config.reward), root, base)
    check_reasoning_matches(load_reward_artifacts(judge), config.rollout.reasoning)
    reward = to_plain_dict(config)["reward"]
    standing = find_scorer_relation(artifact, list_scorer_parts(reward, judge), root)
    standing.require_independent(get_scorer_title(reward, judge), artifact.ref, config.stage.allow_proxy)
    records = {"artifact": artifact.as_input(), **data, **judge}
    if reference is not None:
        if not artifact.whole and base_of(reference, "init").digest != base.digest:
            raise InputError("init", reference.ref, f"is on another base than {artifact.ref}", "Name one on this base.")
        records["init"] = reference.as_input()
    rows = partial(read_unseen_prompts, config, artifact)
    return Inputs(config, label(base, config.method.name), base, records, rows)


def read_unseen_prompts(config: Config, artifact: Artifact) -> tuple[Any, ...]:
    """Return the prompts to measure an artifact on, what it was trained on, and how many prompts were left out because
    training saw them.

    Raises:
        InputError: it was trained on all of them, and what it saw is to be left out.
    """
    stage = config.stage
    source = replace(DataSource.from_settings(config.data), limit=None)  # some may be left out
    asked = read_source_prompts(source, "test", config.seed)
    seen = collect_trained_questions(
        artifact, config.run.folder, partial(find_store_key, find_store_url(config)), config.data.system or None
    )
    left_out = 0
    if stage.seen == "drop":
        unseen = [prompt for prompt in asked if not seen.asks(prompt.messages)]
        problem = f"leaves nothing to measure on: {artifact.ref} was trained on all {counted(len(asked), 'prompt')}"
        remedy = "Give a file of its own to measure on (data.eval_path=FILE), or write stage.seen=report."
        require(bool(unseen), "stage.seen", "drop", problem, remedy)
        left_out = len(asked) - len(unseen)
        count_dropped(SEEN, left_out)
        if left_out:
            print(f"{left_out} of {counted(len(asked), 'prompt')} left out: training saw them")
        asked = unseen
    asked = asked[: config.data.limit][: stage.prompts]
    check_rows(build_reward_spec(config.reward), asked)
    return asked, seen, left_out


def check_one_kind(config: Config) -> None:
    """Refuse settings of several systems if none are named, and settings of one artifact if systems are named.

    Raises:
        InputError: there is such a setting.
    """
    suite, stage = config.eval, config.stage
    for key, value in (("votes", stage.votes), ("gold", stage.gold)):
        problem = "is asked of people, and others judge"
        require(value is None or stage.judge == PEOPLE, f"stage.{key}", value, problem, "Add stage.judge=people.")
    problem, remedy = "is of eval=judge, and systems are measured", "Write eval.tasks=[{name: NAME, asks: QUESTION}]."
    require(not suite.asks, "eval.asks", suite.asks, problem, remedy)
    remedy = "Add stage.systems={new: …, old: …}."
    if stage.systems is None:
        for key, value in (("tasks", suite.tasks), ("gates", suite.gates)):
            problem = "is asked of several systems, and none are named"
            require(value is None, f"eval.{key}", value, problem, remedy)
        require(not stage.allow_code, "stage.allow_code", True, "is of checks, and none are asked", "Drop it.")
        problem = "is of several systems, and none are named"
        require(stage.judge == "reward", "stage.judge", stage.judge, problem, remedy)
        require(stage.answers == 1, "stage.answers", stage.answers, problem, remedy)
        return
    remedy = "Name who answers in stage.systems alone."
    for key, value, default in (("artifact", config.artifact, Config().artifact), ("init", config.init, Config().init)):
        require(value == default, key, value, "is of one artifact, and stage.systems names several", remedy)
    problem = "reports on one artifact; with stage.systems prompts that training saw are left out"
    require(stage.seen == "drop", "stage.seen", stage.seen, problem, "Drop it.")


class Suite(NamedTuple):
    """Systems and tasks, resolved before the run has a name.

    Attributes:
        name: of the suite.
        records: systems, files of tasks, data, the judge and its card, as inputs of the run.
        judge: of tasks without checks, as `stage.judge` names it.
        reports: of the judge, those that `stage.card` names.
        first_model: the first system that has a base; None if all are files of answers or servers.
    """

    systems: Sequence[System]
    tasks: Sequence[EvalTask]
    name: str
    records: dict[str, Input]
    gates: Sequence[EvalGate]
    judge: Literal["reward", "people"] | LLMJudge
    reports: Sequence[JudgeReport]
    first_model: System | None


def find_suite(config: Config) -> Suite:
    """Find the systems, the tasks, the gates and the judge that the configuration names.

    Raises:
        InputError: one of them is wrong.
        MissingArtifact: a system or a reward model is not there.
    """
    root, given = config.run.folder, config.model
    systems = open_systems(
        config.stage.systems,
        root,
        first=config.stage.first,
        path=given.path,
        revision=given.revision,
        method=config.method.name,
    )
    tasks = parse_tasks(config.eval.tasks, combine_code_settings(config.stage.allow_code, config.stage.unsafe_code))
    gates = parse_gates(config.eval.gates, tasks, [system.name for system in systems])
    probed = next((task.name for task in tasks if task.probe is not None), None)
    for system in systems:
        problem = f"gives answers to chats alone, and task {probed} is a probe, which needs the model itself"
        remedy = "Leave out the system, or the task."
        require(probed is None or system.base is not None, system.field, system.ref, problem, remedy)
    first, problem = systems[0], "is no artifact, and gates are about one"
    require(not gates or first.artifact is not None, first.field, first.ref, problem, "Name the artifact first.")
    records = {f"systems.{system.name}": system.record for system in systems}
    records |= {f"tasks.{task.name}": build_task_input(task) for task in tasks if task.has_own_prompts}
    if not all(task.has_own_prompts for task in tasks):
        records |= build_data_inputs(DataSource.from_settings(config.data))
    model = next((system for system in systems if system.base is not None), None)
    judge = parse_judge(config.stage.judge)
    questions = [task for task in tasks if task.asks]
    for task in questions:
        problem = f"is answered by a language model, and stage.judge={config.stage.judge} is none"
        asks = truncate_text(task.asks, QUOTED_LETTERS)
        require(isinstance(judge, LLMJudge), f"{task.field}, asks", asks, problem, HOW_TO_NAME_LLM)
    if isinstance(judge, LLMJudge):
        graders = [judge.with_question(task.asks).identity.digest for task in questions]
        identity = json_digest([judge.identity.digest, *graders]) if graders else judge.identity.digest
        records |= {"judge": judge.endpoint.record(identity)}
    elif judge == PEOPLE:
        records |= find_votes(config, records, [system.name for system in systems])
    else:
        scorers = reward_inputs(build_reward_spec(config.reward), root, model and model.base)
        check_reasoning_matches(load_reward_artifacts(scorers), config.rollout.reasoning)
        records |= scorers
    reports, read = load_reports(config.stage.card, root)
    records |= read
    # tasks of a command line have no suite's name
    own = config.eval.tasks is not None and config.eval.name == DEFAULT_TASK
    return Suite(systems, tasks, "tasks" if own else config.eval.name, records, gates, judge, reports, model)


@dataclass(frozen=True, slots=True)
class Work:
    """A suite that is ready to be asked.

    Attributes:
        tasks: with their items.
        files: see `align.evals.suite.answers.Files`.
        seen: task → items that were left out, because some system was trained on them.
        unknown: what is not known of the systems' training, a sentence each.
        reports: gate → the report of the judge that decides it; of those that a judge decides.
    """

    suite: Suite
    tasks: Tasks
    files: Mapping[str, Mapping[tuple[str, str], Sequence[str]]]
    seen: Mapping[str, int]
    unknown: Sequence[str]
    reports: Mapping[str, JudgeReport]


def read_work(config: Config, suite: Suite) -> tuple[Work]:
    """Read the items that systems are asked, once it is known that whoever scores them may.

    Raises:
        InputError: a task has no item, or none that is left; a judge would score what was optimised against it, or
            decide a gate; an endpoint cannot be asked.
    """
    stage, root, system_turn = config.stage, config.run.folder, config.data.system or None
    artifacts = {system.name: system.artifact for system in suite.systems if system.artifact is not None}
    seen = [
        collect_trained_questions(artifact, root, partial(find_store_key, find_store_url(config)), system_turn)
        for artifact in artifacts.values()
    ]
    tasks, counts = drop_seen([(task, read_items(config, task)) for task in suite.tasks], seen)
    for name, count in counts.items():
        if count:
            print(f"{name}: {counted(count, 'item')} left out: training saw them")
    unknown = [sentence for each in seen for sentence in each.unknown]
    if stage.near is not None:
        tasks, near_unknown = mark_nearly_trained(tasks, artifacts, root, find_store_url(config), stage.near)
        unknown += near_unknown
    most = min(stage.prompts, config.data.limit or stage.prompts)
    tasks = [(task, items[: task.prompts or (None if task.has_own_prompts else most)]) for task, items in tasks]
    tasks = [(task, items if task.probe is not None else repeat_items(items, stage.answers)) for task, items in tasks]
    reports = choose_reports(config, suite, tasks)
    for system in suite.systems:
        if system.endpoint is not None:
            read_api_key(system.endpoint)
            offered = next((item.id for _, items in tasks for item in items if item.prompt.tools), None)
            problem = f"would call the tools of item {offered}, and its calls are no text that could be scored"
            require(offered is None, system.field, system.ref, problem, "Leave out items with tools, or the system.")
    named = [(task.name, item) for task, items in tasks for item in items]
    files = {system.name: match_answers(system, named) for system in suite.systems if system.is_file}
    return (Work(suite, tasks, files, counts, [*dict.fromkeys(unknown)], reports),)


def read_items(config: Config, task: EvalTask) -> Sequence[EvalItem]:
    """Read all items of a task.

    Raises:
        InputError: there is none, or a row is wrong.
    """
    if task.probe is not None and task.probe.harness is not None:
        from align.evals.suite.lm_eval import load_harness_items  # lm-eval is an extra

        return load_harness_items(task, task.probe.harness)
    allow_code = combine_code_settings(config.stage.allow_code, config.stage.unsafe_code)
    if task.path:
        return load_items(task, config.data.system or None, allow_code)
    return build_items(
        task,
        read_source_prompts(replace(DataSource.from_settings(config.data), limit=None), "test", config.seed),
        allow_code,
    )


def choose_reports(config: Config, suite: Suite, tasks: Tasks) -> Mapping[str, JudgeReport]:
    """Return the report behind each gate that a judge decides.

    Raises:
        InputError: the judge cannot be asked, was a system's reward, or may not decide a gate; or people have nothing
            to judge.
    """
    judged = [task.name for task, items in tasks if items[0].check is None and task.probe is None]
    problem, remedy = "has no task to judge: all have checks or are probes", "Drop it, or add a task without checks."
    require(bool(judged) or suite.judge != PEOPLE, "stage.judge", PEOPLE, problem, remedy)
    proxy = False
    if judged and isinstance(suite.judge, LLMJudge):
        read_api_key(suite.judge.endpoint)
    elif judged and suite.judge != PEOPLE:
        reward, root = to_plain_dict(config)["reward"], config.run.folder
        title = get_scorer_title(reward, suite.records)
        parts = list_scorer_parts(reward, suite.records)
        for system in suite.systems:
            if system.artifact is not None:
                standing = find_scorer_relation(system.artifact, parts, root)
                standing.require_independent(title, system.ref, config.stage.allow_proxy)
                proxy = proxy or bool(standing.proxy)
    identity: JudgeIdentity | None = None  # of people
    if isinstance(suite.judge, LLMJudge):
        identity = suite.judge.identity
    elif suite.judge != PEOPLE:
        identity = identify_scorer(build_reward_spec(config.reward), suite.records)
    judges_of = dict.fromkeys(judged, identity)
    if isinstance(suite.judge, LLMJudge):
        judges_of |= {task.name: suite.judge.with_question(task.asks).identity for task, _ in tasks if task.asks}
    return check_gates(suite.gates, judges_of, suite.reports, config.stage.card, proxy)


def find_votes(config: Config, records: Mapping[str, Input], systems: Sequence[str]) -> dict[str, Input]:
    """Return the votes of people that there are by now, and the file of known answers, as inputs of the run.

    Args:
        records: its other inputs.
        systems: their names, which people must not read.

    Raises:
        InputError: the project's name tells a system's, it was erased, or `stage.gold` is no file of pairs with known
            answers.
    """
    stage, project = config.stage, name_project(config, records)

    def spell(name: str) -> str:
        return f" {' '.join(WORD.findall(name.lower()))} "

    told = next((name for name in systems if spell(name) in spell(project)), None)
    problem = f"the people who judge can read it, and it names the system {told}"
    require(told is None, "project", project, problem, "Choose a name that says nothing of the systems.")
    known = {}
    if stage.gold is not None:
        read_known_answers(parse_user_path(stage.gold, "stage.gold"))
        known = {"gold": build_files_input(stage.gold, "stage.gold")}
    with open_store(config) as store, store.reading() as db:
        row = find_project_tombstone(db, project)
        problem = f"it was erased (row {row} of the ledger), and its name is not used again"
        if config.project == Config().project:
            problem += "; without project=, this evaluation always has this name"
        require(row is None, "project", project, problem, "Name another project: project=NAME.")
        head = read_head(db, project, votes_only=True)
    # Without a vote yet, it is the place that tells one project from another.
    place = json_digest([drop_masks(mask_secrets(find_store_url(config))), project])
    return {"votes": Input(head.hash if head.seq else place, project=project, seq=head.seq), **known}


def name_project(config: Config, records: Mapping[str, Input]) -> str:
    """Return the project that `project=` names; without it, the name of one for just these systems and prompts."""
    if config.project != Config().project:
        return config.project
    ours = select_identity("eval", to_plain_dict(config), records)
    asked = {key: read for key, read in records.items() if key.partition(".")[0] in ("data", "systems", "tasks")}
    digests = {key: read.digest for key, read in asked.items()}
    tasks = [{key: value for key, value in task.items() if key != "path"} for task in config.eval.tasks or ()]
    decides = [{key: ours.get(key) for key in DECIDE}, tasks, config.stage.prompts, config.stage.answers, digests]
    return f"people-{json_digest(decides)[:8]}"


def read_known_answers(path: Path) -> list[ImportRow]:
    """Read pairs of which it is known which answer is better.

    Raises:
        InputError: a row has no known order, or not two answers.
    """
    rows = read_item_rows(path, "gold", "stage.gold")
    for row in rows:
        right = row.expected is not None and len(row.answers) == 2
        require(right, row.where, row.id, "is no pair whose order is known", GOLD_HELP)
    return rows


# A judge as the subject (`eval=judge`): its inputs


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


def find_judge_inputs(config: Config) -> dict[str, Input]:
    """Return the examples and the judge as inputs of the run.

    Raises:
        InputError: a setting does not apply, the judge is none, or it reads reasoning that it was never shown.
        MissingArtifact: a reward model is not there.
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
        require_pairs(config.data, True)
        inputs = build_pair_inputs(source, find_store_url(config), config.project)
    if isinstance(judge, LLMJudge):
        return {**inputs, "judge": judge.endpoint.record(judge.identity.digest)}
    scorers = reward_inputs(build_reward_spec(config.reward), config.run.folder, None)
    check_reasoning_matches(load_reward_artifacts(scorers), config.data.reasoning, "data.reasoning")
    return {**inputs, **scorers}


def refuse_unread_settings(config: Config) -> None:
    """Raise InputError if a setting is of systems, which are not asked here, or of data to train on."""
    defaults = Config()
    given: dict[str, Any] = {}
    for key in ("artifact", "init"):
        if getattr(config, key) != getattr(defaults, key):
            given[key] = getattr(config, key)
    if config.method.name != defaults.method.name:
        given["method"] = config.method.name
    for group, names in READ_SETTINGS.items():
        settings: Settings = getattr(config, group)
        for name, default in get_defaults(type(settings)).items():
            if name not in names and getattr(settings, name) != default:
                given[f"{group}.{name}"] = getattr(settings, name)
    for key, value in given.items():
        problem = "is of systems that answer, and eval=judge measures the judge on answers that are there"
        raise InputError(key, value, problem, "Drop it.")
    problem = "is measured on beside what is trained on, and nothing is trained here"
    require(config.data.eval_path is None, "data.eval_path", config.data.eval_path, problem, "Name it as data.path.")


def find_judge(config: Config) -> Literal["reward"] | LLMJudge:
    """Return the judge that is measured.

    Raises:
        InputError: `stage.judge` is no judge, is people, or is no language model where `eval.asks` needs one.
    """
    judge = parse_judge(config.stage.judge)
    if config.eval.asks:
        question = parse_question(config.eval.asks, ASKS)
        if not isinstance(judge, LLMJudge):
            problem = f"is answered by a language model, and stage.judge={judge} is none"
            raise InputError(ASKS, config.eval.asks, problem, HOW_TO_NAME_LLM)
        return judge.with_question(question)
    if judge == "people":
        problem = "are whom a judge is measured against"
        raise InputError("stage.judge", judge, problem, "Name a judge, and the people's project: data=annotations.")
    return judge


def read_examples(config: Config, inputs: dict[str, Input]) -> tuple[JudgedExamples]:
    """Read the examples that the judge is measured on.

    Raises:
        InputError: there are none, the judge learned from all of them, their verdicts are its own, a label has no
            answer, or the endpoint cannot be asked.
    """
    judge = find_judge(config)
    if isinstance(judge, LLMJudge):
        read_api_key(judge.endpoint)
        if config.eval.asks:
            return (read_answers(config, judge),)
    return (read_pairs(config, judge, inputs),)


def read_answers(config: Config, judge: LLMJudge) -> JudgedExamples:
    source = DataSource.from_settings(config.data)
    every, ambiguous = build_answer_examples(read_held_out_feedback(source))
    answers = sample_records(every, config.data.limit, config.seed)
    for name, verdict in YES_AND_NO.items():
        problem = f"has no answer labelled {name} ({str(bool(verdict)).lower()}), and a grader is measured on both"
        has_label = any(answer.verdict == verdict for answer in answers)
        require(has_label, "data", source.path or source.name, problem, "Give answers with both labels.")
    notes = [f"nobody here knows what {judge.title} was trained on"]
    if ambiguous:
        notes.append(f"{counted(ambiguous, 'answer')} left out: as many labels say yes as no")
    return JudgedExamples(judge, answers, name_source(config), 0, notes)


def read_pairs(config: Config, judge: Literal["reward"] | LLMJudge, inputs: dict[str, Input]) -> JudgedExamples:
    source = DataSource.from_settings(config.data)
    root = config.run.folder
    decided, tied = read_verdicts(source, find_store_url(config), config.project, config.data.allow_simulated)
    if judge == "reward":
        refuse_own_verdicts(config, inputs, [*decided, *tied])
    decided, tied = ([prepare_record(pref, source) for pref in side] for side in (decided, tied))
    pairs = build_pair_examples(decided, tied, config.seed)
    system = config.data.system or None
    seen = [
        collect_trained_questions(model, root, partial(find_store_key, find_store_url(config)), system, LEARNS_VERDICTS)
        for model in load_reward_artifacts(inputs)
    ]
    unlearned = drop_trained_pairs(pairs, seen)
    left_out = len(pairs) - len(unlearned)
    problem = f"has nothing to measure on: the judge learned from the prompts of all {counted(len(pairs), 'pair')}"
    require(bool(unlearned), "data", config.data.path or config.project, problem, "Give pairs that were held out.")
    count_dropped(SEEN, left_out)
    if left_out:
        print(f"{counted(left_out, 'pair')} of {len(pairs):,} left out: the judge learned from their prompts")
    notes = [*dict.fromkeys(sentence for model in seen for sentence in model.unknown)]
    if isinstance(judge, LLMJudge):
        notes.append(f"nobody here knows what {judge.title} was trained on")
    examples = sample_records(unlearned, config.data.limit, config.seed)
    return JudgedExamples(judge, examples, name_reference(config, [*decided, *tied]), left_out, notes)


def refuse_own_verdicts(config: Config, inputs: dict[str, Input], prefs: Sequence[Preference]) -> None:
    """Raise InputError if the judge, or a part of it, stood in for people in these verdicts."""
    own = list_scorer_parts(build_reward_spec(config.reward), inputs) & {pref.scorer for pref in prefs if pref.scorer}
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


def run(run: Run, config: Config, *rows: Any) -> StageResult:
    with collect_judge_usage() as usage:
        if config.eval.measures == JUDGE:
            result = measure_judge(run, config, *rows)
        elif config.stage.systems is not None:
            result = compare_systems(run, config, *rows)
        else:
            result = compare_with_start(run, config, *rows)
    if not usage.asked:
        return result
    return replace(result, metrics={**result.metrics, "judge_usage": asdict(usage)})


def make_sampling(run: Run, config: Config, seed_of: Callable[[System, EvalItem], int] | None = None) -> Sampling:
    """Return how the configuration has systems asked.

    Args:
        seed_of: see `Sampling`.
    """
    from align.evals.suite.answers import Sampling, list_computing_versions
    from align.models.load import choose_device, choose_dtype, describe
    from align.rollout.engine_process import VLLM, engine_version

    rollout = config.rollout
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    engine = [rollout.engine, *list_computing_versions(device)]
    if rollout.engine == "vllm":  # of servers that run already the version is not known; they are known by their URLs
        servers = rollout.urls or [engine_version(VLLM, rollout.python, "rollout.python")]
        engine += [*servers, rollout.dtype, *rollout.words]

    def open_for(system: System, tokenizer: Any) -> Any:
        assert system.base is not None
        generation_config = describe(system.base).generation_config
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
        open_engine=open_for,
        seed_of=seed_of,
    )


def score(
    config: Config, tasks: Sequence[TaskAnswers], load_judge: Callable[[Sequence[TaskAnswers]], Judge]
) -> tuple[list[ScoredTask], list[str], Mapping[str, Mapping[str, Measurement]]]:
    """Score answers, and measure whether systems collapsed.

    Args:
        load_judge: loads the judge of tasks without checks.

    Returns:
        the scored tasks; notes on who scores; task → system → whether its answers are nearly the same whatever is
        asked.
    """
    from align.evals.suite.scores import measure_tasks, score_tasks

    allow_code = combine_code_settings(config.stage.allow_code, config.stage.unsafe_code)
    judged = [task for task in tasks if task.is_judged]
    judge = load_judge(judged) if judged else None
    scored = score_tasks(tasks, judge, allow_code)
    notes = [*(judge.notes if judge else ()), *(note for task in scored for note in task.notes)]
    measured = measure_tasks(tasks, judge, config.eval.closed, allow_code, config.rollout.reasoning == "hide")
    return scored, notes, measured


def load_reward(run: Run, config: Config, sampling: Sampling, systems: Sequence[System]) -> Judge:
    """Load the scorer of `reward=` as the judge of some systems."""
    from align.evals.suite.scores import load_reward_judge

    reward = run.manifest.config["reward"]
    judged = [system.artifact for system in systems if system.artifact is not None]
    return load_reward_judge(reward, build_reward_spec(config.reward), run.inputs, judged, config.run.folder, sampling)


# An artifact and its start


def compare_with_start(
    run: Run, config: Config, prompts: Sequence[Any], seen: TrainedQuestions, left_out: int
) -> StageResult:
    """Compare the artifact with what it started from.

    Args:
        prompts: both are asked.
        seen: what the artifact was trained on.
        left_out: number of prompts that are not asked because training saw them.
    """
    from align.evals.suite.answers import ask_systems
    from align.evals.suite.samples import build_samples, measure_kl, summarise, summarise_unseen, write_samples
    from align.models.load import context_length, describe
    from align.rollout.engine import cut_answers, place_seed
    from align.rollout.strip_reasoning import empty_answers

    policy, ref = find_policy_and_start(run, config)

    def seed_of(system: System, item: EvalItem) -> int:
        return place_seed(config.seed, "eval", "policy" if system.name == POLICY else "ref", int(item.id))

    sampling = make_sampling(run, config, seed_of)
    items = [EvalItem(str(i), prompt.id or str(i), "", prompt, None) for i, prompt in enumerate(prompts)]
    [task] = ask_systems(sampling, [policy, ref], [(EvalTask(DEFAULT_TASK), items)], {})
    kl = measure_kl(sampling, policy, ref, task.rollouts[POLICY])
    sampling.loaded.clear()
    [scored], notes, collapse = score(config, [task], lambda judged: load_reward(run, config, sampling, [policy]))
    role = scored.role
    samples = build_samples(task, scored, kl, seen)
    notes = [*notes, *describe_other_settings(policy, config), *seen.unknown]
    measured = collapse[DEFAULT_TASK][POLICY]
    metrics = {
        **summarise(samples, role),
        **measured.as_dict(),
        "dropped": task.dropped,
        "judge": scored.by,
        "judge_is": role,
        "judge_notes": notes,
        **summarise_unseen(samples, role),
        "seen_unknown": len(seen.unknown),
        "peak_rss_mb": get_peak_rss_mb(),
    }
    write_samples(run.artifact / "samples.jsonl", samples)
    write_json(run.artifact / "metrics.json", metrics)

    won, risen, scores, distinct = (metrics[key] for key in ("win_rate", "most_risen_word", role, "distinct2"))
    greedy = metrics["variety"].get("greedy", {})
    figures = (
        f"win rate {in_words(won)} on {won['n']} prompts by {scored.by}, {role} {scores['ref']:.3f} → "
        f"{scores['policy']:.3f}, KL {metrics['kl']:.2f} nats, distinct-2 {distinct['ref']:.3f} → "
        f"{distinct['policy']:.3f}"
    )
    lines = [
        *describe_collapse({"the policy": measured.collapse}),
        *describe_made_before(sampling),
        figures,
        f"the word that rose most: {risen['word']!r}, in {risen['ref']:.0%} → {risen['policy']:.0%} of the answers",
        *describe_new_phrase(measured.collapse, greedy.get("new_phrase"), START),
    ]
    owners = {"ref": "start's ", "policy": "policy's "}
    for who, owner in owners.items():
        lines += cut_answers(1 - metrics["eos_rate"][who], config.rollout.max_new_tokens, owner)
    for who, owner in owners.items():
        lines += empty_answers(metrics["empty_rate"][who], sampling.hides_reasoning, owner)
    lines += notes
    if "seen" in metrics:
        apart = metrics.get("unseen")
        others = f"; win rate {in_words(apart['win_rate'])} on the {apart['win_rate']['n']} others" if apart else ""
        lines.append(f"training saw {metrics['seen']:,} of these prompts{others}")
    if task.dropped:
        context = context_length(describe(run.base))
        room = prompt_room(context, config.data.max_length, config.rollout.max_new_tokens)
        lines.append(f"not asked: {counted(task.dropped, 'prompt')} longer than {room} tokens")
    few = explain_few_prompts(len(samples), config.data, config.stage.prompts, seen=left_out, too_long=task.dropped)
    return StageResult(metrics, (few, *lines) if few else tuple(lines))


def find_policy_and_start(run: Run, config: Config) -> tuple[System, System]:
    """Return the artifact and what it started from as systems: two adapters on one base, an adapter and its base, or
    two whole models. Both are asked with the tokenizer of the artifact."""
    record = run.inputs["artifact"]
    name = f"artifact={record.ref}"
    artifact = find_input(run, "artifact")
    method = "lora" if artifact.whole else config.method.name
    policy = System(POLICY, record.ref, artifact, run.base, method, record, label=name)
    started = None
    if "init" in run.inputs:
        started = find_input(run)
    base = run.base
    if artifact.whole:
        assert started is not None, "inputs() lets no such artifact pass"
        base = base_of(started, "init")
    elif started is None or adapter_folder(started) is None:
        started = as_artifact(base)
    label = f"what {name} started from"
    ref = System(START, started.ref, started, base, method, started.as_input(), tokenized_as=policy, label=label)
    return policy, ref


def explain_few_prompts(measured: int, data: DataConfig, most: int, *, seen: int = 0, too_long: int = 0) -> str:
    """Return a sentence on an evaluation with fewer than `ENOUGH` prompts: that it decides nothing, and the setting
    that is the cause. Returns an empty text for a larger one.

    Args:
        measured: prompts that were asked.
        data: the settings of the data.
        most: `stage.prompts`.
        seen: prompts that were left out because training saw them.
        too_long: prompts that were left out because they are too long.
    """
    if measured >= ENOUGH:
        return ""
    before = measured + too_long
    if before == most:
        cause = f"stage.prompts={most} asks no more. Raise it"
    elif before == data.limit:
        cause = f"data.limit={data.limit} reads no more. Raise it, or leave it out"
    elif before >= ENOUGH:
        cause = (
            f"{counted(too_long, 'prompt')} did not fit. Raise data.max_length={data.max_length}, or lower "
            "rollout.max_new_tokens"
        )
    elif before + seen >= ENOUGH:
        cause = (
            f"stage.seen=drop left out {counted(seen, 'prompt')} that training saw. Measure on other prompts: "
            "data.eval_path=FILE"
        )
    else:
        cause = explain_small_data(data)
    return f"this result decides nothing: it is of {counted(measured, 'prompt')}, and {ENOUGH} are the least; {cause}"


def explain_small_data(data: DataConfig) -> str:
    """Return which setting of the data gives more prompts to measure on."""
    if data.eval_path is not None:
        return f"data.eval_path={data.eval_path} has no more. Give a larger file"
    if data.name == "manifest":
        return (
            f"the data set {data.path} holds out no more. Make it again with more held out (stage=data "
            "data.held_out=SHARE)"
        )
    if data.name == "annotations":
        return "the project's held-out questions are no more. Measure on a file: data=files data.path=FILE"
    return (
        f"data.held_out={data.held_out:g} holds out no more of {data.path or data.name}. Raise it before training "
        "(data.held_out=0.3), or measure on a file of its own: data.eval_path=FILE"
    )


def describe_other_settings(policy: System, config: Config) -> list[str]:
    """Return a sentence on the settings under which the policy answers here, if PPO optimised it under others."""
    manifest: Manifest | None = policy.artifact.manifest if policy.artifact else None
    if manifest is None or manifest.stage != "ppo":
        return []
    trained = manifest.config["rollout"]
    here = to_plain_dict(config)["rollout"]
    changed = [key for key in ("temperature", "max_new_tokens", "reasoning") if trained.get(key) != here[key]]
    before, now = (", ".join(f"rollout.{key}={of.get(key)}" for key in changed) for of in (trained, here))
    return [f"{policy.ref} was optimised with {before}, and answers here with {now}"] if changed else []


# Systems on the tasks of a suite


def compare_systems(run: Run, config: Config, work: Work) -> StageResult:
    """Ask the systems, score their answers, and compare the first with each other one."""
    from align.evals.suite.answers import ask_systems
    from align.evals.suite.likelihoods import measure_probes
    from align.evals.suite.scores import combine_verdicts_by_system

    suite = work.suite
    sampling = make_sampling(run, config)
    asked = [(task, items) for task, items in work.tasks if task.probe is None]
    scored: list[ScoredTask] = []
    notes: list[str] = []
    collapse: Mapping[str, Mapping[str, Measurement]] = {}
    if asked:
        answers = ask_systems(sampling, suite.systems, asked, work.files)
        sampling.loaded.clear()
        scored, notes, collapse = score(config, answers, partial(load_judge, run, config, sampling, suite))
    models = [system for system in suite.systems if system.base is not None]
    probes = measure_probes(sampling, models, work.tasks, run.artifact)
    by_name = {task.name: task for task in scored} | probes
    scored = [by_name[task.name] for task, _ in work.tasks]
    write_lines(run.artifact / "answers.jsonl", iter_answer_rows(scored))
    write_lines(run.artifact / "verdicts.jsonl", iter_verdict_rows(scored))

    first = suite.systems[0].name
    verdicts_on = combine_verdicts_by_system(collapse, [system.name for system in suite.systems])
    gates = {
        gate.name: (gate, decide_on_collapse(gate, decide_gate(gate, scored), first, verdicts_on[first]))
        for gate in suite.gates
    }
    results = compute_results(scored, config.stage.level, config.stage.shown)
    notes = [*dict.fromkeys([*notes, *work.unknown])]
    systems = [describe_system(system) for system in suite.systems]
    measured = {task: {name: each.as_dict() for name, each in of_task.items()} for task, of_task in collapse.items()}
    content = {"systems": systems, "tasks": results, "collapse": measured, "notes": notes}
    write_json(run.artifact / "results.json", content)

    weighed = sampling.likelihoods
    by_system = {name: collapse.as_dict() for name, collapse in verdicts_on.items()}
    # Lists of runs show the first task's comparison of the first two systems.
    shown = next(iter(next(iter(results.values()))["against"].values()), {})
    metrics = {
        "systems": systems,
        "tasks": {name: {k: v for k, v in task.items() if k in IN_MANIFEST} for name, task in results.items()},
        "answers_made": sampling.answers.now,
        "dropped_seen": sum(work.seen.values()),
        "judge_notes": notes,
        "peak_rss_mb": get_peak_rss_mb(),
        **({"likelihoods_made": weighed.now} if weighed.now or weighed.before else {}),
        **{key: shown[key] for key in ("win_rate", "difference") if key in shown},
        **(publish_verdicts(run, work, gates) if gates else {}),
        "collapse": {**by_system[first], "systems": by_system},
    }
    lines = [
        *(describe_collapse(verdicts_on) if collapse else []),
        *describe_made_before(sampling),
        *(line for name, task in results.items() for line in describe_task_results(first, name, task)),
        *(describe_decision(*each) for each in gates.values()),
    ]
    for task, of_task in collapse.items():
        greedy = measured[task][first]["variety"].get("greedy", {})
        reference = suite.systems[1].name
        for line in describe_new_phrase(of_task[first].collapse, greedy.get("new_phrase"), reference):
            lines.append(f"{task}, {first}: {line}")
    return StageResult(metrics, (*lines, *notes))


def load_judge(run: Run, config: Config, sampling: Sampling, suite: Suite, judged: Sequence[TaskAnswers]) -> Judge:
    """Load the judge of a suite.

    Args:
        judged: all answers that it is going to judge, which people are asked about at once.
    """
    from align.evals.suite.scores import Judge, score_by_llm, score_by_people

    if isinstance(suite.judge, LLMJudge):
        store = AnswerStore(config.run.folder / ANSWERS)
        notes = describe_self_judging(suite.judge.endpoint, suite.systems)
        return Judge(partial(score_by_llm, suite.judge, store, sampling.hides_reasoning), notes)
    if suite.judge == PEOPLE:
        verdicts, notes = ranks.broadcast(collect_votes(run, config, judged) if ranks.is_main() else ({}, []))
        return Judge(partial(score_by_people, verdicts), notes)
    trained = [system for system in suite.systems if system.artifact is not None and system.artifact.manifest]
    return load_reward(run, config, sampling, trained)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines; no file if there are none."""
    if text := "".join(f"{json.dumps(row)}\n" for row in rows):
        write_text(path, text)


def describe_made_before(sampling: Sampling) -> list[str]:
    records = (("answer", sampling.answers), ("log-likelihood", sampling.likelihoods))
    return [
        f"{made.before:,} of {counted(made.before + made.now, what)} were made before"
        for what, made in records
        if made.before
    ]


def publish_verdicts(run: Run, work: Work, gates: Mapping[str, tuple[EvalGate, Decision]]) -> dict[str, Any]:
    """Write a verdict file for each gate, and what continuous integration reads. Returns what the manifest says of
    them."""
    digests = {"artifact": work.suite.systems[0].record.digest}
    digests |= {
        name: read.digest for name, read in run.inputs.items() if name.startswith(("tasks.", "systems.", "card"))
    }
    folder = run.artifact / VERDICTS
    folder.mkdir(exist_ok=True)
    for name, (gate, found) in gates.items():
        by = work.reports[name].as_dict() if name in work.reports else None
        write_json(folder / f"{name}.json", build_verdict_file(gate, found, digests, by))
    write_text(run.artifact / "junit.xml", build_junit_xml(run.name, gates))
    outcomes = {name: found.outcome for name, (_, found) in gates.items()}
    return {"gates": outcomes, "exit_status": 0 if {*outcomes.values()} == {"pass"} else NOT_PASSED}


# People as the judge of a suite: their project in the annotation app, opened and read


def collect_votes(
    run: Run, config: Config, tasks: Sequence[TaskAnswers]
) -> tuple[Mapping[tuple[str, str], Sequence[JudgeVerdict]], Sequence[str]]:
    """Open the project of people if it is not there, add pairs that they have not been asked, and read their votes.
    Returns the verdicts by task and other system, and notes on them.

    Raises:
        InputError: the project was erased, or holds items, prompts or answers of something else.
    """
    from align.evals.suite.scores import iter_pair_questions

    project, last = run.inputs["votes"].project, run.inputs["votes"].seq
    hides = config.rollout.reasoning == "hide"
    every = [question for task in tasks for question in iter_pair_questions(task, hides)]
    shown = [question for question in every if not question.pair.prompt.uses_tools]
    questions = [question for question in shown if not question.is_tie]
    gold = read_known_answers(parse_user_path(config.stage.gold, "stage.gold")) if config.stage.gold else []
    counts = {"pairs": len(every), "same_text": len(shown) - len(questions), "with_tools": len(every) - len(shown)}
    if not questions:
        verdicts = votes_to_verdicts(shown, {}, (), b"")  # all of them count, whatever their order
        notes = describe_pairs_not_asked(counts, counts["same_text"])
        return verdicts, [*notes, "no pair is left to ask people about"]
    with open_store(config) as store:
        configure(store, project)
        secret = store.key(project)
        assert secret is not None, "configure() lets no erased project pass"
        asked = open_project(store, project, secret, questions, config.stage.votes, gold, config.seed)
        with store.reading():  # one view for all of it
            view = read_view(store, project).through(last)
            rankings = load_counted_rankings(store, project, config.data.allow_simulated, last)
    verdicts = votes_to_verdicts(shown, asked, rankings, derive_order_key(secret, config.seed))
    ties = sum(not verdict.by for each in verdicts.values() for verdict in each)
    counts |= {"same_text_counted": ties, "asked": len(asked)}
    figures = {"project": project, **counts, **summarize_votes(view, project)}
    write_json(run.artifact / VOTES, figures)
    words = ["python", "-m", "align", "stage=annotate", f"project={project}"]
    if config.run.root != Config().run.root:
        words.append(f"run.root={config.run.root}")
    if (url := config.store.url) and mask_secrets(url) == url:  # one with a password is in the environment
        words.append(f"store.url={url}")
    described = describe_votes(figures, shlex.join(words), bool(config.run.name))
    return verdicts, [*describe_pairs_not_asked(counts, ties), *described]


def open_project(
    store: Store,
    project: str,
    secret: bytes,
    questions: Sequence[PairQuestion],
    votes: int | None,
    gold: Sequence[ImportRow],
    seed: int,
) -> dict[str, tuple[PairQuestion, str]]:
    """Open the project where it is not there, and add the pairs that so many votes are to be on.

    All is added in one transaction: a run that is cut off leaves nothing half done. Items that are there keep the order
    of their two answers.

    Args:
        secret: the project's key.
        votes: that are asked for; None for one of each pair and some more.

    Returns:
        Item of the project → its question, and the id of the first system's answer.

    Raises:
        InputError: the project holds items, prompts or answers of something else; or too many votes are asked for.
    """
    by_item = {make_item_id(project, question.key(secret)): question for question in questions}
    there = {item.id: item for item in store.items(project)}
    strangers = there.keys() - by_item.keys() - read_view(store, project).expected.keys()
    problem = f"it holds {counted(len(strangers), 'item')} that this evaluation does not ask"
    require(not strangers, "project", project, problem, "Name another project: project=NAME.")
    before = {id: find_first(project, by_item[id], item) for id, item in there.items() if id in by_item}

    wanted = count_votes_to_ask(votes, len(by_item))
    most = MAX_OVERLAP * len(by_item)
    remedy = f"Ask for up to {most:,}, or about more prompts."
    require(wanted <= most, "stage.votes", votes, f"are too many on {counted(len(by_item), 'pair')}", remedy)
    order = derive_order_key(secret, seed)
    absent = [id for id in choose_items(by_item, before, wanted, order) if id not in before]
    erased = [id for id in absent if store.first_row(project, item=id) is not None]
    new = [id for id in absent if id not in erased]
    fresh_gold = [row for row in gold if make_item_id(project, row.key) not in there]
    with store.transaction() as db:
        if not before and not erased:
            configure(store, project, OPENED_WITH)
        if new or wants_more(db, project, before, erased, wanted):
            configure(store, project, compute_overlap([*before, *new], wanted))
        settings = read_settings(db, project)
        ahead = sum(1 if first.endswith("-0") else -1 for first in before.values())
        groups = [(by_item[id].other, settings.wanted(id)) for id in new]
        for id, side in zip(new, draw_sides(groups, derive_sides_key(secret, seed, len(before)), ahead), strict=True):
            question = by_item[id]
            priority = 1 - question.draw(order)
            store.add_item(project, question.key(secret), question.prompt, question.candidates(side), priority=priority)
        for row in fresh_gold:
            add_row(store, project, row)
    ours = ((item, by_item[item.id]) for item in store.items(project) if item.id in by_item)
    return {item.id: (question, find_first(project, question, item)) for item, question in ours}


def wants_more(db: Connection, project: str, there: Collection[str], erased: Collection[str], votes: int) -> bool:
    """Return whether more votes are asked for than the items want that a project has, and than an evaluation asked for
    before: settings that somebody changed since are not overruled.

    Args:
        there: ids of its items.
        erased: those that it had.
    """
    if not there or sum(map(read_settings(db, project).count_wanted_votes, there)) >= votes:
        return False
    ours = compute_overlap([*there, *erased], votes).items()
    return not any(ours <= asdict(settings).items() for _, settings in read_settings_history(db, project))


def find_first(project: str, question: PairQuestion, item: ProjectItem) -> str:
    """Return the id of the first system's answer.

    Raises:
        InputError: the item holds another prompt or other answers.
    """
    first = question.find_first_answer(item)
    if first is None:
        problem = f"item {question.pair.id} of task {question.task} has another prompt or other answers there"
        raise InputError("project", project, problem, "Name another project: project=NAME.")
    return first


def summarize_votes(view: ProjectView, project: str) -> dict[str, Any]:
    """Return how many votes there are, and how far they can be believed, as JSON. People have no names here."""
    found = compute_view_figures(view, project)
    gold, gold_votes, gold_right = compute_gold_accuracy(view.rankings, view.expected)
    repeats = compute_repeat_consistency(view.rankings)
    people = [
        {
            "pseudonym": one["pseudonym"],
            "votes": one["rankings"],
            "skips": sum(one["skips"].values()),
            **{key: one[key] for key in ("ties", "gold", "gold_votes", "gold_right", "repeats")},
            "shown_first": one["position"]["share"],
        }
        for one in found["people"]
        if one["rankings"] or sum(one["skips"].values())  # not of those whose votes were all taken back
    ]
    return {
        "votes": len(view.work),
        "wanted": sum(view.votes_wanted.values()),
        "skips": len(view.skips),
        "settled": len(view.reviewed_items),
        "agreement": found["agreement"],
        "shown_first": found["position"]["share"],
        "longer": found["length"]["share"],
        **as_json({"gold": gold, "gold_votes": gold_votes, "gold_right": gold_right, "repeats": repeats}),
        "people": people,
    }


# A judge as the subject (`eval=judge`): the run


def measure_judge(run: Run, config: Config, known: JudgedExamples) -> StageResult:
    """Measure a judge on examples whose verdict is known, and publish its report."""
    judge = known.judge
    reward = build_reward_spec(config.reward)
    identity = judge.identity if isinstance(judge, LLMJudge) else identify_scorer(reward, run.inputs)
    store = AnswerStore(config.run.folder / ANSWERS)
    level = config.stage.level
    notes = [*known.notes]
    too_long = 0
    if isinstance(judge, LLMJudge) and isinstance(judge.question, YesNoQuestion):
        answers = [example for example in known.examples if isinstance(example, AnswerExample)]
        examples: Sequence[PairExample] | Sequence[AnswerExample] = answers
        opinions, remarks = collect_answer_opinions(judge, answers, store)
        figures = measure_judge_on_answers(answers, opinions, level)
    else:
        pairs = [example for example in known.examples if isinstance(example, PairExample)]
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
        too_long = len(known.examples) - len(pairs)
        examples = pairs
        figures = measure_judge_on_pairs(pairs, opinions, level)
    notes += remarks
    path = run.artifact / FILE
    data: dict[str, Any] = {"digest": digest_examples(examples)}
    data |= {"answers": len(examples)} if identity.asks else {"pairs": len(examples), "left_out": known.left_out}
    report = {"schema_version": SCHEMA, "judge": identity.as_dict(), "reference": known.reference, "data": data}
    write_json(path, {**report, "level": level, **figures})
    write_lines(run.artifact / "verdicts.jsonl", iter_judged_rows(examples, opinions))
    why_not = explain_shortfall(read_report(path))
    metrics = {
        "judge": identity.title,
        "reference": known.reference,
        "judge_agreement": figures["agreement"]["raw"],
        "card": figures,
        "decides": not why_not,
        "why_not": why_not,
        "judge_notes": notes,
        "peak_rss_mb": get_peak_rss_mb(),
    }
    if identity.asks:
        metrics |= {"asks": identity.asks, "yes": get_yes_phrase(identity.asks)}
        return StageResult(metrics, (*list_lines(metrics), *notes))
    metrics["dropped_too_long"] = too_long
    left = [f"{counted(too_long, 'pair')} longer than a reward model's context, and left out"] if too_long else []
    return StageResult(metrics, (*list_lines(metrics), *left, *notes))
