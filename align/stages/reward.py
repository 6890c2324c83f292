"""A reward model: Bradley–Terry on preference pairs, from where the SFT adapter left off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from align import ranks
from align.config.reward import RewardStageConfig
from align.config.root import Config, find_store_url
from align.config.training import require_held_out_rows
from align.core.redaction import drop_masks, mask_secrets
from align.core.types import Preference, StageResult
from align.data.chat.encode import stop_token_ids
from align.data.chat.training_view import write_pair
from align.data.pairs import TokenizedPair, encode_sides, read_divided_preferences
from align.models.base import adapter_folder
from align.models.lora import Lora, LoraLike
from align.report import in_words
from align.run import Input, Run, json_digest
from align.stages.runner import (
    Inputs,
    find_judgement_inputs,
    load_training_start,
    measure_memory,
    open_store,
    open_tracker,
)

if TYPE_CHECKING:
    from torch import Tensor

PRELOAD = ("align.trainers.reward",)
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    found = find_judgement_inputs(config, read_divided_preferences)
    if config.stage.prioritise:  # what it writes to: the same votes in another store are another run
        found.records["queue"] = Input(json_digest([drop_masks(mask_secrets(find_store_url(config))), config.project]))
    return found


def run(run: Run, config: Config, train_prefs: list[Preference], test_prefs: list[Preference]) -> StageResult:
    import torch
    from torch.nn.functional import logsigmoid

    from align.evals.held_out import held_out_figures, simulated_by, write_held_out_pairs
    from align.models.adapters import SCORE_KEY, adapter_config, read_tensors, save_adapter, with_new_adapter
    from align.models.load import load_classifier, save_tokenizer
    from align.trainers.common import fit
    from align.trainers.reward import FIGURES, copy_adapter_weights, group_rankings, reward_trainer

    stage: RewardStageConfig = config.stage
    base = run.base
    artifact, tokenizer, device, dtype, max_length = load_training_start(run, config)
    stops = stop_token_ids(tokenizer)
    train, test, counts = encode_sides(tokenizer, (train_prefs, test_prefs), stops, max_length)
    judged = group_rankings((pref.group_id or pref.id or f"row {i}", pair) for i, (pref, pair) in enumerate(train))
    of = "" if len(judged) == len(train) else f" of {len(judged)} rankings"
    print(
        f"{len(train)} pairs{of} to train on, {len(test)} pairs held out; "
        f"{counts['dropped']} and {counts['held_out_dropped']} more are longer than {max_length} tokens"
    )
    # The longest text in every place of the largest ranking.
    longest = max(len(text) for ranking in judged for text in ranking.texts)
    texts = max(len(ranking.texts) for ranking in judged)
    run.known_metrics = {**counts, "rankings": len(judged)}
    write_pair(run.folder, tokenizer, train[0][1], answers=False)
    require_held_out_rows(stage.eval_every, len(test), "stage.held_out")

    # The same base with a score head; LoRA from the SFT adapter, head from zero.
    adapter = adapter_folder(artifact)
    lora = LoraLike(adapter_config(adapter, "init")) if adapter else Lora.from_settings(config.method)
    model = load_classifier(base, config.method.name, device, dtype)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    model = with_new_adapter(model, lora, classifier=True)
    copied = copy_adapter_weights(model, adapter)

    # Held-out pairs, scored where training read the score.
    held_out = [pref for pref, _ in test]
    assert stage.lr is not None  # filled in by `fill_rates`
    measure = partial(pair_scores, model, [pair for _, pair in test], tokenizer.pad_token_id, stage.lr, config.dtype)

    def loss(scores_M2: Tensor) -> float:
        """Return Bradley–Terry's −log σ(gap), the mean over pairs, in nats."""
        return float(-logsigmoid(scores_M2[:, 0] - scores_M2[:, 1]).mean())

    fitted = fit(
        partial(reward_trainer, model, tokenizer, judged),
        model,
        stage,
        config.seed,
        len(judged),
        run,
        lambda step: loss(measure(step)),
        device=device,
        dtype=dtype,
        track=open_tracker,
        figures=FIGURES,
    )

    scores_M2 = measure(fitted.published_step)
    gap_M = scores_M2[:, 0] - scores_M2[:, 1]
    metrics = {
        **held_out_figures(held_out, gap_M),
        "loss": loss(scores_M2),
        **run.known_metrics,
        "copied_tensors": copied,
        **fitted.figures,
        **simulated_by(train_prefs),
        **measure_memory(run, config, longest, texts=texts),
    }
    save_adapter(model, run.artifact, base)
    assert SCORE_KEY in read_tensors(run.artifact), "the score head was not saved"
    save_tokenizer(tokenizer, run.artifact)
    notes = []
    if stage.prioritise:
        metrics["prioritised"] = prioritise(config, model, tokenizer, stops, max_length)
        notes.append(f"{metrics['prioritised']} items ordered by how unsure it is of them")
    write_held_out_pairs(run.folder / "held_out.jsonl", held_out, gap_M, scores_M2)
    figures = ", ".join(f"{name} {in_words(value)}" for name, value in metrics.items() if isinstance(value, dict))
    return StageResult(metrics, (*notes, f"held out: {figures}", fitted.summary))


def prioritise(config: Config, model: Any, tokenizer: Any, stops: tuple[int, ...], max_length: int) -> int:
    """Order a project's items by how unsure the model is of them, see `annotate.priority`. Returns how many were
    ordered. The first rank reads and writes them, and all score."""
    from align.annotate.priority import answers_of, uncertainties
    from align.trainers.reward import score_head

    with open_store(config, create=False) if ranks.is_main() else nullcontext() as store:
        given = answers_of(store, config.project, tokenizer, stops, max_length) if store else {}
        unsure = uncertainties(model, score_head(model), ranks.broadcast(given), tokenizer.pad_token_id)
        return store.prioritise(config.project, unsure) if store else 0


def pair_scores(model: Any, pairs: Sequence[TokenizedPair], pad_id: int, lr: float, dtype: str, steps: int) -> Tensor:
    """Return the scores of the better and the worse answer of each pair [M, 2].

    Args:
        steps: of training behind them.

    Raises:
        InputError: some are not finite.
    """
    import torch

    from align.models.finite_checks import diverged
    from align.ops.finite import count_not_finite
    from align.reward.learned import score_rows
    from align.trainers.reward import score_head

    tokens = [tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    place = {ids: i for i, ids in enumerate(dict.fromkeys(tokens))}  # each answer is scored once
    scores = score_rows(model.eval(), score_head(model), list(place), pad_id)
    if count := count_not_finite(scores):
        what = f"{count} of {len(scores)} held-out answers have scores that are no numbers after step {steps}"
        raise diverged(f"{what}: nothing is published", lr, dtype)
    return scores[torch.tensor([place[ids] for ids in tokens])].view(-1, 2)
