"""Is PPO right here? The anchors of `align/ppo` on the user's own base, method, precision and settings; and how far the
gradient of each estimator is from unbiased."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from align.config.root import Config
from align.config.scorers import LearnedReward, reward_spec
from align.config.verify import VerifyConfig
from align.core.errors import AlignError
from align.core.types import Result, Rollout
from align.data.chat.template import use_template
from align.data.chat.tokens import text_ids
from align.models.start import BASE, frozen_as, label
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.run import Input, Run, json_digest, write_json
from align.run.environment import code_digest, package_versions
from align.stages.ppo import load_roles, settings_of
from align.stages.runner import Inputs, find_input, find_start
from align.track import peak_rss_mb

if TYPE_CHECKING:
    import torch

    from align.models.roles import Roles
    from align.ppo.verify.anchors import Anchor
    from align.rollout.engine import Engine


PASSES, DRAWS = 70, 12
"""About how many forward passes of the batch the anchors on the model cost, a backward pass counted as two; and how
many rollouts of it; those of more rows count less than so many."""
ANSWERS = 4
"""To each prompt, a rollout."""
VERDICTS = ("FAILS", "holds")
TEXTS = ("Hello, how are you?", "What did you do today?", "Tell me something about the sea.", "Why?")


PRELOAD = ("align.ppo.verify.on_model", "align.rollout.registry")
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    artifact, base, config = find_start(config)
    untold = config.init == BASE and config.reward == LearnedReward()
    root = config.run.folder
    rewards = {} if untold else reward_inputs(reward_spec(config.reward), root, base, artifact, config.method.name)
    read_alike(models_of(rewards), config.rollout.reasoning)
    read = {"code": Input(json_digest([package_versions(), code_digest()])), "init": artifact.as_input(), **rewards}
    return Inputs(config, label(base, config.method.name), base, read)


def run(run: Run, config: Config) -> Result:
    from align.models.load import choose_device, choose_dtype, own_tokenizer
    from align.ppo.verify.enumerated import SIZE, biases, unbiased
    from align.rollout.registry import open_engine

    stage: VerifyConfig = config.stage
    base, device = run.base, choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    artifact = find_input(run)
    roles = load_roles(config, base, artifact, models_of(run.inputs))
    shake(roles)
    tokenizer = own_tokenizer(artifact, base)
    if tokenizer.chat_template:  # a base model has none, and its maths can be looked at all the same
        use_template(tokenizer, None)
    with open_engine(
        run,
        config.rollout,
        base,
        frozen_as(config.method.name),
        dtype,
        device,
        tokenizer,
        roles.model.generation_config,
        config.data.max_length,
        config.method.r,
    ) as engine:
        prompts = [text_ids(tokenizer, TEXTS[i % len(TEXTS)]) for i in range(stage.rows)]
        found = measured(run, config, roles, dtype, drawing(run, config, roles, engine, prompts))

    bias = biases()
    found += proven(unbiased(bias))
    print(f"angle of the mean gradient over every batch of {SIZE} answers to that of J (docs/estimators.md):")
    for name, (angle, _) in bias.items():
        print(f"  {angle:>7.2f}°  {name}")
    write_json(run.artifact / "estimators.json", {name: one._asdict() for name, one in bias.items()})
    write_json(run.artifact / "anchors.json", [asdict(anchor) | {"holds": anchor.holds} for anchor in found])
    if failed := [a.name for a in found if not a.holds]:
        raise AlignError(f"PPO is not right here: {', '.join(failed)}. The table is in {run.folder / 'report.html'}")
    metrics = {**{a.name.replace(" ", "_"): a.measured for a in found}, "peak_rss_mb": peak_rss_mb()}
    return Result(metrics, (f"all {len(found)} anchors hold",))


def drawing(
    run: Run, config: Config, roles: Roles, engine: Engine, prompts: Sequence[Sequence[int]]
) -> Callable[[int], Rollout]:
    """A function that draws so many answers of the policy to each prompt, each time anew."""

    from align.rollout.engine import divergence_as_input_error
    from align.rollout.randomness import row_seeds

    times, actor = itertools.count(1), roles.actor("policy")

    def draw(answers: int) -> Rollout:
        rows = [ids for _ in range(answers) for ids in prompts]
        with divergence_as_input_error(f"init={run.inputs['init'].ref}", None, config.dtype):
            engine.sync(actor)
            seeds = row_seeds(range(len(rows)), config.seed, "verify", next(times))
            return engine.generate(rows, actor, seeds).to(roles.device)

    return draw


def measured(
    run: Run, config: Config, roles: Roles, dtype: torch.dtype, draw: Callable[[int], Rollout]
) -> list[Anchor]:
    """Every anchor, printed as it is found."""

    import torch

    from align.ppo.verify.anchors import maths
    from align.ppo.verify.on_model import Setting, on_model

    stage, temperature, base = config.stage, config.rollout.temperature, run.base
    batch = draw(1)  # the first one warms up
    began = time.perf_counter()
    draw(1)
    sampled = time.perf_counter()
    roles.logprobs("policy", batch, temperature)
    seconds = DRAWS * (sampled - began) + PASSES * (time.perf_counter() - sampled)
    print(f"{base.id}, {config.method.name}, {dtype}: about {seconds:.0f} s")
    settings = settings_of(config)
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
    return proven(itertools.chain(maths(), on_model(setting, lambda: draw(ANSWERS))))  # those without a model first


def proven(anchors: Iterable[Anchor]) -> list[Anchor]:
    """Each of them, printed as it is found."""
    found: list[Anchor] = []
    for anchor in anchors:
        found.append(anchor)
        figure = f"{anchor.measured:>9.1e} of {anchor.tolerance:<6g}"
        print(f"  {VERDICTS[anchor.holds]}  {anchor.name:<15}{figure}  {anchor.claim}")
    return found


def shake(roles: Roles) -> None:
    """Move what trains: a fresh adapter and a fresh head say nothing, and hide a swapped role."""
    import torch

    with torch.no_grad():
        for role in roles.trainable:
            for parameter in roles.parameters_of(role):
                parameter.add_(0.02 * torch.randn_like(parameter))
