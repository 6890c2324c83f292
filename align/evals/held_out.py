"""Figures on held-out data: the loss of rows, the implicit reward of answers, and the accuracy on pairs and labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align import ranks
from align.core.types import Conversation, Feedback, Preference
from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.data.pairs import TokenizedPair
from align.data.split import compute_question_key
from align.evals.text import join_turns
from align.models.finite_checks import build_divergence_error
from align.models.forward import (
    compute_in_chunks,
    compute_picked_logprobs,
    compute_response_logprobs,
    pad_rows,
    rollout_from_answers,
)
from align.models.sharded import is_sharded
from align.ops.auc import auc
from align.ops.intervals import Interval, average_by_group, proportion_interval, ratio_interval
from align.reward.rules import BY_NAME
from align.run import write_text
from align.track import format_row

SIDES = ("chosen", "rejected")
CHUNK_SIZE = 32
TokenRow = tuple[list[int], int]
"""Token ids of a prompt followed by its answer, and the index at which the answer begins."""


class HeldOutLoss(NamedTuple):
    """The loss of a model on held-out rows, over all tokens and by row.

    Attributes:
        mean: negative log-likelihood over the trained tokens of all rows, in nats a token.
        tokens: number of these tokens.
        by_row: nats of each row, summed over its tokens, in the order of the rows.
        sizes: tokens of each row.
    """

    mean: float
    tokens: int
    by_row: list[float]
    sizes: list[int]

    def select(self, is_selected: Sequence[bool]) -> HeldOutLoss:
        """Return the loss on the rows whose flag in `is_selected` is True, at least one."""
        by_row = list(compress(self.by_row, is_selected))
        sizes = list(compress(self.sizes, is_selected))
        return HeldOutLoss(sum(by_row) / sum(sizes), sum(sizes), by_row, sizes)

    def compute_change(self, after: HeldOutLoss) -> Interval:
        """Return the change of the mean loss from this measurement to `after` training, on the same rows, in nats per
        token. It is negative if training helped."""
        return ratio_interval([b - a for a, b in zip(self.by_row, after.by_row, strict=True)], self.sizes)


class BatchLoss(NamedTuple):
    """The loss of one batch of rows, in total and by row.

    Attributes:
        nats: the negative log-likelihood, summed over the batch.
        row_nats: the same of each row.
        token_counts: number of scored tokens of each row.
    """

    nats: float
    row_nats: list[float]
    token_counts: list[int]


@torch.no_grad()
def compute_held_out_loss(model: Any, rows: Sequence[EncodedRow], pad_id: int, batch_size: int = 16) -> HeldOutLoss:
    """Compute the mean cross-entropy of a model on tokenized held-out rows, in nats per trained token.

    Rows are batched by length to save padding, and each rank computes its share of the batches. The mean is over tokens
    and does not depend on the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def measure_batch(row_indices: list[int]) -> BatchLoss:
        batch = [rows[i] for i in row_indices]
        tokens = pad_rows([row.input_ids for row in batch], pad_id).to(device)
        mask = pad_rows([[1] * len(row.input_ids) for row in batch], 0).bool().to(device)
        picked = (pad_rows([row.labels for row in batch], IGNORE_INDEX) != IGNORE_INDEX).to(device)
        picked[:, 0] = False  # the first token has no context
        logprobs, _, _ = compute_picked_logprobs(model, tokens, mask, picked)
        counts = picked.sum(1).tolist()
        row_nats = [-row_logprobs.sum().item() for row_logprobs in logprobs.split(counts)]
        return BatchLoss(-logprobs.sum().item(), row_nats, counts)

    share = [measure_batch(row_indices) for row_indices in ranks.select_own_share(batches)]
    if is_sharded(model) and len(share) * ranks.world_size() < len(batches):
        measure_batch(batches[-1])  # result unused: with sharding, all ranks have to run the same number of passes
    results = ranks.gather_shares(share, len(batches))
    model.train(was_training)
    total = 0.0
    by_row = [0.0] * len(rows)
    sizes = [0] * len(rows)
    for row_indices, (nats, row_nats_of_batch, counts) in zip(batches, results, strict=True):
        total += nats
        for i, nats_of_row, count in zip(row_indices, row_nats_of_batch, counts, strict=True):
            by_row[i] = nats_of_row
            sizes[i] = count
    return HeldOutLoss(total / sum(sizes), sum(sizes), by_row, sizes)


# The implicit reward, log π / π_ref


@torch.no_grad()
def compute_answer_logprobs(
    model: Any, rows: Sequence[TokenRow], pad_id: int, average_over_tokens: bool = False
) -> Tensor:
    """Compute the log-probability of each answer given its prompt, under the active adapter; shape [N], on the CPU. It
    is divided by the answer's number of tokens if `average_over_tokens`."""
    if not rows:
        return torch.zeros(0, device="cpu")
    device = next(model.parameters()).device
    rollout = rollout_from_answers([ids[:n] for ids, n in rows], [ids[n:] for ids, n in rows], pad_id, device)
    logprobs = compute_in_chunks(
        lambda part: compute_response_logprobs(model, part, 1.0)[0].sum(-1), rollout, CHUNK_SIZE
    ).cpu()
    return logprobs / torch.tensor([len(ids) - n for ids, n in rows], device="cpu") if average_over_tokens else logprobs


def compute_pair_logprobs(
    model: Any, pairs: Sequence[TokenizedPair], pad_id: int, average_over_tokens: bool = False
) -> Tensor:
    """Compute the log-probabilities of the chosen and the rejected answer of each pair, shape [M, 2]. See
    `compute_answer_logprobs`."""
    chosen_rows = [(pair.chosen_ids, pair.chosen_start) for pair in pairs]
    rejected_rows = [(pair.rejected_ids, pair.rejected_start) for pair in pairs]
    return torch.stack(
        [compute_answer_logprobs(model, rows, pad_id, average_over_tokens) for rows in (chosen_rows, rejected_rows)], -1
    )


def require_finite(values: Tensor, what: str, steps: int, lr: float, dtype: str) -> None:
    """Raise InputError if a log-probability or score of held-out rows is NaN or infinite.

    Args:
        values: one row for each answer or pair.
        what: the measured property, such as `pairs have logprobs`.
        steps: number of training steps so far.
    """
    if count := int((~values.isfinite()).flatten(1).any(1).sum()):
        problem = f"{count} of {len(values)} held-out {what} that are not finite after step {steps}"
        raise build_divergence_error(f"{problem}: nothing is published", lr, dtype)


# Pairs and labels


def compute_preference_figures(prefs: Sequence[Preference], gap_M: Tensor) -> dict[str, dict[str, Any]]:
    """Compute a model's accuracy on preference pairs: the share with a positive gap between chosen and rejected reward,
    with its interval over prompts.

    If one scorer made all labels with noise, return also `accuracy_noiseless`, the accuracy against the scorer's order
    without noise, and `ceiling`, the share of labels that agree with that order.
    """
    groups = [pref.group_id or pref.id for pref in prefs]

    def interval(values: Tensor) -> dict[str, Any]:
        return proportion_interval(average_by_group(groups, values.double().tolist())[0]).as_dict()

    figures = {"accuracy": interval(gap_M > 0)}
    scorers = {pref.scorer for pref in prefs}
    if len(scorers) == 1 and scorers <= BY_NAME.keys():
        gold = BY_NAME[scorers.pop()]()
        better, worse = (
            gold.score([Conversation((*pref.prompt, *getattr(pref, side)), tools=pref.tools) for pref in prefs])
            for side in SIDES
        )
        is_right = better > worse  # ties never become pairs
        figures["accuracy_noiseless"] = interval((gap_M > 0) == is_right)
        figures["ceiling"] = interval(is_right)
    return figures


def find_simulated_scorers(prefs: Sequence[Preference]) -> dict[str, list[str]]:
    """Return `{simulated_by: names}`, the scorers that replaced people as annotators of these pairs. Returns an empty
    dict if people annotated all pairs."""
    scorers = sorted({pref.scorer for pref in prefs if pref.scorer})
    return {"simulated_by": scorers} if scorers else {}


def write_held_out_pairs(
    path: Path,
    prefs: Sequence[Preference],
    margins_M: Tensor,
    scores_M2: Tensor | None = None,
    log_odds: float | None = 1.0,
) -> None:
    """Write `held_out.jsonl`: every held-out pair with the model's margin, one JSON object per line.

    Args:
        margins_M: the model's margin of the chosen over the rejected answer of each pair.
        scores_M2: of the chosen and the rejected answer, if each has a score of its own.
        log_odds: log odds in nats that the chosen answer wins, for a margin of 1. None if the margin is not related to
            odds.
    """
    lines = []
    for i, (pref, margin) in enumerate(zip(prefs, margins_M.tolist(), strict=True)):
        row = {"id": pref.id, "group": pref.group_id or pref.id, "margin": margin}
        row |= {"prompt": [message.as_dict() for message in pref.prompt]}
        row |= {side: join_turns(getattr(pref, side)) for side in SIDES}
        if scores_M2 is not None:
            row |= {f"score_{side}": score for side, score in zip(SIDES, scores_M2[i].tolist(), strict=True)}
        if log_odds is not None:
            row["log_odds"] = log_odds * margin
        lines.append(format_row(row))
    write_text(path, "".join(lines))


def compute_label_figures(answers: Sequence[Feedback], rewards_N: Tensor) -> dict[str, Any]:
    """Return `{auc: interval}`, the probability that a desirable answer has a higher reward than an undesirable one,
    with its interval over prompts. Returns an empty dict if all answers have one label."""
    labels = [answer.label for answer in answers]
    if len(set(labels)) < 2:
        return {}
    prompts = [compute_question_key(Conversation(answer.prompt)) for answer in answers]
    return {"auc": auc(rewards_N.tolist(), labels, prompts).as_dict()}


def write_held_out_answers(path: Path, answers: Sequence[Feedback], rewards_N: Tensor) -> None:
    """Write `held_out.jsonl`: every held-out answer with its label and its reward, one JSON object per line."""
    lines = []
    for answer, reward in zip(answers, rewards_N.tolist(), strict=True):
        prompt = [message.as_dict() for message in answer.prompt]
        row = {"id": answer.id, "prompt": prompt, "answer": join_turns(answer.completion)}
        lines.append(format_row({**row, "label": answer.label, "reward": reward}))
    write_text(path, "".join(lines))
