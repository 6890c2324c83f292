"""KTO: loss and gradients against the paper's formula, answers of the KL estimate, input files, and training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dpo import PAIRS
from test_preference_losses import SOFT_PAIRS, answer, fresh, gradients, perturb_adapter
from test_trainers import arguments
from torch import Tensor

from align.__main__ import main
from align.annotate.store.vote_selection import DEFAULT_SELECTION
from align.core.errors import InputError
from align.core.types import Feedback, Message, Preference
from align.data.pairs import (
    TokenizedAnswer,
    TokenizedPair,
    VoteSource,
    check_labels_vary,
    choose_mismatched_answers,
    encode_answers,
    has_labels,
    iter_labelled_answers,
    read_divided_judgements,
)
from align.data.sources import DataSource
from align.data.training_overlap import read_trained_rows
from align.evals.held_out import compute_answer_logprobs, compute_label_figures
from align.ops.auc import auc
from align.ops.losses import compute_kto_reference, kto_loss
from align.run import read_manifest
from align.track import read_rows
from align.trainers.kto import build_kto_trainer, collate_answers

pytestmark = pytest.mark.usefixtures("blank_plots")

ROWS = [*iter_labelled_answers(PAIRS)]
WEIGHTED_ROWS = [*iter_labelled_answers(SOFT_PAIRS)]
BETA = 0.7
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
LONGEST = 100
NO_VOTES = VoteSource("", "p", DEFAULT_SELECTION)


def compute_loss_by_hand(
    model: Any, start: Any, rows: list[TokenizedAnswer], mismatched_answers: list[list[int]]
) -> Tensor:
    """Compute KTO's loss of a batch (Ethayarajh et al., 2024, eq. 8 without its constant), written out."""

    def compute_log_ratio(ids: list[int], first: int) -> Tensor:
        now = answer(model, ids, first).sum()
        with torch.no_grad():
            return now - answer(start, ids, first).sum()

    with torch.no_grad():
        mixed = [row.ids[: row.start] + mismatched for row, mismatched in zip(rows, mismatched_answers, strict=True)]
        z = max(
            0.0, sum(float(compute_log_ratio(ids, r.start)) for ids, r in zip(mixed, rows, strict=True)) / len(rows)
        )
    total = torch.zeros(())
    for row in rows:
        now = answer(model, row.ids, row.start).sum()
        reward = now - answer(start, row.ids, row.start).sum().detach()
        value = 1 / (1 + (-BETA * (reward - z) * (1 if row.wanted else -1)).exp())
        total = total + row.weight * (1.3 if row.wanted else 0.8) * (1 - value)
    return total / len(rows)


@pytest.mark.parametrize(("seed", "rows_to_train"), [(5, ROWS), (8, ROWS), (5, WEIGHTED_ROWS)])
def test_the_loss_and_every_gradient_are_those_of_the_paper(
    seed: int, rows_to_train: list[TokenizedAnswer], tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
):
    model, peer_model, start = (fresh(tiny_model) for _ in range(3))
    trainer: Any = build_kto_trainer(
        model, tiny_tokenizer, rows_to_train, arguments(tmp_path, 1), beta=BETA, max_length=LONGEST, **WEIGHTS
    )
    places = [0, 3, 5, 6]
    rows = [rows_to_train[place] for place in places]
    perturb_adapter(model, seed)
    perturb_adapter(peer_model, seed)
    batch = collate_answers([{"place": place} for place in places], rows_to_train, tiny_tokenizer.pad_token_id, LONGEST)
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    mismatched_answers = [rows[i - 1].ids[rows[i - 1].start :] for i in range(4)]
    expected_loss = compute_loss_by_hand(peer_model, start, rows, mismatched_answers)
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    actual_gradients = gradients(model)
    expected_gradients = gradients(peer_model)
    assert actual_gradients.keys() == expected_gradients.keys()
    assert max(float(g.abs().max()) for g in expected_gradients.values()) > 1e-4
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[key], gradient, rtol=1e-3, atol=1e-6)
    # The loss on held-out answers is the same number.
    mixed = [(row.prompt + mismatched, row.start) for row, mismatched in zip(rows, mismatched_answers, strict=True)]
    own_answers = [(row.ids, row.start) for row in rows]
    ratios = [
        compute_answer_logprobs(peer_model.eval(), x, 0) - compute_answer_logprobs(start.eval(), x, 0)
        for x in (own_answers, mixed)
    ]
    labels = torch.tensor([row.wanted for row in rows])
    weights = torch.tensor([row.weight for row in rows])
    held_out_loss = kto_loss(ratios[0], labels, compute_kto_reference(ratios[1]), BETA, *WEIGHTS.values(), weights)
    assert float(held_out_loss) == pytest.approx(expected_loss.item(), rel=1e-5)


def test_soft_labels_become_labels_and_weights():
    """The weighted loss differs from the expected loss under the labels' probabilities by a constant only."""
    pair = TokenizedPair([1, 2, 3], [1, 2, 4], 2, 2)
    for label in (0.9, 0.5, 0.2):
        rows = [*iter_labelled_answers([replace(pair, label=label)])]
        weights = torch.tensor([row.weight for row in rows])
        assert weights.tolist() == pytest.approx([abs(2 * label - 1)] * 2)
        labels = torch.tensor([row.wanted for row in rows])
        probabilities = torch.tensor([label, 1 - label])
        differences = []
        for rewards in (torch.tensor([0.0, 0.0]), torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])):
            weighted = kto_loss(rewards, labels, torch.tensor(0.3), 1.0, 1.0, 1.0, weights)
            expected = sum(
                kto_loss(rewards, torch.tensor([is_wanted] * 2), torch.tensor(0.3), 1.0, 1.0, 1.0, share)
                for is_wanted, share in ((True, probabilities), (False, 1 - probabilities))
            )
            differences.append(float(expected - weighted))
        assert differences == pytest.approx([differences[0]] * 3, abs=1e-6)


def test_the_kl_estimate_is_never_negative_and_moves_the_loss():
    below = torch.tensor([-3.0, -1.0])
    above = torch.tensor([1.0, 3.0])
    assert (float(compute_kto_reference(below)), float(compute_kto_reference(above))) == (0.0, 2.0)
    rewards = torch.tensor([1.0, 1.0])
    labels = torch.tensor([True, False])
    loss = kto_loss(rewards, labels, torch.tensor(2.0), 1.0, 2.0, 1.0)
    assert float(loss) == pytest.approx((2 / (1 + math.exp(-1)) + 1 / (1 + math.exp(1))) / 2)


def test_each_row_gets_the_answer_of_the_one_before_it_that_has_another_prompt():
    def build_row(prompt: int, token: int) -> TokenizedAnswer:
        return TokenizedAnswer([1, prompt, token], 2, True)

    rows = [build_row(10, 50), build_row(11, 51), build_row(11, 52), build_row(12, 53), build_row(10, 54)]
    assert choose_mismatched_answers([0, 1, 3], rows) == [[53], [50], [51]]
    assert choose_mismatched_answers([1, 2, 0], rows) == [[50], [50], [52]]  # 1 and 2 answer one prompt
    assert choose_mismatched_answers([2], rows) == [[50]]  # alone in its batch: the nearest earlier row
    assert choose_mismatched_answers([0, 4], rows) == [[53], [53]]


def test_a_batch_holds_both_pairings_and_cuts_what_grew_too_long():
    rows = [TokenizedAnswer([1, 40, 41, 50], 3, True), TokenizedAnswer([1, 42, 60, 61, 62], 2, False)]
    batch = collate_answers([{"place": 0}, {"place": 1}], rows, 0, 5)
    assert batch["input_ids"].tolist() == [[1, 40, 41, 50, 0], [1, 42, 60, 61, 62]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["KL_input_ids"].tolist() == [[1, 40, 41, 60, 61], [1, 42, 50, 0, 0]]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert batch["KL_attention_mask"].sum(1).tolist() == [5, 3]
    assert batch["label"].tolist() == [True, False]


# Input files.


def build_turn(text: str, role: str = "assistant") -> tuple[Message, ...]:
    return (Message(role, text),)


def build_feedback(prompt: str, text: str, label: bool) -> Feedback:
    return Feedback(build_turn(prompt, "user"), build_turn(text), label)


def write_source(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource("jsonl", str(path))


def build_labelled_rows(n: int, wanted: Any = lambda i, good: good) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "completion": "Yes, gladly." if good else "No.", "label": wanted(i, good)}
        for i in range(n)
        for good in (True, False)
    ]


def test_a_file_is_read_by_its_first_row(tmp_path: Path):
    labelled = write_source(tmp_path / "a.jsonl", build_labelled_rows(6))
    pairs = write_source(
        tmp_path / "b.jsonl", [{"prompt": f"Q{i}", "chosen": "Yes.", "rejected": "No."} for i in range(6)]
    )
    assert (has_labels(labelled), has_labels(pairs), has_labels(DataSource("annotations"))) == (True, False, False)
    for source, kind in ((labelled, Feedback), (pairs, Preference)):
        train_side, test_side = read_divided_judgements(source, NO_VOTES, 0.34, 0)
        assert {type(judgement) for judgement in (*train_side, *test_side)} == {kind}
        prompts = [{judgement.prompt for judgement in side} for side in (train_side, test_side)]
        assert len(prompts[1]) == 2
        assert not prompts[0] & prompts[1]


def test_a_file_of_its_own_is_measured_on(tmp_path: Path):
    write_source(tmp_path / "eval.jsonl", build_labelled_rows(2))
    source = write_source(tmp_path / "train.jsonl", build_labelled_rows(6))
    source = DataSource("jsonl", source.path, eval_path=str(tmp_path / "eval.jsonl"))
    train_side, test_side = read_divided_judgements(source, NO_VOTES, 0.1, 0)
    assert (len(train_side), len(test_side)) == (8, 4)  # its prompts are not trained on


def test_a_row_without_a_label_is_named(tmp_path: Path):
    source = write_source(tmp_path / "a.jsonl", [*build_labelled_rows(3), {"prompt": "Q?", "completion": "Yes."}])
    with pytest.raises(InputError, match="row 7, label"):
        read_divided_judgements(source, NO_VOTES, 0.1, 0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "Q?", "completion": "Yes.", "label": 2}, "row 1, label=2: is no label"),
        ({"prompt": "Q?", "completion": "Yes.", "label": "maybe"}, "row 1, label=maybe: is no label"),
        ({"prompt": "Q?", "completion": "Yes."}, r"row 1, label=\(none\)"),
        ({"prompt": "Q?", "label": True}, "row 1, label=True: .* there is nothing that it labels"),
        ({"prompt": "Q?", "completion": "Yes.", "label": True, "weight": 3}, "row 1, weight=3"),
    ],
)
def test_a_mistake_in_the_first_row_is_told_as_one_of_its_kind(row: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(InputError, match=told):
        read_divided_judgements(write_source(tmp_path / "a.jsonl", [row, *build_labelled_rows(3)]), NO_VOTES, 0.1, 0)


def test_rows_of_no_shape_do_not_say_what_the_others_are(tmp_path: Path):
    pairs = [{"prompt": f"Q{i}", "chosen": "Yes.", "rejected": "No."} for i in range(6)]
    assert not has_labels(write_source(tmp_path / "a.jsonl", [{"note": 1}, *pairs]))
    assert has_labels(write_source(tmp_path / "b.jsonl", [{"note": 1}, *build_labelled_rows(3)]))
    assert has_labels(write_source(tmp_path / "c.jsonl", [{"completion": "Yes.", "label": True}] * 3))


def test_columns_of_pairs_that_are_null_make_no_pair(tmp_path: Path):
    rows = [{**row, "chosen": None, "rejected": None} for row in build_labelled_rows(6)]
    assert has_labels(write_source(tmp_path / "a.jsonl", rows))


def test_an_empty_answer_is_an_answer_and_a_long_one_is_counted(tiny_tokenizer: Any):
    stops = (tiny_tokenizer.eos_token_id,)
    answers = [
        build_feedback("Hello?", "", False),
        build_feedback("Hello?", "Yes. " * 100, True),
        build_feedback("And?", "Yes.", True),
    ]
    encoded, dropped = encode_answers(tiny_tokenizer, answers, stops, 60)
    assert ([row.wanted for _, row in encoded], dropped) == ([False, True], 1)
    assert encoded[0][1].ids[encoded[0][1].start :] == [tiny_tokenizer.eos_token_id]
    with pytest.raises(InputError, match=r"data\.max_length=5: all 3 answers are longer"):
        encode_answers(tiny_tokenizer, answers, stops, 5)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [TokenizedAnswer([1, 2, 3], 2, True), TokenizedAnswer([1, 4, 3], 2, True)],
            "labels all 2 answers to train on as wanted",
        ),
        (
            [TokenizedAnswer([1, 2, 3], 2, False), TokenizedAnswer([1, 4, 3], 2, False)],
            "as unwanted: KTO learns from both",
        ),
        ([TokenizedAnswer([1, 2, 3], 2, True), TokenizedAnswer([1, 2, 4], 2, False)], "answers to one prompt alone"),
    ],
)
def test_what_teaches_nothing_is_refused(rows: list[TokenizedAnswer], told: str):
    with pytest.raises(InputError, match=told):
        check_labels_vary([row.wanted for row in rows], [row.prompt for row in rows], "rows.jsonl")


# The area under the ROC curve.


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    figure = auc([0.9, 0.4, 0.4, 0.1], [True, True, False, False], ["a", "b", "c", "d"])
    assert figure.value == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    perfect = auc([2.0, 1.0], [True, False], ["a", "b"])
    assert perfect.value == 1
    assert perfect.low is not None
    assert perfect.low < 0.9  # two answers prove little
    with pytest.raises(ValueError, match="one kind alone"):
        auc([1.0, 2.0], [True, True], ["a", "b"])


@pytest.mark.parametrize("shared", [0.5, 0.0])
@pytest.mark.parametrize("prompts", [400, 40])
def test_its_interval_covers_the_truth_whether_answers_to_a_prompt_are_alike_or_not(prompts: int, shared: float):
    """The true area of N(0.8, 1) against N(0, 1) is Φ(0.8 / √2), for any share of variance between prompts."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(0.8 / 2))
    hits = 0
    names = [str(i) for i in range(prompts) for _ in range(4)]
    for _ in range(300):
        prompt_effects = rng.normal(size=prompts).repeat(4)
        labels = rng.random(prompts * 4) < 0.4
        scores = (
            math.sqrt(shared) * prompt_effects + math.sqrt(1 - shared) * rng.normal(size=prompts * 4) + 0.8 * labels
        )
        figure = auc(scores, labels, names)
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= truth <= figure.high
    assert 0.92 < hits / 300 < 0.98


def test_answers_of_one_label_have_no_figure():
    rows = [build_feedback("a?", "Yes.", True), build_feedback("b?", "No.", True)]
    assert compute_label_figures(rows, torch.tensor([0.1, 0.2])) == {}


# The stage.

PACE = ("stage.lr=5e-3", "stage.epochs=6", "stage.log_every=1", "stage.batch_size=8", "stage.micro_batch=4")


def build_command(data: DataSource, tiny_model: Path, root: Path, *extra: str) -> list[str]:
    overrides = [f"data.path={data.path}", "data=jsonl", f"run.root={root}", f"init={tiny_model}"]
    return ["stage=kto", *overrides, "stage.held_out=0.25", *PACE, *extra]


def test_the_stage_learns_from_answers_with_a_label(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    root = tmp_path / "runs"
    data = write_source(tmp_path / "rows.jsonl", build_labelled_rows(20))
    assert main(build_command(data, tiny_model, root, "run.name=k")) == 0, capfd.readouterr().err
    stdout = capfd.readouterr().out
    folder = root / "kto" / "k"
    metrics = read_manifest(folder).metrics
    assert "the start is kept as the reference: a second adapter of " in stdout
    assert metrics["auc"]["value"] > 0.95
    assert metrics["loss"] < metrics["loss_before"] == pytest.approx(0.5, abs=1e-4)
    assert (metrics["wanted"], metrics["unwanted"], metrics["held_out_answers"]) == (14, 14, 12)
    assert {"loss", "kl", "margin", "wanted_reward", "unwanted_reward"} <= read_rows(folder / "metrics.jsonl")[1].keys()
    shown_kinds = [row["what"] for row in read_rows(folder / "trained_on.jsonl")]
    assert shown_kinds == ["wanted", "unwanted"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "raised a wanted answer more than an unwanted one in" in page
    assert "Raised the most" in page
    trained_rows = read_trained_rows(read_manifest(folder), "")  # an evaluation compares its questions with them
    assert {type(row) for row in trained_rows} == {Feedback}
    assert len(trained_rows) == metrics["wanted"] + metrics["unwanted"]
    assert main(["stage=export", "artifact=kto:latest", f"run.root={root}"]) == 0, capfd.readouterr().err


def test_the_stage_learns_from_pairs(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rows = [{"prompt": f"Question {i}?", "chosen": "Yes, gladly.", "rejected": "No."} for i in range(20)]
    root = tmp_path / "runs"
    data = write_source(tmp_path / "pairs.jsonl", rows)
    assert main(build_command(data, tiny_model, root, "run.name=k", "stage.eval_every=4", "stage.publish=best")) == 0
    metrics = read_manifest(root / "kto" / "k").metrics
    assert metrics["accuracy"]["value"] == 1
    assert metrics["wanted"] == metrics["unwanted"]
    assert "Judged right, by the widest margin" in (root / "kto" / "k" / "report.html").read_text(encoding="utf-8")
    assert "held out: accuracy" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stage.micro_batch=1", "stage.micro_batch=1: leaves no second answer"),
        ("method=full", "an adapter"),
        ("data=chitchat", "preference pairs"),
        ("stage.desirable_weight=0", "stage.desirable_weight"),
        ("stage.label_smoothing=0.1", "stage.label_smoothing"),
    ],
)
def test_what_cannot_be_is_refused(word: str, told: str, capfd: pytest.CaptureFixture[str]):
    assert main(["stage=kto", word]) == 2
    assert told in capfd.readouterr().err


def test_answers_of_one_label_are_refused_with_what_would_do(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    data = write_source(tmp_path / "rows.jsonl", build_labelled_rows(6, lambda i, good: True))
    assert main(build_command(data, tiny_model, tmp_path / "runs")) == 2
    assert "labels all 6 answers to train on as wanted: KTO learns from both kinds" in capfd.readouterr().err
