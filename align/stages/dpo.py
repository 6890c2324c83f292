"""`stage=dpo`: train an adapter on preference pairs with DPO, IPO, ORPO or SimPO.

reference logprobs of the held-out pairs, from the adapter that training starts from
train with the loss of `stage.loss`; DPO's implicit reward is beta · log(π / π_ref), ORPO and SimPO have no reference
accuracy on the held-out pairs by log(π / π_ref); save the adapter
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from align.annotate.posteriors import load_soft_preferences
from align.config.dpo import DpoConfig
from align.config.root import Config
from align.config.training import require_held_out_rows
from align.core.errors import require
from align.core.types import Preference, StageResult
from align.data.chat.encode import find_stop_token_ids
from align.data.chat.training_view import write_first_pair
from align.data.pairs import TokenizedPair, encode_pair_splits, read_divided_preferences, smooth_labels
from align.models.lora import Lora
from align.report import format_interval
from align.run import Run
from align.stages.runner import (
    StageInputs,
    build_judgement_inputs,
    collect_memory_metrics,
    load_training_setup,
    open_tracker,
)
from align.trainers import require_trl_trainer

if TYPE_CHECKING:
    from torch import Tensor

PRELOAD = ("align.trainers.dpo",)
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    require_trl_trainer(config.stage.loss)
    return build_judgement_inputs(config, read_divided_preferences, load_soft_preferences)


def run(run: Run, config: Config, train_prefs: list[Preference], test_prefs: list[Preference]) -> StageResult:
    import torch

    from align.evals.held_out import (
        compute_pair_logprobs,
        compute_preference_figures,
        find_simulated_scorers,
        require_finite,
        write_held_out_pairs,
    )
    from align.models.adapters import save_adapter
    from align.models.load import read_configurations, save_tokenizer
    from align.trainers.common import fit, load_referenced_policy
    from align.trainers.dpo import build_dpo_trainer, get_figure_names

    stage: DpoConfig = config.stage
    base = run.base
    artifact, tokenizer, device, dtype, max_length = load_training_setup(run, config)
    stops = find_stop_token_ids(tokenizer, read_configurations(base).generation_config)
    train, test, counts = encode_pair_splits(tokenizer, (train_prefs, test_prefs), stops, max_length)
    print(
        f"{len(train)} pairs to train on, {len(test)} held out; "
        f"{counts['dropped']} and {counts['held_out_dropped']} more are longer than {max_length} tokens"
    )
    run.known_metrics = counts
    write_first_pair(run.folder, tokenizer, train[0][1], has_loss_on_answers=True)
    require_held_out_rows(stage.eval_every, len(test), "stage.held_out")
    by_token = stage.loss != "sigmoid"
    if by_token:
        require_answer_tokens(stage.loss, (*train, *test))
    model = load_referenced_policy(
        base,
        config.method.name,
        artifact,
        Lora.from_settings(config.method),
        config.seed,
        device,
        dtype,
        stage.name,
        stage.has_reference,
    )

    # Held-out pairs are measured by log(π / π_ref) of each answer.
    held_out = [pref for pref, _ in test]
    pairs = smooth_labels([pair for _, pair in test], stage.label_smoothing)

    def measure_logprobs(steps: int) -> Tensor:
        """Return log π of the chosen and the rejected answer of each held-out pair, shape [M, 2].

        Args:
            steps: number of training steps so far, for the error if a logprob is not finite.
        """
        logprobs_M2 = compute_pair_logprobs(model.eval(), pairs, tokenizer.pad_token_id, by_token)
        assert stage.lr is not None  # filled in by `fill_learning_rates`
        require_finite(logprobs_M2, "pairs have logprobs", steps, stage.lr, config.dtype)
        return logprobs_M2

    at_start = measure_logprobs(0)
    loss = partial(compute_pair_loss, stage, torch.tensor([pair.label for pair in pairs], device="cpu"))
    assert stage.beta is not None, "`check_together` has set it"
    fitted = fit(
        partial(
            build_dpo_trainer,
            model,
            tokenizer,
            smooth_labels([pair for _, pair in train], stage.label_smoothing),
            beta=stage.beta,
            loss=stage.loss,
            simpo_gamma=stage.simpo_gamma,
        ),
        model,
        stage,
        config.seed,
        len(train),
        run,
        lambda step: loss(measure_logprobs(step), at_start),
        device=device,
        dtype=dtype,
        track=open_tracker,
        figure_names=get_figure_names(stage.loss),
    )

    at_end = measure_logprobs(fitted.published_step)
    log_ratios_M2 = at_end - at_start
    gap_M = log_ratios_M2[:, 0] - log_ratios_M2[:, 1]
    longest = max(len(ids) for _, pair in train for ids in (pair.chosen_ids, pair.rejected_ids))
    metrics = {
        **compute_preference_figures(held_out, gap_M),
        "loss_before": loss(at_start, at_start),
        "loss": loss(at_end, at_start),
        **run.known_metrics,
        **fitted.figures,
        **find_simulated_scorers(train_prefs),
        **collect_memory_metrics(run, config, longest),
    }
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    log_odds = stage.beta if stage.loss == "sigmoid" else None  # only DPO's sigmoid loss models a probability
    write_held_out_pairs(run.folder / "held_out.jsonl", held_out, gap_M, log_odds=log_odds)
    return StageResult(metrics, (f"held out: accuracy {format_interval(metrics['accuracy'])}", fitted.summary))


def compute_pair_loss(stage: DpoConfig, labels_M: Tensor, logprobs_M2: Tensor, reference_M2: Tensor) -> float:
    """Compute the mean DPO, ORPO or SimPO loss of preference pairs, as `stage.loss` says.

    Args:
        labels_M: probability that the chosen answer is better; only `sigmoid` reads it.
        logprobs_M2: log π of the better and the worse answer of each pair.
        reference_M2: the same before training, which is log π_ref.
    """
    from align.ops.losses import dpo_loss, orpo_loss, simpo_loss

    assert stage.beta is not None, "`check_together` has set it"
    chosen_M = logprobs_M2[:, 0]
    rejected_M = logprobs_M2[:, 1]
    if stage.loss == "orpo":
        return float(orpo_loss(chosen_M, rejected_M, stage.beta))
    if stage.loss == "simpo":
        return float(simpo_loss(chosen_M, rejected_M, stage.beta, stage.simpo_gamma))
    log_ratios_M2 = logprobs_M2 - reference_M2
    return float(dpo_loss(log_ratios_M2[:, 0] - log_ratios_M2[:, 1], stage.beta, stage.loss, labels_M))


def require_answer_tokens(loss: str, pairs: Iterable[tuple[Preference, TokenizedPair]]) -> None:
    """Raise InputError if an answer of a pair has no tokens, because the loss is a mean over an answer's tokens."""
    for pref, pair in pairs:
        tokens = min(len(pair.chosen_ids) - pair.chosen_start, len(pair.rejected_ids) - pair.rejected_start)
        problem = f"takes a mean over an answer's tokens, and an answer of pair {pref.id or '(no id)'} has none"
        require(tokens > 0, "stage.loss", loss, problem, "Leave the pair out, or use stage.loss=sigmoid.")
