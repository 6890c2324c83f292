"""`stage=kto`: train an adapter with KTO on single answers that are labelled wanted or unwanted.

reference logprobs of the held-out answers, from the adapter that training starts from
train; an answer's implicit reward is log(π / π_ref), compared with the mean over mismatched prompts and answers
accuracy or AUC on the held-out answers; save the adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from align.annotate.posteriors import load_soft_preferences
from align.config.kto import KtoConfig
from align.config.root import Config
from align.config.training import require_held_out_rows
from align.core.types import Feedback, Preference, StageResult
from align.data.chat.encode import find_stop_token_ids
from align.data.chat.training_view import write_first_labelled_answers
from align.data.pairs import (
    Judgements,
    TokenizedAnswer,
    check_labels_vary,
    choose_mismatched_answers,
    encode_answers,
    encode_pairs,
    iter_labelled_answers,
    read_divided_judgements,
)
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

if TYPE_CHECKING:
    from torch import Tensor

PRELOAD = ("align.trainers.kto",)
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""
ONE_LABEL = "all held-out answers have the same label, so neither accuracy nor AUC can be computed"


def inputs(config: Config) -> StageInputs:
    """Resolve the initial adapter or model and the labelled answers or preference pairs of `stage=kto`."""
    return build_judgement_inputs(config, read_divided_judgements, load_soft_preferences)


def run(run: Run, config: Config, train_records: Judgements, test_records: Judgements) -> StageResult:
    import torch

    from align.evals.held_out import compute_answer_logprobs, find_simulated_scorers, require_finite
    from align.models.adapters import save_adapter
    from align.models.load import read_configurations, save_tokenizer
    from align.ops.losses import compute_kto_reference, kto_loss
    from align.trainers.common import fit, load_referenced_policy
    from align.trainers.kto import FIGURES, build_kto_trainer

    stage: KtoConfig = config.stage
    base = run.base
    artifact, tokenizer, device, dtype, max_length = load_training_setup(run, config)
    stops = find_stop_token_ids(tokenizer, read_configurations(base).generation_config)
    train, test = (encode_split(tokenizer, records, stops, max_length) for records in (train_records, test_records))
    print(
        f"{train.wanted_count} wanted and {len(train.rows) - train.wanted_count} unwanted answers to train on, "
        f"{len(test.rows)} answers held out; {train.dropped} and {test.dropped} more are longer than {max_length} "
        "tokens"
    )
    data = config.data.path or config.data.name
    check_labels_vary([row.wanted for row in train.rows], [row.prompt for row in train.rows], data)
    run.known_metrics = {
        "wanted": train.wanted_count,
        "unwanted": len(train.rows) - train.wanted_count,
        "held_out_answers": len(test.rows),
        "dropped": train.dropped,
        "held_out_dropped": test.dropped,
    }
    write_first_labelled_answers(run.folder, tokenizer, train.rows)
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

    matched, mismatched = build_held_out_rows(train.rows, test.rows, max_length)
    is_wanted = torch.tensor([row.wanted for row in test.rows], device="cpu")
    weights_N = torch.tensor([row.weight for row in test.rows], device="cpu")
    weights = {"desirable_weight": stage.desirable_weight, "undesirable_weight": stage.undesirable_weight}

    def measure_logprobs(steps: int) -> Tensor:
        """Return log π of the held-out answers and, for the same prompts, of mismatched answers, shape [2, N].

        Args:
            steps: number of training steps so far, for the error if a logprob is not finite.
        """
        logprobs_2N = torch.stack(
            [compute_answer_logprobs(model.eval(), rows, tokenizer.pad_token_id) for rows in (matched, mismatched)]
        )
        assert stage.lr is not None  # filled in by `fill_learning_rates`
        require_finite(logprobs_2N.T, "answers have logprobs", steps, stage.lr, config.dtype)
        return logprobs_2N

    def loss(logprobs_2N: Tensor) -> float:
        rewards, mismatched_rewards = logprobs_2N - at_start
        reference = compute_kto_reference(mismatched_rewards)
        return float(
            kto_loss(
                rewards,
                is_wanted,
                reference,
                stage.beta,
                stage.desirable_weight,
                stage.undesirable_weight,
                weights_N,
            )
        )

    at_start = measure_logprobs(0)
    fitted = fit(
        partial(build_kto_trainer, model, tokenizer, train.rows, beta=stage.beta, max_length=max_length, **weights),
        model,
        stage,
        config.seed,
        len(train.rows),
        run,
        lambda step: loss(measure_logprobs(step)),
        device=device,
        dtype=dtype,
        track=open_tracker,
        figure_names=FIGURES,
    )

    at_end = measure_logprobs(fitted.published_step)
    figures = write_held_out_figures(run, test, (at_end - at_start)[0])
    longest = max(len(row.ids) for row in train.rows)
    metrics = {
        **figures,
        "loss_before": loss(at_start),
        "loss": loss(at_end),
        **run.known_metrics,
        **fitted.figures,
        **find_simulated_scorers([record for record in train.records if isinstance(record, Preference)]),
        **collect_memory_metrics(run, config, longest),
    }
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    headlines = [f"held out: {key} {format_interval(figures[key])}" for key in ("accuracy", "auc") if key in figures]
    return StageResult(metrics, (headlines[0] if headlines else ONE_LABEL, fitted.summary))


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """The tokenized answers of the training or the held-out split, with the records that they come from.

    Attributes:
        records: the labelled answers or preference pairs that fit into the maximum length.
        rows: their answers as tokens. A pair gives two rows, the chosen answer and then the rejected one.
        dropped: number of records that were too long.
    """

    records: Judgements
    rows: list[TokenizedAnswer]
    dropped: int

    @property
    def wanted_count(self) -> int:
        return sum(row.wanted for row in self.rows)


def encode_split(tokenizer: Any, records: Judgements, stops: tuple[int, ...], max_length: int) -> EncodedSplit:
    """Tokenize labelled answers or preference pairs, and drop records longer than `max_length` tokens."""
    prefs = [record for record in records if isinstance(record, Preference)]
    if prefs:
        pairs, dropped = encode_pairs(tokenizer, prefs, stops, max_length)
        return EncodedSplit([pref for pref, _ in pairs], [*iter_labelled_answers([pair for _, pair in pairs])], dropped)
    feedback = [record for record in records if isinstance(record, Feedback)]
    answers, dropped = encode_answers(tokenizer, feedback, stops, max_length)
    return EncodedSplit([record for record, _ in answers], [row for _, row in answers], dropped)


class HeldOutRows(NamedTuple):
    """The held-out prompts with their own and with mismatched answers, as token ids and the answer's first position.

    Attributes:
        matched: each prompt with its own answer.
        mismatched: each prompt with the answer to another prompt, from which the loss computes its reference point.
    """

    matched: list[tuple[list[int], int]]
    mismatched: list[tuple[list[int], int]]


def build_held_out_rows(
    train: Sequence[TokenizedAnswer], test: Sequence[TokenizedAnswer], max_length: int
) -> HeldOutRows:
    """Build two lists of token rows: each held-out prompt with its own answer, and with the answer to another prompt.

    Mismatched rows are cut to `max_length` tokens.
    """
    rows = [*test, *train]  # all held-out rows may have the same prompt; training rows have another one
    mismatched_answers = choose_mismatched_answers(range(len(test)), rows)
    mismatched = [
        ((row.prompt + answer)[:max_length], row.start) for row, answer in zip(test, mismatched_answers, strict=True)
    ]
    return HeldOutRows([(row.ids, row.start) for row in test], mismatched)


def write_held_out_figures(run: Run, test: EncodedSplit, rewards_N: Tensor) -> dict[str, Any]:
    """Write the implicit rewards of the held-out answers to `held_out.jsonl`, and return their metrics.

    For preference pairs these are of the reward gap between the chosen and the rejected answer.

    Args:
        rewards_N: log(π / π_ref) of each answer.
    """
    from align.evals.held_out import (
        compute_label_figures,
        compute_preference_figures,
        write_held_out_answers,
        write_held_out_pairs,
    )

    path = run.folder / "held_out.jsonl"
    prefs = [record for record in test.records if isinstance(record, Preference)]
    if prefs:
        gap_M = rewards_N[0::2] - rewards_N[1::2]
        write_held_out_pairs(path, prefs, gap_M, log_odds=None)
        return compute_preference_figures(prefs, gap_M)
    answers = [record for record in test.records if isinstance(record, Feedback)]
    write_held_out_answers(path, answers, rewards_N)
    return compute_label_figures(answers, rewards_N)
