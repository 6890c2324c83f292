"""Scores of training rows by a model's loss or by a reward, by which `stage=data` filters rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from align.core.types import Conversation, Preference, Record
from align.data.chat.encode import EncodedRow, encode_conversation, encode_text
from align.data.chat.reasoning import strip_all_reasoning
from align.data.chat.template import set_chat_template
from align.data.read.content import join_answer, join_trained_answer
from align.data.sets.score_cuts import ScoreRecords
from align.evals.held_out import compute_held_out_loss
from align.models.load import get_context_length, load_base, load_tokenizer, read_configurations
from align.reward.build import build_scorer, load_reward_model
from align.reward.combined import standardise_members
from align.reward.scorer import Scorer
from align.run import Artifact, Base


def load_loss_scorer(
    base: Base,
    template: Any,
    template_kwargs: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    batch_size: int,
) -> ScoreRecords:
    """Load a base model, and return a function that computes its loss on each training row, in nats per token."""
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, template, template_kwargs)
    model = load_base(base, "lora", device, dtype)  # its weights as they are
    length = min(max_length, get_context_length(read_configurations(base)))
    return partial(compute_losses, model, tokenizer, max_length=length, batch_size=batch_size)


def load_reward_scorer(
    reward: Mapping[str, Any],
    models: Sequence[Artifact],
    calibration_records: Sequence[Record],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> ScoreRecords:
    """Load the models and functions of a reward, and return a function that scores the last answer of each training
    row.

    Args:
        reward: see `align.config.scorers.build_reward_spec`.
        models: the artifacts of its reward models.
        calibration_records: records whose answers fix the scale of the learned members of an ensemble or a sum.
    """
    loaded = [load_reward_model(model, device, dtype, batch_size) for model in models]
    hides_reasoning = any(
        model.manifest and model.manifest.config["data"].get("reasoning") == "hide" for model in models
    )

    def fits(conversation: Conversation) -> bool:
        return all(model.fits(conversation) for model in loaded)

    scorer = standardise_on_answers(build_scorer(reward, iter(loaded)), calibration_records, fits, hides_reasoning)
    return partial(compute_rewards, scorer, fits=fits, hides_reasoning=hides_reasoning)


def compute_losses(
    model: Any, tokenizer: Any, records: Sequence[Record], max_length: int, batch_size: int
) -> np.ndarray:
    """Compute a model's mean loss per trained token on each record, in nats; float64 of shape [N].

    Trained tokens are those of the trained answers of a conversation, all of a plain text, and the chosen answer of a
    pair. The loss is nan for a record without a trained token, and infinite if it is not finite.

    Args:
        max_length: maximum tokens of a row. Conversations are cut there, and texts are split.

    Raises:
        InputError: the chat template refuses a conversation.
    """
    rows: list[EncodedRow] = []
    places: list[int] = []
    for place, record in enumerate(records):
        trained_rows = [row for row in encode_record(tokenizer, record, max_length) if row.trained]
        rows += trained_rows
        places += [place] * len(trained_rows)
    if not rows:
        return np.full(len(records), np.nan)
    loss = compute_held_out_loss(model, rows, tokenizer.pad_token_id, batch_size)
    nats = np.bincount(places, loss.by_row, minlength=len(records))
    sizes = np.bincount(places, loss.sizes, minlength=len(records))
    return np.where(sizes > 0, replace_non_finite_by_infinity(nats / np.maximum(sizes, 1)), np.nan)


def replace_non_finite_by_infinity(values: np.ndarray) -> np.ndarray:
    """Return a copy with NaN and −inf replaced by +inf, because NaN marks a record without a score."""
    return np.where(np.isfinite(values), values, np.inf)


def encode_record(tokenizer: Any, record: Record, max_length: int) -> list[EncodedRow]:
    """Tokenize a conversation, plain text or the chosen answer of a pair as supervised training would, into rows of at
    most `max_length` tokens with labels. Conversations are cut there, and texts are split. Returns an empty list for a
    conversation without a trained answer."""
    if isinstance(record, str):
        return encode_text(tokenizer, record, max_length)
    if isinstance(record, Preference):
        record = join_trained_answer(record, record.chosen)
    assert isinstance(record, Conversation), "feedback has no answer to imitate"
    if all(turn.role != "assistant" or not turn.trained for turn in record.messages):
        return []
    row = encode_conversation(tokenizer, record)
    return [EncodedRow(row.input_ids[:max_length], row.labels[:max_length])]


def compute_rewards(
    scorer: Scorer, records: Sequence[Record], fits: Callable[[Conversation], bool], hides_reasoning: bool = False
) -> np.ndarray:
    """Compute the reward of each record's last answer, float64 of shape [N]. NaN marks a record without a score.

    The score of a pair is the chosen answer's less the rejected one's. The score is nan for a record that has no answer
    after a question or does not fit the scorer, and infinite if it is not finite.

    Args:
        fits: returns whether the scorer can read a conversation.
        hides_reasoning: whether the scorer reads answers without their reasoning.
    """
    conversations: list[Conversation] = []
    places: list[int] = []
    signs: list[float] = []
    for place, record in enumerate(records):
        sides = [trim_to_last_answer(side, hides_reasoning) for side in list_answers(record)]
        fitting = [side for side in sides if side is not None and fits(side)]
        if fitting and len(fitting) == len(sides):
            conversations += fitting
            places += [place] * len(fitting)
            signs += [1.0, -1.0][: len(fitting)]
    if not conversations:
        return np.full(len(records), np.nan)
    scores = replace_non_finite_by_infinity(scorer.score(conversations).double().numpy()) * signs
    counts = np.bincount(places, minlength=len(records))
    return np.where(counts > 0, np.bincount(places, scores, minlength=len(records)), np.nan)


def list_answers(record: Record) -> list[Conversation]:
    """Return the conversations of a record that a reward scores: a pair's chosen and rejected one, or the conversation
    itself. Returns an empty list for other records, such as plain text."""
    if isinstance(record, Preference):
        return [join_answer(record, side) for side in (record.chosen, record.rejected)]
    return [record] if isinstance(record, Conversation) else []


def trim_to_last_answer(conversation: Conversation, hides_reasoning: bool) -> Conversation | None:
    """Return a conversation up to its last assistant turn, without reasoning if `hides_reasoning`. Returns None if it
    has no such turn after another turn."""
    turns = conversation.messages
    end = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role == "assistant"), 0)
    if end < 2:
        return None
    cut = conversation.turns(end)
    return replace(cut, messages=strip_all_reasoning(cut.messages)) if hides_reasoning else cut


def standardise_on_answers(
    scorer: Scorer, records: Sequence[Record], fits: Callable[[Conversation], bool], hides_reasoning: bool = False
) -> Scorer:
    """Return the scorer with the reward models of its ensembles and sums standardised by their scores of the records'
    answers. Without a fitting answer, the scorer itself is returned.

    See `align.reward.combined.standardise_members`.
    """
    sides = (trim_to_last_answer(side, hides_reasoning) for record in records for side in list_answers(record))
    conversations = [side for side in sides if side is not None and fits(side)]
    return standardise_members(scorer, conversations) if conversations else scorer
