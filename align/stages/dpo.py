"""DPO: the policy's logprobs, against those of the adapter it started from, are the reward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.config.dpo import DpoConfig
from align.config.root import Config
from align.config.training import held_out_for
from align.data.chat import stop_token_ids
from align.data.pairs import Pair, encoded_sides
from align.data.template import use_template
from align.data.trained_on import write_pair
from align.errors import require
from align.evals.pair_accuracy import held_out_figures, simulated_by, write_held_out
from align.models.actor import ModelActor
from align.models.adapters import attach, save_adapter, with_new_adapter
from align.models.backbone import answered, response_logprobs
from align.models.chunks import in_chunks
from align.models.finite import diverged
from align.models.load import (
    choose_device,
    choose_dtype,
    context_length,
    describe,
    load_base,
    own_tokenizer,
    save_tokenizer,
)
from align.models.plain_path import route_of
from align.models.start import adapter_folder
from align.ops.finite import not_finite
from align.ops.losses import dpo_loss
from align.report import in_words
from align.run import Run
from align.stages.execution import tracker
from align.stages.footprint import predicted_peak
from align.stages.inputs import lora_of, start
from align.track import peak_memory
from align.trainers.common import Training, fit
from align.trainers.dpo import FIGURES, REFERENCE, dpo_trainer
from align.trainers.evaluation import Measuring
from align.types import Preference, Result


def run(run: Run, config: Config, train_prefs: list[Preference], test_prefs: list[Preference]) -> Result:
    stage: DpoConfig = config.stage
    base, artifact = run.base, start(config, run.inputs["init"].path)[0]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    tokenizer, described = own_tokenizer(artifact, base), describe(base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    stops = stop_token_ids(tokenizer, described.generation_config)
    max_length = min(config.data.max_length, context_length(described))
    train, test, counts = encoded_sides(tokenizer, (train_prefs, test_prefs), stops, max_length)
    print(
        f"{len(train)} pairs to train on, {len(test)} held out; "
        f"{counts['dropped']} and {counts['held_out_dropped']} more are longer than {max_length} tokens"
    )
    run.known_metrics = counts
    write_pair(run.folder, tokenizer, train[0][1], answers=True)
    held_out_for(stage.eval_every, len(test), "stage.held_out")

    # The policy is the supervised adapter, or a fresh one on a whole model.
    model, adapter = load_base(base, config.method.name, device, dtype), adapter_folder(artifact)
    require(
        route_of(model).halves, "stage", "dpo",
        f"type {model.config.model_type} has logits that are more than a head on hidden states, which TRL's DPO reads",
        "Use stage=reward and stage=ppo.",
    )  # fmt: skip
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    if adapter is None:
        model = with_new_adapter(model, lora_of(config))
    else:
        model = attach(model, adapter, "default", trainable=True)

    # Held-out pairs by the implicit reward, log π / π_ref of an answer.
    held_out, pairs = [pref for pref, _ in test], [pair for _, pair in test]
    by_token = stage.loss == "ipo"
    gaps = partial(reward_gaps, model, pairs, tokenizer.pad_token_id, by_token, stage.lr, config.dtype)
    loss = partial(dpo_loss, beta=stage.beta, kind=stage.loss)
    fitted = fit(
        partial(dpo_trainer, model, tokenizer, [pair for _, pair in train], beta=stage.beta, loss=stage.loss),
        model, Training.of(stage, config.seed), len(train), run,
        Measuring.by(lambda step: float(loss(gaps(step))), stage),
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every, figures=FIGURES,
    )  # fmt: skip

    gap = gaps(fitted.published_step)
    losses = (float(loss(of)) for of in (torch.zeros(1), gap))
    metrics = {
        **held_out_figures(held_out, gap),
        **dict(zip(("loss_before", "loss"), losses, strict=True)), **run.known_metrics,
        **fitted.figures, **peak_memory(), **simulated_by(train_prefs),
        **predicted_peak(config, run, max(len(ids) for _, p in train for ids in (p.chosen_ids, p.rejected_ids))),
    }  # fmt: skip

    # Publish.
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    sure = stage.beta if stage.loss == "sigmoid" else None  # the other loss says nothing of probabilities
    write_held_out(run.folder / "held_out.jsonl", held_out, gap, log_odds=sure)
    return Result(metrics, (f"held out: accuracy {in_words(metrics['accuracy'])}", fitted.said))


def reward_gaps(
    model: Any, pairs: list[Pair], pad_id: int, by_token: bool, lr: float, dtype: str, steps: int
) -> Tensor:
    """By how much log π / π_ref of the better answer of each pair is above that of the worse [M], as so many steps of
    training left them.

    Raises:
        InputError: some are no numbers.
    """
    policy, reference = (ModelActor(model.eval(), name) for name in ("default", REFERENCE))
    own, at_start = (margins(p, pairs, pad_id, by_token) for p in (policy, reference))
    model.set_adapter("default")  # which goes on training
    gap = own - at_start
    if count := not_finite(gap):
        what = f"{count} of {len(gap)} held-out pairs have margins that are no numbers after step {steps}"
        raise diverged(f"{what}: nothing is published", lr, dtype)
    return gap


@torch.no_grad()
def margins(actor: ModelActor, pairs: list[Pair], pad_id: int, by_token: bool = False, size: int = 32) -> Tensor:
    """log π(chosen) − log π(rejected) of each pair [M], on the CPU; `by_token`: of means over an answer's tokens."""
    sides = [
        [(p.chosen_ids, p.chosen_start) for p in pairs],
        [(p.rejected_ids, p.rejected_start) for p in pairs],
    ]
    device = next(actor.model.parameters()).device

    def logprobs(rows: list[tuple[list[int], int]]) -> Tensor:
        rollout = answered([ids[:n] for ids, n in rows], [ids[n:] for ids, n in rows], pad_id, device)
        each = in_chunks(lambda part: response_logprobs(actor.model, part, 1.0)[0].sum(-1), rollout, size).cpu()
        return each / torch.tensor([len(ids) - n for ids, n in rows]) if by_token else each

    with actor.use():
        chosen, rejected = (logprobs(rows) for rows in sides)
    return chosen - rejected
