"""Compare several systems on the tasks of a suite, and decide its gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align import ranks
from align.config.root import Config, find_store_url, to_plain_dict
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import NOT_PASSED, require
from align.core.types import StageResult
from align.data.sources import REASONING_GYM, DataSource, build_data_inputs, read_source_prompts
from align.data.trained_ids import SEEN, collect_trained_questions, find_store_key
from align.evals.collapse import Measurement, describe_collapse, describe_new_phrase
from align.evals.endpoint import read_api_key
from align.evals.judges.identity import (
    JudgeIdentity,
    find_scorer_relation,
    get_scorer_title,
    identify_scorer,
    list_scorer_parts,
)
from align.evals.judges.llm_judge import HOW_TO_NAME_LLM, LLMJudge, parse_judge
from align.evals.judges.report import JudgeReport, load_reports
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
from align.evals.suite.people import PEOPLE
from align.evals.suite.results import (
    ScoredTask,
    compute_results,
    describe_system,
    describe_task_results,
    iter_answer_rows,
    iter_verdict_rows,
)
from align.evals.suite.systems import FIELD as SYSTEMS_FIELD
from align.evals.suite.systems import System, describe_self_judging, get_reference, match_answers, resolve_systems
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
from align.models.base import build_run_label
from align.ops.intervals import Interval
from align.report.figure_text import pluralize
from align.reward.checkers.checked import combine_code_settings
from align.reward.inputs import load_reward_artifacts, require_matching_reasoning, resolve_reward_inputs
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerStore
from align.run import Input, Run, json_digest, write_json
from align.run.files import write_json_lines, write_text
from align.stages.eval.sampling import (
    describe_cached_answers,
    load_reward_as_judge,
    make_sampling,
    score_and_measure_tasks,
)
from align.stages.eval.votes import ProjectVotes, build_vote_inputs, fill_project_and_read_votes
from align.stages.runner import StageInputs
from align.track import get_peak_rss_mb, truncate_text

if TYPE_CHECKING:
    from align.evals.suite.answers import Sampling, TaskAnswers
    from align.evals.suite.scores import Judge

VERDICTS = "verdicts"
"""Name of the folder in a run's artifact with one file of the verdict of each gate."""
MANIFEST_FIGURES = ("by", "role", "asks", "yes", "items", "dropped", "systems", "against")
"""Keys of a task's results that go into the manifest's metrics too; the others are only in `results.json`."""


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


def resolve_suite_inputs(config: Config) -> StageInputs:
    """Resolve the systems, tasks and judge of an evaluation, see `resolve_suite`."""
    suite = resolve_suite(config)
    model = suite.first_model
    if model is None or model.base is None:
        config = replace_values(config, method=replace_values(config.method, name="auto"))
        return StageInputs(config, suite.name, None, suite.records, partial(load_suite_items, config, suite))
    config = replace_values(config, method=replace_values(config.method, name=model.method))
    title = f"{build_run_label(model.base, model.method)}-{suite.name}"
    return StageInputs(config, title, model.base, suite.records, partial(load_suite_items, config, suite))


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
    prompts = read_source_prompts(source, "test", config.seed)
    return build_items(task, prompts, allow_code, have_checks=source.name == REASONING_GYM)


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
    compared_tasks = [task.name for task, _ in tasks if task.name in judged_tasks and not task.asks]
    problem = f"is one system, and stage.judge={config.stage.judge} compares two on task {', '.join(compared_tasks)}"
    remedy = "Add another system, or judge by a reward: drop stage.judge."
    has_pairs = len(suite.systems) > 1
    is_scored = isinstance(suite.judge, LLMJudge) or suite.judge == PEOPLE
    require(has_pairs or not (compared_tasks and is_scored), SYSTEMS_FIELD, suite.systems[0].name, problem, remedy)
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


def compare_systems(run: Run, config: Config, loaded_suite: LoadedSuite) -> StageResult:
    """Sample the answers of all models of a suite, score them, and compare the first model with each other one.

    Writes `answers.jsonl`, `verdicts.jsonl`, `results.json` and the gates' verdict files.
    """
    from align.evals.suite.answers import ask_systems
    from align.evals.suite.likelihoods import measure_probes
    from align.evals.suite.scores import combine_verdicts_by_system

    suite = loaded_suite.suite
    plans = describe_plans(suite, config.eval.gate_family)
    looks = find_earlier_looks(config.run.folder, suite, plans)
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
        SEEN: sum(loaded_suite.left_out.values()),
        "judge_notes": notes,
        "peak_rss_mb": get_peak_rss_mb(),
        **({"likelihoods_made": likelihoods.now} if likelihoods.now or likelihoods.before else {}),
        **{key: comparison[key] for key in ("win_rate", "difference") if key in comparison},
        **(publish_verdicts(run, loaded_suite, gates, plans, config.eval.gate_family) if gates else {}),
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
        reference = get_reference(system.name for system in suite.systems)
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


def publish_verdicts(
    run: Run,
    loaded_suite: LoadedSuite,
    gates: Mapping[str, tuple[EvalGate, Decision]],
    plans: Mapping[str, Mapping[str, Any]],
    family: str,
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
        content = build_verdict_file(gate, decision, digests, plans[name], judge_report)
        write_json(folder / f"{name}.json", content)
    write_text(run.artifact / "junit.xml", build_junit_xml(run.name, gates, family))
    outcomes = {name: decision.outcome for name, (_, decision) in gates.items()}
    return {"gates": outcomes, "exit_status": 0 if is_family_passed(outcomes.values(), family) else NOT_PASSED}


def describe_plans(suite: Suite, family: str) -> dict[str, dict[str, Any]]:
    """Return name of a gate → its plan, see `align.evals.suite.gates.describe_plan`."""
    digests = {system.name: system.record.digest for system in suite.systems}
    return {gate.name: describe_plan(gate, suite.gates, family, digests.get(gate.against, "")) for gate in suite.gates}


def find_earlier_looks(root: Path, suite: Suite, plans: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Look]]:
    """Return name of a gate → its earlier evaluations, in order, if it was evaluated as data arrive.

    They are those of finished runs on the same artifact that also evaluated the same other system, under any name.

    Args:
        plans: see `describe_plans`.

    Raises:
        InputError: the plan of a gate changed since an earlier evaluation, or a verdict file cannot be read.
    """
    from align.registry.gates import iter_verdicts

    fields = {gate.name: f"{GATES_FIELD}[{i}]" for i, gate in enumerate(suite.gates)}
    looks: dict[str, list[Look]] = {name: [] for name in fields}
    verdicts = [verdict for verdict in iter_verdicts(root) if verdict.run is not None] if fields else []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.run.publication if verdict.run else (0, "")):
        if verdict.gate not in fields or not verdict.looks:
            continue
        plan = plans[verdict.gate]
        is_same_artifact = verdict.inputs.get("artifact") == suite.systems[0].record.digest
        if not is_same_artifact or plan["against"] not in {"", *verdict.inputs.values()}:
            continue
        problem = f"was evaluated before, by {verdict.source}, with another plan: {verdict.plan}"
        remedy = "Keep the plan, or give the gate another name."
        require(verdict.plan == plan, fields[verdict.gate], plan, problem, remedy)
        known = looks[verdict.gate]
        for values in verdict.looks:
            look = Look(**{**values, "figure": Interval(**values["figure"])})
            is_further = not known or look.n > known[-1].n
            if look not in known and (is_further or look.outcome != "undecided"):
                known.append(look)
    return looks
