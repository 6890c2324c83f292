"""KTO: answers that were wanted or not, each by itself. The reward of an answer is its logprob, against that of the
adapter the policy started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.kto import KtoConfig
from align.config.root import Config
from align.config.training import require_held_out_rows
from align.core.types import Feedback, Preference, StageResult
from align.data.chat.encode import stop_token_ids
from align.data.chat.training_view import write_labelled
from align.data.pairs import (
    Judgements,
    TokenizedAnswer,
    check_labels,
    choose_mismatched_answers,
    encode_answers,
    encode_pairs,
    iter_labelled_answers,
    read_divided_judgements,
)
from align.models.lora import Lora
from align.report import in_words
from align.run import Run
from align.stages.runner import Inputs, find_judgement_inputs, load_training_start, measure_memory, open_tracker

if TYPE_CHECKING:
    from torch import Tensor

PRELOAD = ("align.trainers.kto",)
"""See `align.stages.load_stage`."""
ONE_LABEL = "the held-out answers have one label, so that nothing says whether it tells wanted from unwanted ones"


def inputs(config: Config) -> Inputs:
    return find_judgement_inputs(config, read_divided_judgements)


def run(run: Run, config: Config, train_records: Judgements, test_records: Judgements) -> StageResult:
    import torch

    from align.evals.held_out import answer_logprobs, require_finite, simulated_by
    from align.models.adapters import save_adapter
    from align.models.load import describe, save_tokenizer
    from align.ops.losses import compute_kto_reference, kto_loss
    from align.trainers.common import fit, load_referenced_policy
    from align.trainers.kto import FIGURES, kto_trainer

    stage: KtoConfig = config.stage
    base = run.base
    artifact, tokenizer, device, dtype, max_length = load_training_start(run, config)
    stops = stop_token_ids(tokenizer, describe(base).generation_config)
    train, test = (encode_side(tokenizer, side, stops, max_length) for side in (train_records, test_records))
    print(
        f"{train.wanted} wanted and {len(train.rows) - train.wanted} unwanted answers to train on, {len(test.rows)} "
        f"answers held out; {train.dropped} and {test.dropped} more are longer than {max_length} tokens"
    )
    data = config.data.path or config.data.name
    check_labels([row.wanted for row in train.rows], [row.prompt for row in train.rows], data)
    run.known_metrics = {
        "wanted": train.wanted,
        "unwanted": len(train.rows) - train.wanted,
        "held_out_answers": len(test.rows),
        "dropped": train.dropped,
        "held_out_dropped": test.dropped,
    }
    write_labelled(run.folder, tokenizer, train.rows)
    require_held_out_rows(stage.eval_every, len(test.rows), "stage.held_out")
    model = load_referenced_policy(
        base,
        config.method.name,
        artifact,
        Lora.from_settings(config.method),
        config.seed,
        device,
        dtype,
        stage.name,
        True,
    )

    measured_rows = pair_held_out(train.rows, test.rows, max_length)
    wanted = torch.tensor([row.wanted for row in test.rows], device="cpu")
    weights = {"desirable_weight": stage.desirable_weight, "undesirable_weight": stage.undesirable_weight}

    def measure_logprobs(steps: int) -> Tensor:
        """Return log π of the held-out answers, and of the answers to other prompts [2, N]."""
        logprobs_2N = torch.stack(
            [answer_logprobs(model.eval(), rows, tokenizer.pad_token_id) for rows in measured_rows]
        )
        assert stage.lr is not None  # filled in by `fill_rates`
        require_finite(logprobs_2N.T, "answers have logprobs", steps, stage.lr, config.dtype)
        return logprobs_2N

    def loss(logprobs_2N: Tensor) -> float:
        own, others = logprobs_2N - at_start
        return float(kto_loss(own, wanted, compute_kto_reference(others), stage.beta, *weights.values()))

    at_start = measure_logprobs(0)
    fitted = fit(
        partial(kto_trainer, model, tokenizer, train.rows, beta=stage.beta, max_length=max_length, **weights),
        model,
        stage,
        config.seed,
        len(train.rows),
        run,
        lambda step: loss(measure_logprobs(step)),
        device=device,
        dtype=dtype,
        track=open_tracker,
        figures=FIGURES,
    )

    at_end = measure_logprobs(fitted.published_step)
    figures = write_figures(run, test, (at_end - at_start)[0])
    longest = max(len(row.ids) for row in train.rows)
    metrics = {
        **figures,
        "loss_before": loss(at_start),
        "loss": loss(at_end),
        **run.known_metrics,
        **fitted.figures,
        **simulated_by([record for record in train.records if isinstance(record, Preference)]),
        **measure_memory(run, config, longest),
    }
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    lines = [f"held out: {key} {in_words(figures[key])}" for key in ("accuracy", "auc") if key in figures]
    return StageResult(metrics, (lines[0] if lines else ONE_LABEL, fitted.summary))


@dataclass(frozen=True, slots=True)
class Side:
    """The side that is trained on, or measured on.

    Attributes:
        records: answers with a label, or pairs, that fit.
        rows: their answers as tokens; of each pair the chosen one, then the rejected one.
        dropped: number of records that were too long.
    """

    records: Judgements
    rows: list[TokenizedAnswer]
    dropped: int

    @property
    def wanted(self) -> int:
        return sum(row.wanted for row in self.rows)


def encode_side(tokenizer: Any, records: Judgements, stops: tuple[int, ...], max_length: int) -> Side:
    prefs = [record for record in records if isinstance(record, Preference)]
    if prefs:
        pairs, dropped = encode_pairs(tokenizer, prefs, stops, max_length)
        return Side([pref for pref, _ in pairs], [*iter_labelled_answers([pair for _, pair in pairs])], dropped)
    feedback = [record for record in records if isinstance(record, Feedback)]
    answers, dropped = encode_answers(tokenizer, feedback, stops, max_length)
    return Side([record for record, _ in answers], [row for _, row in answers], dropped)


def pair_held_out(
    train: Sequence[TokenizedAnswer], test: Sequence[TokenizedAnswer], max_length: int
) -> tuple[list[tuple[list[int], int]], ...]:
    """Return the held-out answers, and each of their prompts with an answer to another one, as the loss pairs them."""
    every = [*test, *train]  # where all that is held out answers one prompt, training has another
    others = choose_mismatched_answers(range(len(test)), every)
    mixed = [((row.prompt + other)[:max_length], row.start) for row, other in zip(test, others, strict=True)]
    return [(row.ids, row.start) for row in test], mixed


def write_figures(run: Run, test: Side, rewards_N: Tensor) -> dict[str, Any]:
    """Write `held_out.jsonl`, and return the figures of the held-out answers; of pairs, by how much the chosen one is
    above the other.

    Args:
        rewards_N: log π / π_ref of each answer.
    """
    from align.evals.held_out import held_out_figures, label_figures, write_held_out_answers, write_held_out_pairs

    path = run.folder / "held_out.jsonl"
    prefs = [record for record in test.records if isinstance(record, Preference)]
    if prefs:
        gap_M = rewards_N[0::2] - rewards_N[1::2]
        write_held_out_pairs(path, prefs, gap_M, log_odds=None)
        return held_out_figures(prefs, gap_M)
    answers = [record for record in test.records if isinstance(record, Feedback)]
    write_held_out_answers(path, answers, rewards_N)
    return label_figures(answers, rewards_N)
