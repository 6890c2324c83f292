"""Scores of rows by the loss of a model or by a reward: one number each, by which `stage=data` keeps some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from align.core.types import Conversation, Preference, Record
from align.data.chat.encode import Encoded, encode_conversation, encode_text
from align.data.chat.reasoning import without_reasoning
from align.data.chat.template import use_template
from align.data.read.content import join_answer, join_trained_answer
from align.data.sets.score_cuts import Score
from align.evals.held_out import held_out_loss
from align.models.load import context_length, describe, load_base, load_tokenizer
from align.reward.build import build_scorer, load_reward_model
from align.reward.combined import standardise_members
from align.reward.scorer import Scorer
from align.run import Artifact, Base


def load_loss(
    base: Base,
    template: Any,
    template_kwargs: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    batch_size: int,
) -> Score:
    """Load a base, and return the function that scores records by its loss."""
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, template, template_kwargs)
    model = load_base(base, "lora", device, dtype)  # its weights as they are
    length = min(max_length, context_length(describe(base)))
    return partial(losses, model, tokenizer, max_length=length, batch_size=batch_size)


def load_reward(
    reward: Mapping[str, Any],
    models: Sequence[Artifact],
    first: Sequence[Record],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> Score:
    """Load a reward, and return the function that scores records by it.

    Args:
        reward: see `align.config.scorers.build_reward_spec`.
        models: its reward models.
        first: the records whose answers bring the learned members of an ensemble or a sum to one scale.
    """
    loaded = [load_reward_model(model, device, dtype, batch_size) for model in models]
    hides = any(model.manifest and model.manifest.config["data"].get("reasoning") == "hide" for model in models)

    def fits(conversation: Conversation) -> bool:
        return all(model.fits(conversation) for model in loaded)

    scorer = on_one_scale(build_scorer(reward, iter(loaded)), first, fits, hides)
    return partial(rewards, scorer, fits=fits, hides_reasoning=hides)


def losses(model: Any, tokenizer: Any, records: Sequence[Record], max_length: int, batch_size: int) -> np.ndarray:
    """The loss of a model on each record, in nats a token of what is trained on: the answers that are trained on, a
    plain text whole, the chosen answer of a pair. Float64 (N); nan where there is no such token, and infinite where the
    loss is no number.

    Args:
        max_length: tokens of a row; conversations are cut there, texts are read in pieces.

    Raises:
        InputError: the chat template refuses a conversation.
    """
    rows, places = list[Encoded](), list[int]()
    for place, record in enumerate(records):
        found = [row for row in encoded(tokenizer, record, max_length) if row.trained]
        rows += found
        places += [place] * len(found)
    if not rows:
        return np.full(len(records), np.nan)
    loss = held_out_loss(model, rows, tokenizer.pad_token_id, batch_size)
    nats, sizes = (np.bincount(places, of, minlength=len(records)) for of in (loss.by_row, loss.sizes))
    return np.where(sizes > 0, finite(nats / np.maximum(sizes, 1)), np.nan)


def finite(given: np.ndarray) -> np.ndarray:
    """Numbers, infinite where they are none: nan says that nothing was to be scored."""
    return np.where(np.isfinite(given), given, np.inf)


def encoded(tokenizer: Any, record: Record, max_length: int) -> list[Encoded]:
    """The rows of tokens by which supervised training would teach a record."""
    if isinstance(record, str):
        return encode_text(tokenizer, record, max_length)
    if isinstance(record, Preference):
        record = join_trained_answer(record, record.chosen)
    assert isinstance(record, Conversation), "feedback has no answer to imitate"
    if all(turn.role != "assistant" or not turn.trained for turn in record.messages):
        return []
    row = encode_conversation(tokenizer, record)
    return [Encoded(row.input_ids[:max_length], row.labels[:max_length])]


def rewards(
    scorer: Scorer, records: Sequence[Record], fits: Callable[[Conversation], bool], hides_reasoning: bool = False
) -> np.ndarray:
    """A scorer's score of each record's last answer, of a pair the chosen answer's less the rejected one's. Float64
    (N); nan where there is no answer behind a question, and where it does not fit; infinite where the score is no
    number.

    Args:
        fits: whether the scorer can read a conversation.
        hides_reasoning: the scorer reads answers without their reasoning.
    """
    told, places, signs = list[Conversation](), list[int](), list[float]()
    for place, record in enumerate(records):
        sides = [up_to_answer(side, hides_reasoning) for side in answers_of(record)]
        whole = [side for side in sides if side is not None and fits(side)]
        if whole and len(whole) == len(sides):
            told += whole
            places += [place] * len(whole)
            signs += [1.0, -1.0][: len(whole)]
    if not told:
        return np.full(len(records), np.nan)
    given = finite(scorer.score(told).double().numpy()) * signs
    counts = np.bincount(places, minlength=len(records))
    return np.where(counts > 0, np.bincount(places, given, minlength=len(records)), np.nan)


def answers_of(record: Record) -> list[Conversation]:
    """The conversations of a record whose last answers are judged; none of plain text."""
    if isinstance(record, Preference):
        return [join_answer(record, side) for side in (record.chosen, record.rejected)]
    return [record] if isinstance(record, Conversation) else []


def up_to_answer(conversation: Conversation, hides_reasoning: bool) -> Conversation | None:
    """A conversation up to its last answer; None where no question stands before one."""
    turns = conversation.messages
    end = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role == "assistant"), 0)
    if end < 2:
        return None
    found = conversation.turns(end)
    return replace(found, messages=without_reasoning(found.messages)) if hides_reasoning else found


def on_one_scale(
    scorer: Scorer, records: Sequence[Record], fits: Callable[[Conversation], bool], hides_reasoning: bool = False
) -> Scorer:
    """The scorer with the learned members of ensembles and sums brought to one scale on the answers of these records,
    see `align.reward.combined.standardise_members`."""
    sides = (up_to_answer(side, hides_reasoning) for record in records for side in answers_of(record))
    told = [side for side in sides if side is not None and fits(side)]
    return standardise_members(scorer, told) if told else scorer
