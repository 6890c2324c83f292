"""`stage=reward`: train a reward model on preference pairs, with a score head on a copy of the SFT adapter.

load the base with a score head of zeros; copy the SFT adapter's weights
train on rankings with the Bradley–Terry loss: −log σ(score of the better answer − score of the worse answer), or with
soft labels its mean over both orders of the answers
accuracy on the held-out pairs; save adapter and head
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.annotate.posteriors import load_soft_preferences
from align.config.reward import RewardStageConfig
from align.config.root import Config
from align.config.training import require_held_out_rows
from align.core.types import Preference, StageResult
from align.data.chat.encode import find_stop_token_ids
from align.data.chat.training_view import write_first_pair
from align.data.pairs import TokenizedPair, encode_pair_splits, read_divided_preferences
from align.models.base import find_adapter_folder
from align.models.lora import Lora, LoraLike
from align.report import format_interval
from align.run import Run
from align.stages.runner import (
    StageInputs,
    build_judgement_inputs,
    collect_memory_metrics,
    load_training_setup,
    open_tracker,
)

if TYPE_CHECKING:
    from torch import Tensor

PRELOAD = ("align.trainers.reward",)
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    return build_judgement_inputs(config, read_divided_preferences, load_soft_preferences)


def run(run: Run, config: Config, train_prefs: list[Preference], test_prefs: list[Preference]) -> StageResult:
    import torch

    from align.evals.held_out import compute_preference_figures, find_simulated_scorers, write_held_out_pairs
    from align.models.adapters import SCORE_KEY, add_new_adapter, read_adapter_config, read_tensors, save_adapter
    from align.models.load import load_classifier, save_tokenizer
    from align.trainers.common import fit
    from align.trainers.reward import (
        FIGURES,
        build_reward_trainer,
        compute_pair_losses,
        copy_adapter_weights,
        group_rankings,
    )

    stage: RewardStageConfig = config.stage
    base = run.base
    artifact, tokenizer, device, dtype, max_length = load_training_setup(run, config)
    stops = find_stop_token_ids(tokenizer)
    train, test, counts = encode_pair_splits(tokenizer, (train_prefs, test_prefs), stops, max_length)
    rankings = group_rankings((pref.group_id or pref.id or f"row {i}", pair) for i, (pref, pair) in enumerate(train))
    ranking_count = "" if len(rankings) == len(train) else f" of {len(rankings)} rankings"
    print(
        f"{len(train)} pairs{ranking_count} to train on, {len(test)} pairs held out; "
        f"{counts['dropped']} and {counts['held_out_dropped']} more are longer than {max_length} tokens"
    )
    # The peak of memory is predicted for the largest ranking with every text as long as the longest one.
    longest = max(len(text) for ranking in rankings for text in ranking.texts)
    texts = max(len(ranking.texts) for ranking in rankings)
    run.known_metrics = {**counts, "rankings": len(rankings)}
    write_first_pair(run.folder, tokenizer, train[0][1], has_loss_on_answers=False)
    require_held_out_rows(stage.eval_every, len(test), "stage.held_out")

    # The base with a score head of zeros, and a new adapter with the settings and the weights of the SFT adapter.
    adapter = find_adapter_folder(artifact)
    lora = LoraLike(read_adapter_config(adapter, "init")) if adapter else Lora.from_settings(config.method)
    model = load_classifier(base, config.method.name, device, dtype)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    model = add_new_adapter(model, lora, is_reward_model=True)
    copied = copy_adapter_weights(model, adapter)

    # Held-out pairs are scored at the same token position as in training.
    held_out = [pref for pref, _ in test]
    assert stage.lr is not None  # filled in by `fill_learning_rates`
    measure_scores = partial(
        compute_pair_scores, model, [pair for _, pair in test], tokenizer.pad_token_id, stage.lr, config.dtype
    )

    labels_M = torch.tensor([pair.label for _, pair in test], device="cpu")

    def loss(scores_M2: Tensor) -> float:
        """Return the mean Bradley–Terry loss of the held-out pairs, in nats."""
        return float(compute_pair_losses(scores_M2[:, 0] - scores_M2[:, 1], labels_M).mean())

    fitted = fit(
        partial(build_reward_trainer, model, tokenizer, rankings),
        model,
        stage,
        config.seed,
        len(rankings),
        run,
        lambda step: loss(measure_scores(step)),
        device=device,
        dtype=dtype,
        track=open_tracker,
        figure_names=FIGURES,
    )

    scores_M2 = measure_scores(fitted.published_step)
    gap_M = scores_M2[:, 0] - scores_M2[:, 1]
    metrics = {
        **compute_preference_figures(held_out, gap_M),
        "loss": loss(scores_M2),
        **run.known_metrics,
        "copied_tensors": copied,
        **fitted.figures,
        **find_simulated_scorers(train_prefs),
        **collect_memory_metrics(run, config, longest, texts=texts),
    }
    save_adapter(model, run.artifact, base)
    assert SCORE_KEY in read_tensors(run.artifact), "the score head was not saved"
    save_tokenizer(tokenizer, run.artifact)
    write_held_out_pairs(run.folder / "held_out.jsonl", held_out, gap_M, scores_M2)
    figures = ", ".join(
        f"{name} {format_interval(value)}" for name, value in metrics.items() if isinstance(value, dict)
    )
    return StageResult(metrics, (f"held out: {figures}", fitted.summary))


def compute_pair_scores(
    model: Any, pairs: Sequence[TokenizedPair], pad_id: int, lr: float, dtype: str, steps: int
) -> Tensor:
    """Compute the reward model's scores of the chosen and the rejected answer of each pair, float [M, 2].

    Args:
        lr, dtype, steps: learning rate, dtype and number of training steps, for the error message.

    Raises:
        InputError: a score is not finite.
    """
    import torch

    from align.models.finite_checks import build_divergence_error
    from align.ops.finite import count_not_finite
    from align.reward.learned import score_rows
    from align.trainers.reward import find_score_head

    tokens = [tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    row_of = {ids: i for i, ids in enumerate(dict.fromkeys(tokens))}  # an answer of several pairs is scored once
    scores = score_rows(model.eval(), find_score_head(model), list(row_of), pad_id)
    if count := count_not_finite(scores):
        problem = f"{count} of {len(scores)} held-out answers have scores that are not finite after step {steps}"
        raise build_divergence_error(f"{problem}: nothing is published", lr, dtype)
    return scores[torch.tensor([row_of[ids] for ids in tokens])].view(-1, 2)
