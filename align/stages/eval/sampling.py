"""Sampling and scoring the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config.root import Config
from align.config.scorers import build_reward_spec
from align.evals.collapse import Measurement
from align.evals.suite.results import ScoredTask
from align.evals.suite.systems import System
from align.evals.suite.tasks import EvalItem
from align.report.figure_text import pluralize
from align.reward.checkers.checked import combine_code_settings
from align.run import Run
from align.stages.runner import open_rollout_engine

if TYPE_CHECKING:
    from align.evals.suite.answers import Sampling, TaskAnswers
    from align.evals.suite.scores import Judge


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


def describe_cached_answers(sampling: Sampling) -> list[str]:
    """Return sentences on the numbers of answers and log-likelihoods that were taken from the cache of earlier runs."""
    counts = (("answer", sampling.answers), ("log-likelihood", sampling.likelihoods))
    return [
        f"{count.before:,} of {pluralize(count.before + count.now, noun)} were taken from the cache"
        for noun, count in counts
        if count.before
    ]
