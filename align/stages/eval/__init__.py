"""`stage=eval`: compare models on a suite of tasks, or an artifact with the model it was trained from, or test a judge.

    systems answer the items of the tasks; probes use likelihoods       align/evals/suite/answers.py, likelihoods.py
    checks or the judge score the answers; collapse is detected         align/evals/suite/scores.py
    the first system is compared with each other one; gates decide      align/evals/suite/results.py, gates.py

Without `stage.systems` the systems are the artifact and what it started from. `eval=judge` measures a judge on labelled
examples (align/evals/judges/examples.py, opinions.py, figures.py). Inputs are resolved and data are read before the run
has a name. Only the run itself needs torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from align.config.groups import JUDGE
from align.config.root import Config
from align.core.errors import require
from align.core.types import StageResult
from align.evals.judges.llm_judge import collect_judge_usage, describe_judge_usage, parse_price
from align.evals.suite.people import PEOPLE
from align.run import Run
from align.stages.eval.artifact import compare_with_start, resolve_artifact_inputs
from align.stages.eval.judge import measure_and_publish_judge, resolve_judge_inputs
from align.stages.eval.suite import compare_systems, resolve_suite_inputs
from align.stages.runner import StageInputs

PRELOAD = ("align.evals.suite.samples", "align.evals.suite.likelihoods", "align.rollout.registry")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    """Resolve the models to evaluate, the prompts and the judge of `stage=eval`, and raise InputError if they do not
    fit.

    That is an artifact and the model it was trained from, or the models and tasks of a suite, or a judge and examples.
    """
    if config.eval.measures == JUDGE:
        return resolve_judge_inputs(config)
    refuse_inapplicable_settings(config)
    if config.stage.systems is not None:
        return resolve_suite_inputs(config)
    return resolve_artifact_inputs(config)


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
