"""The loss of supervised tuning on a CPU: cross-entropy on the trained tokens, read off hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.models.adapters import add_new_adapter
from align.models.base import find_base
from align.models.fastpath import disable_fast_path
from align.models.forward import unwrap_model
from align.models.load import load_base
from align.models.lora import Lora
from align.trainers import sft
from align.trainers.common import Training
from align.trainers.sft import build_sft_trainer, find_frozen_head

CPU = torch.device("cpu")
LENGTHS = ((5, 21), (1, 9), (3, 14), (12, 16))
"""Number of tokens of each row's prompt, and of the whole row."""


def build_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 320, (length,), generator=generator).tolist() for _, length in LENGTHS]
    return [
        EncodedRow(ids, [IGNORE_INDEX] * prompt + ids[prompt:]) for ids, (prompt, _) in zip(rows, LENGTHS, strict=True)
    ]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    torch.manual_seed(0)
    adapted = add_new_adapter(load_base(find_base(path=str(tiny_model)), "lora", CPU, torch.float32), Lora(4, 8))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted


def build_trainer(model: Any, tokenizer: Any, rows: list[EncodedRow], output: Path) -> Any:
    training = Training(
        lr=1e-3,
        epochs=1,
        batch_size=len(rows),
        micro_batch=len(rows),
        warmup=0.0,
        schedule="constant",
        max_grad_norm=1.0,
        save_every=100,
        gradient_checkpointing="auto",
        seed=0,
    )
    arguments = training.arguments(output, CPU, torch.float32, 1)
    return build_sft_trainer(model, tokenizer, rows, arguments, max_length=64, packing=False)


def collate(trainer: Any, rows: list[EncodedRow]) -> dict[str, Tensor]:
    return trainer.data_collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def take_gradients(model: Any) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def compute_plain_loss(model: Any, rows: list[EncodedRow]) -> tuple[Tensor, Tensor, int]:
    """Return the summed loss of the model's own forward on each row alone, and how many tokens it predicts rightly."""
    losses = []
    correct = 0
    count = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        losses.append(cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        trained = targets != IGNORE_INDEX
        correct += int((logits.argmax(-1) == targets)[trained].sum())
        count += int(trained.sum())
    return torch.stack(losses).sum(), torch.tensor(correct / count), count


def test_loss_gradient_and_accuracy_are_those_of_the_models_own_logits(
    model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = build_rows()
    trainer = build_trainer(model, tiny_tokenizer, rows, tmp_path)
    with disable_fast_path(model):
        expected, accuracy, count = compute_plain_loss(model, rows)
        (expected / count).backward()
    expected_gradients = take_gradients(model)
    loss = trainer.compute_loss(model, collate(trainer, rows))
    loss.backward()
    assert_close(loss, expected / count, atol=1e-5, rtol=1e-5)
    gradients = take_gradients(model)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
    assert trainer._metrics["train"]["mean_token_accuracy"] == [pytest.approx(float(accuracy))]


def test_a_step_of_several_micro_batches_divides_by_its_tokens(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = build_rows()
    trainer = build_trainer(model, tiny_tokenizer, rows, tmp_path)
    loss_of_all = trainer.compute_loss(model, collate(trainer, rows))
    count = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    parts = [
        trainer.compute_loss(model, collate(trainer, part), num_items_in_batch=torch.tensor(count))
        for part in (rows[:1], rows[1:])
    ]
    assert_close(parts[0] + parts[1], loss_of_all, atol=1e-5, rtol=1e-5)


def test_the_head_reads_the_trained_tokens_alone(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = build_rows()
    trainer = build_trainer(model, tiny_tokenizer, rows, tmp_path)
    real = sft.linear_predictions
    counts = []

    def count_states(states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        counts.append(len(states))
        return real(states, *arguments)

    monkeypatch.setattr(sft, "linear_predictions", count_states)
    trainer.compute_loss(model, collate(trainer, rows))
    assert counts == [sum(length - prompt for prompt, length in LENGTHS)]


def test_rows_without_a_trained_token_have_no_loss_and_no_gradient(
    model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [EncodedRow(row.input_ids, [IGNORE_INDEX] * len(row.labels)) for row in build_rows()]
    trainer = build_trainer(model, tiny_tokenizer, rows, tmp_path)
    loss = trainer.compute_loss(model, collate(trainer, rows), num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in take_gradients(model).values())
    for count in (None, torch.tensor(0)):  # as TRL, which divides by 1
        assert trainer.compute_loss(model, collate(trainer, rows), num_items_in_batch=count).item() == 0


def test_only_a_frozen_matrix_is_read_past_the_trainer(model: Any) -> None:
    head = unwrap_model(model).get_output_embeddings()
    assert find_frozen_head(model) is head.weight
    head.weight.requires_grad_(True)
    assert find_frozen_head(model) is None
    head.weight.requires_grad_(False)
    unwrap_model(model).config.logit_scale = 0.5
    assert find_frozen_head(model) is None
