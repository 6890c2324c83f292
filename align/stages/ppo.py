"""`stage=ppo`: set up PPO by loading policy, reference, critic, reward models and rollout engine.

The algorithm is in `align/ppo/loop.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from align import ranks
from align.config.ppo import PpoConfig
from align.config.root import Config
from align.config.scorers import build_reward_spec
from align.core.types import Conversation, StageResult
from align.data.chat.encode import compute_max_prompt_tokens, encode_prompts
from align.data.sources import DataSource, build_data_inputs, read_divided_prompts
from align.data.sources import read_source_prompts as read_prompts
from align.models.base import build_run_label, choose_frozen_method, find_adapter_folder
from align.models.lora import Lora
from align.report.figure_text import pluralize
from align.reward.inputs import (
    load_reward_artifacts,
    require_matching_reasoning,
    require_row_checks,
    resolve_reward_inputs,
    select_models_on_base,
)
from align.run import Artifact, Base, Run, json_digest
from align.stages.runner import (
    StageInputs,
    collect_memory_metrics,
    load_start,
    open_rollout_engine,
    open_store,
    open_tracker,
    resolve_stage_start,
)

if TYPE_CHECKING:
    from align.models.roles import Role, Roles
    from align.ppo.loop import LoopResult
    from align.ppo.settings import PpoSettings
    from align.ppo.workers import Workers


PRELOAD = ("align.ppo.loop", "align.reward.build", "align.rollout.registry")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    """Resolve the policy's initial adapter or model, the reward models and the prompts of `stage=ppo`."""
    artifact, base, config = resolve_stage_start(config)
    reward = build_reward_spec(config.reward)
    source = DataSource.from_settings(config.data)
    rewards = resolve_reward_inputs(reward, config.run.folder, base, artifact, config.method.name)
    require_matching_reasoning(load_reward_artifacts(rewards), config.rollout.reasoning)
    records = {"init": artifact.as_input(), **build_data_inputs(source), **rewards}

    def rows() -> tuple[Any, ...]:
        if config.data.eval_path and config.stage.eval_every:
            sides = read_divided_prompts(source, config.seed)
        else:
            sides = read_prompts(source, "train", config.seed), []
        for side in sides:
            require_row_checks(reward, side)
        return sides

    return StageInputs(config, build_run_label(base, config.method.name), base, records, rows, trains=True)


def run(run: Run, config: Config, prompts: list[Conversation], eval_prompts: list[Conversation]) -> StageResult:
    from align.ppo.loop import build_result, train_policy

    settings = build_settings(config)
    with load_workers(run, config, prompts, eval_prompts) as workers:
        trained = train_policy(
            run, workers, settings, partial(open_tracker, run), partial(measure_greedy_variety, config=config)
        )
        save_policy_and_critic(run, config, workers, trained)
        if trained.tripped:
            send_suspects_to_annotators(run, config, trained)
        longest = max(len(prompt.input_ids) for prompt in workers.prompts)
        rewards = len(select_models_on_base(load_reward_artifacts(run.inputs), run.base))
        peaks = collect_memory_metrics(run, config, longest, rewards=rewards)
        return build_result(trained, workers, settings, run.known_metrics, peaks)


def build_settings(config: Config) -> PpoSettings:
    """Build the PpoSettings of the training loop from the configuration: `stage`, `rollout`, dtype and seed."""
    from align.models.load import choose_device, choose_dtype, get_dtype_name
    from align.ppo.experience import Estimator
    from align.ppo.settings import PpoSettings
    from align.ppo.update import Losses
    from align.rollout.engine_process import WITHIN

    stage: PpoConfig = config.stage
    rollout = config.rollout
    assert stage.kl_estimator is not None  # the configuration has filled it in
    losses = Losses(
        stage.clip_range,
        stage.clip_range_high,
        stage.importance_sampling_level,
        stage.effective_loss_mean,
        rollout.max_new_tokens,
        stage.value_clip_range,
        kl_estimator=stage.kl_estimator,
    )
    dtype = get_dtype_name(choose_dtype(config.dtype, choose_device(config.device)))
    dtypes = [dtype] if rollout.dtype == "auto" else [dtype, rollout.dtype]
    servers = (len(rollout.urls) or rollout.replicas) if rollout.engine == "vllm" else 0
    derived = {
        "seed": config.seed,
        "temperature": rollout.temperature,
        "max_new_tokens": rollout.max_new_tokens,
        "hides_reasoning": rollout.reasoning == "hide",
        "servers": servers,
        # Maximum mean difference between the logprobs of vLLM's tokens and the learner's.
        "max_gap": (rollout.max_gap or max(WITHIN[name] for name in dtypes)) if servers else 0.0,
        "dtype": dtype,
        "first_ratio": getattr(stage.first_ratio, dtype),
        "estimator": Estimator(stage.advantage, stage.per_prompt, stage.scale_rewards, stage.gamma, stage.lam),
        "losses": losses,
        "kl_in_reward": stage.kl_in == "reward",
        "wires": stage.tripwires.limits(),
        "patience": stage.tripwires.patience,
        "stops": stage.tripwires.action == "stop",
        "suspects": stage.tripwires.suspects,
    }
    copied = [field.name for field in fields(PpoSettings) if field.name not in derived]
    return PpoSettings(**derived, **{name: getattr(stage, name) for name in copied})


@contextmanager
def load_workers(
    run: Run, config: Config, prompts: Sequence[Conversation], eval_prompts: Sequence[Conversation]
) -> Iterator[Workers]:
    """Load policy, reference, critic, rollout engine and reward for PPO, and close the engine as the block ends.

    Args:
        prompts: prompts to train on.
        eval_prompts: held-out prompts of `data.eval_path`. If it is empty, `stage.eval_prompts` of `prompts` are
            held out.

    Raises:
        InputError: no prompt is left to train on.
    """
    from align.models.load import choose_device, choose_dtype, get_context_length, read_configurations
    from align.ppo.workers import Workers, split_prompts
    from align.reward.build import build_scorer_for_policy, require_same_template
    from align.rollout.engine import convert_divergence_errors
    from align.rollout.strip_reasoning import choose_answer_reader

    stage: PpoConfig = config.stage
    base = run.base
    policy, tokenizer = load_start(run, config)
    reward = build_reward_spec(config.reward)
    models = load_reward_artifacts(run.inputs)
    require_same_template(reward, models, base, tokenizer, config.init)
    room = compute_max_prompt_tokens(
        get_context_length(read_configurations(base)), config.data.max_length, config.rollout.max_new_tokens
    )
    encoded, dropped = encode_prompts(tokenizer, prompts, room)
    n_eval = stage.eval_prompts if stage.eval_every else 0
    encoded_eval = encode_prompts(tokenizer, eval_prompts, room)[0] if eval_prompts else []
    training, held_out = split_prompts(encoded, encoded_eval, n_eval)

    run.known_metrics = {"prompts": len(training), "dropped": dropped}
    run.known_metrics |= {"held_out_prompts": len(held_out)} if held_out else {}
    roles = load_roles(config, base, policy, models)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    scorer = build_scorer_for_policy(reward, models, roles, base, stage.micro_batch, dtype, tokenizer)
    bases = "a policy of its own and a frozen base" if roles.policy is not None else "one base"
    held_out_source = "of data.eval_path" if encoded_eval else "more"
    held_out_count = f", {len(held_out)} {held_out_source} to measure on" if held_out else ""
    advantage = (
        "" if stage.has_critic else f"; {stage.advantage}, {pluralize(stage.per_prompt, 'answer')} to each prompt"
    )
    print(
        f"{len(training)} prompts, {dropped} dropped as longer than {room} tokens{held_out_count}; "
        f"{bases} with {roles.count_quantised_layers()} NF4 layers, reward: {scorer.name}{advantage}"
    )

    def open_divergence_guard(role: Role) -> AbstractContextManager[None]:
        lr = stage.lr if role == "policy" else None
        name = f"the {role}, which started from init={run.inputs['init'].ref}"
        return convert_divergence_errors(name, lr, config.dtype)

    generation_config = roles.model.generation_config
    read_answers = choose_answer_reader(config.rollout.reasoning == "hide", tokenizer, generation_config)
    method = choose_frozen_method(config.method.name)
    with open_rollout_engine(run, config, base, method, tokenizer, generation_config) as engine:
        yield Workers(
            tokenizer, roles, engine, scorer, training, held_out, config.seed, open_divergence_guard, read_answers
        )


def load_roles(config: Config, base: Base, artifact: Artifact, models: Sequence[Artifact]) -> Roles:
    """Load policy, reference, critic and reward models as adapters on one base model.

    Policy and reference start from `artifact`. Reward models on another base are left out.
    """
    from align.models.load import choose_checkpointing, choose_device, choose_dtype
    from align.ppo.workers import build_roles

    stage: PpoConfig = config.stage
    device = choose_device(config.device)
    roles = build_roles(
        base,
        find_adapter_folder(artifact),
        [model.path for model in select_models_on_base(models, base)],
        method=config.method.name,
        frozen_method=choose_frozen_method(config.method.name),
        fresh=Lora.from_settings(config.method),
        value_backbone=stage.value_backbone if stage.has_critic else "none",
        device=device,
        dtype=choose_dtype(config.dtype, device),
        seed=config.seed,
    )
    if choose_checkpointing(stage.gradient_checkpointing, device):
        roles.enable_gradient_checkpointing()
    return roles


def measure_greedy_variety(workers: Workers, start: Mapping[str, float], config: Config) -> dict[str, float]:
    """Return metrics of the variety of the policy's greedy answers to held-out prompts, and of mode collapse.

    Args:
        start: these metrics before training; empty to measure them before training.

    Returns:
        `greedy_distinct`, the number of different answers; `greedy_commonest`, the share of the commonest one; and
        `collapse`, 1 if the policy collapsed (`align.evals.collapse`), else 0. Empty with fewer than 64 distinct
        prompts, and with reward=check.
    """
    from align.evals.collapse import (
        MIN_PROMPTS,
        find_distinct_prompts,
        get_prompt_text,
        judge_collapse,
        measure_variety,
    )
    from align.rollout.engine import use_greedy_decoding

    prompts = [get_prompt_text(prompt.conversation.messages) for prompt in workers.held_out]
    first = find_distinct_prompts(prompts)
    shares_answers = config.reward.name == "check"  # many prompts may have the same right answer
    if shares_answers or not config.stage.tripwires.collapse or len(first) < MIN_PROMPTS:
        return {}
    with use_greedy_decoding(workers.engine):
        answers = workers.sample("policy", workers.held_out, "held_out")
    variety = measure_variety([prompts[i] for i in first], [answers.judged_texts[i] for i in first])
    figures = {"greedy_distinct": float(variety.distinct), "greedy_commonest": variety.commonest_share.value}
    if not start:
        return figures
    collapse = judge_collapse(variety, int(start["greedy_distinct"]), start["greedy_commonest"])
    return {**figures, "collapse": float(collapse.is_collapsed)}


def save_policy_and_critic(run: Run, config: Config, workers: Workers, trained: LoopResult) -> None:
    """Write the policy, the critic and the tokenizer to the run's artifact: the best policy with `publish=best`, or the
    last.

    The best policy's weights are restored in place. Only rank 0 writes.
    """
    from align.models.load import choose_device, choose_dtype, save_tokenizer

    if trained.state.best and config.stage.publish == "best":
        workers.restore_policy(trained.state.best.weights)
    if not ranks.is_main():
        return
    workers.roles.save("policy", run.artifact, run.base, choose_dtype(config.dtype, choose_device(config.device)))
    if config.stage.has_critic:
        workers.roles.save_critic(run.artifact / "value", run.base)
    save_tokenizer(workers.tokenizer, run.artifact)


def send_suspects_to_annotators(run: Run, config: Config, trained: LoopResult) -> None:
    """Add the answers that are suspected of reward hacking to the annotation store, for people to judge.

    Called if a tripwire stopped the run. Answers to prompts with tools are left out.
    """
    suspects = [(prompt, candidates) for prompt, candidates in trained.suspects if not prompt.uses_tools]
    with_tools = len(trained.suspects) - len(suspects)
    if with_tools:
        print(f"{with_tools} suspicious answers are to prompts with tools, which the annotation page does not show")
    if not ranks.is_main():
        return
    step = trained.rows[-1]["step"]
    key = f"{run.name}/{json_digest(run.manifest.identity)[:8]}/{step}"  # a later run may have the same name
    with open_store(config) as store, store.transaction():
        for k, (prompt, candidates) in enumerate(suspects):
            store.add_item(config.project, f"{key}/suspect/{k}", prompt, candidates)
    print(f"{len(suspects)} suspicious answers are in project {config.project}, to be judged by people")
