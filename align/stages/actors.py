"""The actors of PPO: one base and its roles, the engine that samples from them, the scorer, the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.config.ppo import PpoConfig
from align.config.root import Config
from align.data.chat import Prompt, encode_prompts
from align.data.sources import prompts
from align.errors import require
from align.models.load import choose_checkpointing, choose_device, choose_dtype, context_length, describe, load_base
from align.models.roles import Role, Roles
from align.ops.finite import not_finite
from align.ops.moments import Moments
from align.rollout.engine import Engine, response_texts
from align.rollout.randomness import row_seeds
from align.run import Base, Run
from align.stages import scoring
from align.stages.lineage import Start, adapter_folder, frozen_as, source_of, start, tokenizer_of
from align.stages.sampling import engine_of, speaking
from align.types import Conversation, Rollout
from reward.combined import comparable, scored
from reward.scorer import Scorer


class Answers(NamedTuple):
    """Prompts and what one role said to them, as tokens, as text, and as whole conversations."""

    prompts: Sequence[Prompt]
    rollout: Rollout
    texts: list[str]
    conversations: list[Conversation]


@dataclass(frozen=True)
class Actors:
    """Attributes:
    prompts: to train on.
    held_out: kept out of training, to measure on; none without `stage.eval_every`.
    dropped: how many were longer than the context.
    seed: the run's own.
    speaks: role → what the user calls it, where its answers cannot be drawn.
    """

    tokenizer: Any
    roles: Roles
    engine: Engine
    scorer: Scorer
    prompts: list[Prompt]
    held_out: list[Prompt]
    dropped: int
    seed: int
    speaks: Callable[[Role], AbstractContextManager[None]]

    def sample(self, role: Role, prompts: Sequence[Prompt], *where: str | int) -> Answers:
        """One answer of a role to each prompt.

        Args:
            where: the place in the run; each place draws anew.
        """
        seeds = row_seeds(range(len(prompts)), self.seed, *where)
        with self.roles.use(role) as model, self.speaks(role):
            rollout = self.engine.generate(model, [p.input_ids for p in prompts], seeds)
        texts = response_texts(rollout, self.tokenizer)
        told = [p.conversation.answered(text) for p, text in zip(prompts, texts, strict=True)]
        return Answers(prompts, rollout, texts, told)

    def score(self, answers: Answers) -> tuple[Tensor, dict[str, float]]:
        """The raw scores [B], on the device of the rollout, and what the scorer says of them."""
        scores, figures = scored(self.scorer, answers.conversations, answers.rollout)
        require(
            not (count := not_finite(scores)), "reward", self.scorer.name,
            f"gives {count} of {len(scores)} answers a score that is nan or infinite",
            "Use dtype=float32; if it stays so, train the reward model again with a lower stage.lr.",
        )  # fmt: skip
        return scores.to(answers.rollout.tokens_BS.device), figures

    def calibrated(self, answers: Answers) -> tuple[Actors, Moments]:
        """The same actors with a scorer whose members are on one scale for these answers; and the moments of its scores
        there."""
        actors = replace(self, scorer=comparable(self.scorer, answers.conversations, answers.rollout))
        return actors, Moments.of(actors.score(answers)[0])

    @torch.no_grad()
    def put_back(self, weights: Sequence[Tensor]) -> None:
        """Give the policy these weights, in the order of its parameters."""
        for parameter, weight in zip(self.roles.parameters_of("policy"), weights, strict=True):
            parameter.copy_(weight)


def load_actors(run: Run, config: Config, base: Base) -> Actors:
    """Load everybody.

    Raises:
        InputError: no prompt is left to train on.
    """
    stage: PpoConfig = config.stage
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    artifact = start(config, run.inputs["init"].path).artifact
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    models = scoring.models_of(run.inputs)
    scoring.same_template(config, models, base, tokenizer)

    # Prompts, before any weights.
    room = min(config.data.max_length, context_length(describe(base)) - config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts(source_of(config), "train", config.seed), room)
    n_eval = stage.eval_prompts if stage.eval_every else 0
    require(
        len(found) > n_eval, "stage.eval_prompts", n_eval, f"leaves none of {len(found)} prompts to train on",
        "Set fewer apart.",
    )  # fmt: skip
    training = distinct(found, n_eval)

    rewards = [m.path for m in scoring.on_base(models, base)]
    roles = roles_on(base, config, adapter_folder(artifact), rewards, stage.value_backbone, device)
    if choose_checkpointing(stage.gradient_checkpointing, device):
        roles.recompute_layers()
    scorer = scoring.scorer(config.reward, models, roles, base, stage.micro_batch, dtype, tokenizer)
    engine = engine_of(config, tokenizer, roles.model.generation_config)
    bases = "a policy of its own and a frozen base" if roles.policy is not None else "one base"
    print(
        f"{len(training)} prompts, {dropped} dropped as longer than {room} tokens; "
        f"{bases} with {roles.quantised_layers()} NF4 layers, reward: {scorer.name}"
    )

    def speaks(role: Role) -> AbstractContextManager[None]:
        lr = stage.lr if role == "policy" else None
        return speaking(f"the {role}, which started from init={run.inputs['init'].ref}", lr, config.dtype)

    held_out = found[len(found) - n_eval :]
    return Actors(tokenizer, roles, engine, scorer, training, held_out, dropped, config.seed, speaks)


def starting_point(config: Config) -> Start:
    """What the policy starts from, and its base.

    Raises:
        InputError: every weight is to train of what is an adapter.
    """
    found = start(config)
    ref, whole = found.artifact.ref, found.artifact.whole
    require(
        config.method.name != "full" or whole, "method", "full", f"{ref} is an adapter",
        "Start from a whole model (init=full:latest, base, a folder or hub:ID), or drop method=.",
    )  # fmt: skip
    return found


def experience_arguments(stage: PpoConfig, kl_coef: float) -> dict[str, Any]:
    """Arguments of `experience`, from a configuration, with the present coefficient of KL."""
    chosen = {key: getattr(stage, key) for key in ("kl_estimator", "gamma", "lam", "whiten_rewards")}
    return {"kl_coef": kl_coef, "kl_in_reward": stage.kl_in == "reward", **chosen}


def loss_arguments(stage: PpoConfig, kl_coef: float) -> dict[str, Any]:
    """Arguments of `accumulate` for its losses."""
    chosen = {key: getattr(stage, key) for key in ("clip_range", "value_clip_range", "kl_estimator")}
    return {"kl_loss_coef": kl_coef if stage.kl_in == "loss" else 0.0, **chosen}


def distinct(found: Sequence[Prompt], n_eval: int) -> list[Prompt]:
    """The prompts to train on: none of the last `n_eval`, not even where a file repeats one of those.

    Raises:
        InputError: none is left.
    """
    asked = {p.conversation.messages for p in found[len(found) - n_eval :]}
    training = [p for p in found if p.conversation.messages not in asked]
    require(bool(training), "stage.eval_prompts", n_eval, "leaves no other prompt to train on", "Set fewer apart.")
    return training


def roles_on(
    base: Base, config: Config, init: Path | None, rewards: Sequence[Path], value_backbone: str, device: torch.device,
) -> Roles:  # fmt: skip
    """The roles of a method, on its device: adapters on one base; under `method=full` a policy of its own, and the
    others on a frozen copy of what it starts from."""
    dtype = choose_dtype(config.dtype, device)
    method = config.method
    policy = None
    if method.name == "full":
        policy = load_base(base, "full", device, dtype)
    frozen = load_base(base, frozen_as(method.name), device, dtype)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    autocast = None if dtype == torch.float32 else dtype
    roles = Roles(frozen, init, rewards, (method.r, method.alpha), value_backbone, policy, autocast)
    if method.name == "qlora":
        assert roles.quantised_layers() > 0, "the base is not NF4"
    return roles
