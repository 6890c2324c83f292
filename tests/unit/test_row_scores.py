"""Scores of rows: cuts that drop rows, score files, and the losses and rewards that are computed of a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.core.types import Conversation, Message, Preference, Record
from align.data.chat.encode import IGNORE_INDEX, encode_conversation
from align.data.chat.template import set_chat_template
from align.data.read.content import DOCUMENTS
from align.data.sets.record_columns import records_to_columns
from align.data.sets.score_cuts import (
    BINS,
    PIECE,
    count_scored,
    get_score_path,
    iter_score_examples,
    mask_outside_cuts,
    score_spool,
    summarize_scores,
)
from align.data.sets.spool import Spool, SpoolRows
from align.evals.row_scores import compute_losses, compute_rewards, standardise_on_answers
from align.models.load import load_tokenizer
from align.reward.combined import Ensemble
from align.reward.rules import Rules

NAN = float("nan")


def list_dropped(scores: Sequence[float], *more: Any, ids: Sequence[int] = (), source: Sequence[int] = ()) -> list[int]:
    count = len(scores)
    numbers = np.array(ids or range(count), np.uint64), np.array(source or [0] * count)
    return np.flatnonzero(mask_outside_cuts(np.array(scores), *numbers, *more)).tolist()


def test_quantiles_by_hand() -> None:
    scores = [5.0, 1.0, NAN, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0, 10.0]  # ten scores, and a row without one
    assert list_dropped(scores, [0.1, 0.8], "all") == [1, 6, 10]
    assert list_dropped(scores, [0.0, 1.0], "all") == []
    assert list_dropped(scores, [0.0, 1.0], "all", 3.0, 8.0) == [1, 4, 6, 10]
    assert list_dropped(scores, [0.2, 1.0], "all", None, 8.5) == [1, 4, 6, 10]
    assert list_dropped([NAN, NAN], [0.4, 0.5], "all") == []


def test_quantiles_of_each_source_and_of_all() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 11.0, 12.0, 13.0, 14.0]
    source = [0, 1, 0, 0, 1, 1, 0, 1]
    assert list_dropped(scores, [0.0, 0.75], "source", source=source) == [6, 7]
    assert list_dropped(scores, [0.0, 0.5], "all", source=source) == [4, 5, 6, 7]
    assert list_dropped(scores, [0.25, 1.0], "source", source=source) == [0, 1]


def test_rows_of_one_score_go_by_their_ids() -> None:
    assert list_dropped([1.0, 1.0, 1.0, 1.0], [0.0, 0.5], "all", ids=[30, 10, 40, 20]) == [0, 2]
    assert list_dropped([1.0, 1.0, 1.0, 1.0], [0.0, 0.5], "all", ids=[7, 7, 7, 7]) == [2, 3]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted),
    st.randoms(use_true_random=False),
)
def test_the_rows_that_stay_do_not_go_by_the_order_of_the_rows(values: list[int], keep: list[float], draw: Any) -> None:
    scores = np.array(values, float)
    ids = np.arange(len(values), dtype=np.uint64)
    source = np.zeros(len(values), int)
    out = mask_outside_cuts(scores, ids, source, keep, "all")
    assert (~out).sum() == round(keep[1] * len(values)) - round(keep[0] * len(values))
    order = np.array(draw.sample(range(len(values)), len(values)))
    assert (mask_outside_cuts(scores[order], ids[order], source, keep, "all") == out[order]).all()


def write_spool(folder: Path, records: Sequence[Record]) -> SpoolRows:
    about = {
        "source": pa.array([0] * len(records), pa.int16()),
        "row": pa.array(range(1, len(records) + 1), pa.int64()),
    }
    batch = pa.RecordBatch.from_pydict({**records_to_columns(DOCUMENTS, records), **about})
    pieces = [batch.slice(start, 300) for start in range(0, len(records), 300)]
    Spool(folder).write("000-000000", iter(pieces), [batch.schema], {})
    return SpoolRows(Spool(folder), DOCUMENTS, ["s"])


@pytest.mark.parametrize("kept", [0, 5, 8 * PIECE, 8 * PIECE + 13, 8 * (2 * PIECE + 7)])
def test_it_goes_on_behind_the_last_whole_piece(tmp_path: Path, kept: int) -> None:
    """The score file is truncated to `kept` bytes before scoring continues."""
    rows = write_spool(tmp_path, [f"text {i}" for i in range(2 * PIECE + 7)])
    batch_sizes = list[int]()

    def score(records: Sequence[Any]) -> np.ndarray:
        batch_sizes.append(len(records))
        return np.array([float(record.split()[1]) for record in records])

    scores = score_spool(rows, score)
    assert scores.tolist() == list(range(2 * PIECE + 7))
    assert batch_sizes == [PIECE, PIECE, 7]
    path = get_score_path(rows)
    path.write_bytes(path.read_bytes()[:kept])
    batch_sizes.clear()
    scored_rows = count_scored(rows)
    counts = list[int]()
    assert score_spool(rows, score, counts.append).tolist() == scores.tolist()
    assert scored_rows == {0: 0, 5: 0, 8 * PIECE: PIECE, 8 * PIECE + 13: PIECE}.get(kept, 2 * PIECE + 7)
    assert sum(batch_sizes) == 2 * PIECE + 7 - scored_rows
    assert counts[-1:] == ([2 * PIECE + 7] if batch_sizes else [])


def test_the_account_of_scores() -> None:
    scores = np.array([*range(1000), NAN, 1e9, 5.0])
    source = np.array([0] * 1001 + [0, 1])
    out = np.zeros(1003, bool)
    out[:100] = out[1001] = True
    summary = summarize_scores(scores, out, source, ["a", "b", "empty"])
    source_summary = summary["sources"]["a"]
    assert (
        source_summary["rows"],
        source_summary["unscored"],
        source_summary["dropped"],
        source_summary["kept_from"],
        source_summary["kept_to"],
    ) == (
        1001,
        1,
        101,
        100.0,
        999.0,
    )
    assert len(summary["edges"]) == BINS + 1
    assert summary["edges"][-1] < 1000  # one row that is far off does not squeeze the others into a bin
    assert (sum(source_summary["kept"]), sum(source_summary["left_out"])) == (900, 101)
    assert source_summary["left_out"][-1] == 1
    assert summary["sources"]["empty"] == {"rows": 0, "unscored": 0}
    assert summary["sources"]["b"]["quantiles"] == [5.0] * 5


def test_rows_that_show_what_scores_mean() -> None:
    scores = np.array([9.0, NAN, *range(9), 10.0, 11.0])  # a row without a score is no example

    def collect_examples(low: float, high: float, each: int) -> dict[str, list[float]]:
        out = (scores < low) | (scores > high)
        return {kind: scores[places].tolist() for kind, places in iter_score_examples(scores, out, each)}

    assert collect_examples(3, 7, 2) == {
        "lowest": [0, 1],
        "dropped below the cut": [2],
        "kept above the cut": [3, 4],
        "kept below the cut": [6, 7],
        "dropped above the cut": [8, 9],
        "highest": [10, 11],
    }
    assert collect_examples(1, 10, 2) == {
        "lowest": [0, 1],
        "dropped below the cut": [],
        "kept above the cut": [1, 2],
        "kept below the cut": [9, 10],
        "dropped above the cut": [],
        "highest": [10, 11],
    }
    assert list(collect_examples(0, 11, 2)) == ["lowest", "highest"]


def build_turns(*turns: str, last: str = "") -> Conversation:
    messages = [Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return Conversation((*messages, *([Message("user", last)] if last else [])))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from align.models.base import find_base

    tokenizer = load_tokenizer(find_base(str(tiny_model)))
    set_chat_template(tokenizer, None)
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), tokenizer


@torch.no_grad()
def compute_loss_by_hand(model: Any, ids: list[int], labels: list[int]) -> tuple[float, int]:
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    trained_positions = [i for i in range(1, len(ids)) if labels[i] != IGNORE_INDEX]
    return -sum(float(logprobs[i - 1, ids[i]]) for i in trained_positions), len(trained_positions)


def test_the_loss_of_a_row_is_that_of_what_is_trained_on(model: tuple[Any, Any]) -> None:
    network, tokenizer = model
    chat = build_turns("Is it open?", "Yes, until six.", "And on Sunday?", "No.")
    muted = Conversation((*chat.messages[:3], Message("assistant", "No.", trained=False)))
    records = [
        chat,
        muted,
        build_turns("Alone?"),
        "a plain text of some words that is cut",
        build_turns("Is it open?", "Yes"),
    ]
    losses = compute_losses(network, tokenizer, records, 200, 3)
    for place in (0, 1, 4):
        row = encode_conversation(tokenizer, records[place])  # type: ignore[arg-type]
        nats, count = compute_loss_by_hand(network, row.input_ids, row.labels)
        assert losses[place] == pytest.approx(nats / count, rel=1e-4)
    assert np.isnan(losses[2])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    pair = Preference(chat.messages[:1], (Message("assistant", "Yes"),), (Message("assistant", "Maybe"),))
    assert compute_losses(network, tokenizer, [pair], 200, 3)[0] == pytest.approx(losses[4], rel=1e-5)
    earlier = Message("assistant", "Yes, until six.", trained=False)  # an answer in the prompt is read, not trained on
    last_answer_only = Conversation((chat.messages[0], earlier, *chat.messages[2:]))
    pair = Preference(chat.messages[:3], chat.messages[3:], (Message("assistant", "Maybe"),))
    pair_loss, answer_loss = compute_losses(network, tokenizer, [pair, last_answer_only], 200, 3)
    assert pair_loss == pytest.approx(answer_loss, rel=1e-5)
    assert pair_loss != pytest.approx(losses[0], rel=1e-3)


def test_a_long_text_is_read_in_pieces_and_a_conversation_is_cut(model: tuple[Any, Any]) -> None:
    network, tokenizer = model
    text = " ".join(f"word{i}" for i in range(60))
    ids = [
        *([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []),
        *tokenizer(text, add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    pieces = [ids[i : i + 50] for i in range(0, len(ids), 50)]
    sums = [compute_loss_by_hand(network, piece, piece) for piece in pieces if len(piece) > 1]
    [loss] = compute_losses(network, tokenizer, [text], 50, 2)
    assert len(pieces) > 2
    assert loss == pytest.approx(sum(nats for nats, _ in sums) / sum(count for _, count in sums), rel=1e-4)
    far = build_turns("Why? " * 100, "Because.")  # the answer begins behind the cut
    near = build_turns("Why?", "Because. " * 100)
    losses = compute_losses(network, tokenizer, [far, near], 50, 2)
    row = encode_conversation(tokenizer, near)
    nats, count = compute_loss_by_hand(network, row.input_ids[:50], row.labels[:50])
    assert np.isnan(losses[0])
    assert losses[1] == pytest.approx(nats / count, rel=1e-4)


def test_a_reward_reads_the_last_answer_and_of_a_pair_the_difference() -> None:
    scorer = Rules([(1.0, lambda text: float(len(text)))])
    pair = Preference((Message("user", "a"),), (Message("assistant", "four"),), (Message("assistant", "ten letters"),))
    reasoned = build_turns("a", "<think>long thoughts</think>so")
    records = [
        "plain text",
        build_turns("a", "bb"),
        build_turns("a", "bb", last="and?"),
        build_turns("a"),
        pair,
        build_turns("a", "b", "c", "ddd"),
    ]
    rewards = compute_rewards(scorer, records, lambda conversation: True)
    assert [None if np.isnan(reward) else float(reward) for reward in rewards] == [None, 2.0, 2.0, None, -7.0, 3.0]
    assert compute_rewards(scorer, [reasoned], lambda conversation: True, hides_reasoning=True).tolist() == [2.0]
    rewards_of_short = compute_rewards(
        scorer, records, lambda conversation: len(conversation.messages[-1].content) < 11
    )
    assert [bool(np.isnan(reward)) for reward in rewards_of_short] == [True, False, False, True, True, False]


def test_members_of_an_ensemble_are_on_one_scale_by_the_first_rows() -> None:
    class Learned(Rules):
        name = "learned"

    ensemble = Ensemble((Learned([(1.0, lambda t: float(len(t)))]), Learned([(1000.0, lambda t: float(-len(t)))])))
    rows: list[Record] = [build_turns("a", "b" * i) for i in range(1, 9)]
    scaled = standardise_on_answers(ensemble, rows, lambda conversation: True)
    assert np.abs(compute_rewards(scaled, rows, lambda conversation: True)).max() < 1e-5
    assert np.abs(compute_rewards(ensemble, rows, lambda conversation: True)).max() > 100
