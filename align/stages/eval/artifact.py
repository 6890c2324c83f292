"""Compare an artifact with the model it was trained from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from align.config.groups import DataConfig
from align.config.root import Config, find_store_url, to_plain_dict
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import InputError, require
from align.core.types import Conversation, StageResult
from align.data.chat.encode import compute_max_prompt_tokens
from align.data.read.drops import count_dropped
from align.data.sources import DataSource, build_data_inputs, read_source_prompts
from align.data.trained_ids import SEEN, TrainedQuestions, collect_trained_questions, find_store_key
from align.evals.collapse import describe_collapse, describe_new_phrase
from align.evals.judges.identity import find_scorer_relation, get_scorer_title, list_scorer_parts
from align.evals.suite.systems import System
from align.evals.suite.tasks import DEFAULT_TASK, EvalItem, EvalTask
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
from align.reward.inputs import (
    load_reward_artifacts,
    require_matching_reasoning,
    require_row_checks,
    resolve_reward_inputs,
)
from align.run import Artifact, Manifest, Run, write_json
from align.stages.eval.sampling import (
    describe_cached_answers,
    load_reward_as_judge,
    make_sampling,
    score_and_measure_tasks,
)
from align.stages.runner import StageInputs, load_input_artifact, resolve_stage_start
from align.track import get_peak_rss_mb

MIN_PROMPTS = 64
"""Minimum number of prompts for a result that decides: with 64, the 95 % interval of a win rate is about ±0.12."""
POLICY = "policy"
"""Name of the evaluated artifact in a comparison with the model it was trained from."""
START = "start"
"""Name of the model that the evaluated artifact was trained from, in a comparison with it."""


def resolve_artifact_inputs(config: Config) -> StageInputs:
    """Resolve the artifact to evaluate, the model it was trained from, the prompts and the judge.

    Raises:
        InputError: they do not fit, or the artifact was optimised against the judge.
        MissingArtifact: one of them does not exist.
    """
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
