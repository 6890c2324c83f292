"""`stage=verify`: check PPO on the user's own base, method, precision and settings, and measure the bias of each
advantage estimator.

    load the roles and add noise to their weights
    compare formulas, gradients and sampled logprobs with independent computations (align/ppo/verify)
    compute the exact bias of each estimator on a policy that is small enough to enumerate
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from align.config.root import Config
from align.config.scorers import LearnedReward, build_reward_spec
from align.config.verify import VerifyConfig
from align.core.errors import AlignError
from align.core.types import Rollout, StageResult
from align.data.chat.template import set_chat_template
from align.data.chat.tokens import tokenize_text
from align.models.base import BASE, build_run_label, choose_frozen_method
from align.reward.inputs import load_reward_artifacts, require_matching_reasoning, resolve_reward_inputs
from align.run import Input, Run, json_digest, write_json
from align.run.environment import code_digest, package_versions
from align.stages.ppo import build_settings, load_roles
from align.stages.runner import StageInputs, load_input_artifact, open_rollout_engine, resolve_stage_start
from align.track import get_peak_rss_mb

if TYPE_CHECKING:
    import torch

    from align.models.roles import Roles
    from align.ppo.verify.anchors import Anchor
    from align.rollout.engine import Engine


PASSES = 70
"""Estimated cost of the checks of the model's computations, in forward passes of the batch.

A backward pass counts as two.
"""
ROLLOUTS = 12
"""Estimated cost of sampling answers for the checks, in rollouts of the batch."""
ANSWERS = 4
"""Number of answers sampled to each prompt in the check of the sampler's logprobs."""
VERDICTS = ("FAILS", "holds")
PROMPTS = ("Hello, how are you?", "What did you do today?", "Tell me something about the sea.", "Why?")


PRELOAD = ("align.ppo.verify.on_model", "align.rollout.registry")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    """Resolve the adapter or model, the reward models and the code version that `stage=verify` checks."""
    artifact, base, config = resolve_stage_start(config)
    has_no_reward = config.init == BASE and config.reward == LearnedReward()
    root = config.run.folder
    rewards = {}
    if not has_no_reward:
        rewards = resolve_reward_inputs(build_reward_spec(config.reward), root, base, artifact, config.method.name)
    require_matching_reasoning(load_reward_artifacts(rewards), config.rollout.reasoning)
    code = Input(json_digest([package_versions(), code_digest()]))
    records = {"code": code, "init": artifact.as_input(), **rewards}
    return StageInputs(config, build_run_label(base, config.method.name), base, records)


def run(run: Run, config: Config) -> StageResult:
    from align.models.load import choose_device, choose_dtype, load_own_tokenizer
    from align.ppo.verify.enumerated import SIZE, check_unbiased, measure_biases

    stage: VerifyConfig = config.stage
    base = run.base
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    artifact = load_input_artifact(run)
    roles = load_roles(config, base, artifact, load_reward_artifacts(run.inputs))
    perturb_weights(roles)
    tokenizer = load_own_tokenizer(artifact, base)
    if tokenizer.chat_template:  # a base model may have no chat template
        set_chat_template(tokenizer, None)
    method = choose_frozen_method(config.method.name)
    with open_rollout_engine(run, config, base, method, tokenizer, roles.model.generation_config) as engine:
        prompts = [tokenize_text(tokenizer, PROMPTS[i % len(PROMPTS)]) for i in range(stage.rows)]
        anchors = run_anchors(run, config, roles, dtype, make_sampler(run, config, roles, engine, prompts))

    biases = measure_biases()
    anchors += print_anchors(check_unbiased(biases))
    print(f"angle of the mean gradient over every batch of {SIZE} answers to that of J (docs/estimators.md):")
    for name, bias in biases.items():
        print(f"  {bias.angle:>7.2f}°  {name}")
    write_json(run.artifact / "estimators.json", {name: bias._asdict() for name, bias in biases.items()})
    write_json(run.artifact / "anchors.json", [asdict(anchor) | {"holds": anchor.holds} for anchor in anchors])
    if failed := [anchor.name for anchor in anchors if not anchor.holds]:
        raise AlignError(
            f"PPO does not compute correctly here: {', '.join(failed)}. The table is in {run.folder / 'report.html'}"
        )
    metrics = {
        **{anchor.name.replace(" ", "_"): anchor.measured for anchor in anchors},
        "peak_rss_mb": get_peak_rss_mb(),
    }
    return StageResult(metrics, (f"all {len(anchors)} checks pass",))


def make_sampler(
    run: Run, config: Config, roles: Roles, engine: Engine, prompts: Sequence[Sequence[int]]
) -> Callable[[int], Rollout]:
    """Return a function that takes a number n and samples n answers of the policy to each prompt, with new seeds each
    time.

    It returns them as one rollout.
    """
    from align.rollout.engine import convert_divergence_errors, derive_row_seeds

    calls = itertools.count(1)
    actor = roles.actor("policy")

    def sample(answers: int) -> Rollout:
        rows = [ids for _ in range(answers) for ids in prompts]
        with convert_divergence_errors(f"init={run.inputs['init'].ref}", None, config.dtype):
            engine.sync(actor)
            seeds = derive_row_seeds(range(len(rows)), config.seed, "verify", next(calls))
            return engine.generate(rows, actor, seeds).to(roles.device)

    return sample


def run_anchors(
    run: Run, config: Config, roles: Roles, dtype: torch.dtype, sample: Callable[[int], Rollout]
) -> list[Anchor]:
    """Run the checks of PPO's formulas and then the checks on the model, print each result, and return all of them.

    Args:
        sample: takes the number of answers to each prompt, and returns a rollout.
    """
    import torch

    from align.ppo.verify.anchors import check_maths
    from align.ppo.verify.on_model import Setting, check_on_model

    stage = config.stage
    temperature = config.rollout.temperature
    batch = sample(1)  # the first rollout warms up
    start_time = time.perf_counter()
    sample(1)
    sampled_time = time.perf_counter()
    roles.logprobs("policy", batch, temperature)
    seconds = ROLLOUTS * (sampled_time - start_time) + PASSES * (time.perf_counter() - sampled_time)
    print(f"{run.base.id}, {config.method.name}, {dtype}: about {seconds:.0f} s")
    settings = build_settings(config)
    setting = Setting(
        roles,
        batch,
        temperature,
        min(stage.micro_batch, stage.rows // 2),
        dtype != torch.float32,
        settings.experience_arguments(stage.kl_coef),
        settings.losses_at(stage.kl_coef),
        stage.bootstrap_truncated,
    )
    return print_anchors(itertools.chain(check_maths(), check_on_model(setting, lambda: sample(ANSWERS))))


def print_anchors(anchors: Iterable[Anchor]) -> list[Anchor]:
    """Print each check's name, error, tolerance and verdict as soon as it is measured, and return all checks."""
    measured: list[Anchor] = []
    for anchor in anchors:
        measured.append(anchor)
        figure = f"{anchor.measured:>9.1e} of {anchor.tolerance:<6g}"
        print(f"  {VERDICTS[anchor.holds]}  {anchor.name:<15}{figure}  {anchor.claim}")
    return measured


def perturb_weights(roles: Roles) -> None:
    """Add Gaussian noise with a standard deviation of 0.02 to all trainable weights of all roles, in place.

    A fresh adapter and a fresh head compute 0, which would hide swapped roles.
    """
    import torch

    with torch.no_grad():
        for role in roles.trainable:
            for parameter in roles.parameters_of(role):
                parameter.add_(0.02 * torch.randn_like(parameter))
