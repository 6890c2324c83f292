"""Trainers extend those of TRL: fp32 adapters, a saved score head, and checkpoints whose integrity is checked."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.testing import assert_close
from transformers import TrainerCallback

from align.core.errors import InputError
from align.data.chat.encode import encode_documents
from align.data.pairs import TokenizedPair
from align.data.read.records import read_documents
from align.models.adapters import SCORE_KEY, add_new_adapter, read_tensors, save_adapter
from align.models.base import find_base
from align.models.load import load_base, load_classifier
from align.models.lora import Lora
from align.run.checkpoints import SEAL, is_intact, remove_unusable_and_find_newest, seal_checkpoint
from align.trainers import common
from align.trainers.common import Training, train
from align.trainers.reward import (
    Ranking,
    build_reward_trainer,
    collate_rankings,
    compute_mean_judgements,
    compute_pair_gaps,
    compute_pair_losses,
    copy_adapter_weights,
    find_score_head,
    group_rankings,
)
from align.trainers.sft import build_sft_trainer, pack_rows

CPU = torch.device("cpu")


SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "epochs": 1.0,
    "batch_size": 4,
    "micro_batch": 4,
    "warmup": 0.0,
    "schedule": "constant",
    "max_grad_norm": 1.0,
    "save_every": 100,
    "gradient_checkpointing": "auto",
}


def arguments(output: Path, steps: int, **more: Any) -> dict[str, Any]:
    settings = SETTINGS | {"max_steps": steps, "seed": 0} | more
    return Training(**settings).arguments(output, CPU, torch.float32, steps)


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return find_base(path=str(tiny_model))


def build_adapted_model(base: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return add_new_adapter(load_base(base, "qlora", CPU, torch.float32), Lora(4, 8))


def build_reward_model(base: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return add_new_adapter(load_classifier(base, "qlora", CPU, torch.float32), Lora(4, 8), is_reward_model=True)


def lora_weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def fit_sft(model: Any, tokenizer: Any, chats: Path, output: Path, steps: int, **more: Any) -> None:
    rows = encode_documents(tokenizer, read_documents(chats), 128).rows
    training_arguments = arguments(output, steps, **more)
    build_trainer = partial(
        build_sft_trainer, model, tokenizer, rows, training_arguments, max_length=128, packing=False
    )
    train(build_trainer, model, TrainerCallback())


def build_rankings() -> list[Ranking]:
    """Build sixteen rankings of two or three answers."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        [torch.randint(6, 320, (int(n),), generator=generator).tolist() for n in (5 + i % 7, 9, 6)[: 2 + i % 2]]
        for i in range(16)
    ]
    pairs = {count: [(a, b) for a in range(count) for b in range(a + 1, count)] for count in (2, 3)}
    return [Ranking(rows, pairs[len(rows)], [1.0] * len(pairs[len(rows)])) for rows in texts]


def fit_reward(model: Any, tokenizer: Any, output: Path, steps: int, **more: Any) -> None:
    build_trainer = partial(build_reward_trainer, model, tokenizer, build_rankings(), arguments(output, steps, **more))
    train(build_trainer, model, TrainerCallback())


# Precision.


def test_small_steps_are_not_lost_on_a_4bit_base(base: Any, tiny_tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    """Adam moves each element of `lora_A` by about 1e-5, which bf16 would round away for most of them."""
    model = build_adapted_model(base)
    assert any(isinstance(m, Linear4bit) for m in model.modules())
    with torch.no_grad():  # with lora_B at zero lora_A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = lora_weights(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    fit_sft(model, tiny_tokenizer, chats, tmp_path / "c", 1, lr=1e-5)
    after = lora_weights(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for name in before:
        if "lora_A" in name:
            moved = (after[name] != before[name]).float().mean()
            assert moved == 1.0, f"{name}: only {moved:.0%} moved"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_nothing_to_train_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="nothing is trainable"):
        common.cast_trainable_to_fp32(nn.Linear(2, 2).requires_grad_(False), {})


def test_an_adapter_starts_from_its_own_values_not_from_rounded_ones(
    base: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """TRL rounds to bf16 when it builds a trainer; after a step with a tiny learning rate the weights are unchanged."""
    model = build_reward_model(base)
    before = lora_weights(model)
    assert any((w != w.bfloat16().float()).any() for w in before.values())
    fit_reward(model, tiny_tokenizer, tmp_path, 1, lr=1e-30)
    after = lora_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_A" in name)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "limit", "steps"),
    [
        (40, 8, 1.0, None, 5),
        (41, 8, 1.0, None, 6),
        (40, 8, 0.5, None, 3),
        (40, 8, 2.0, None, 10),
        (40, 8, 9.0, 4, 4),
        (3, 8, 0.1, None, 1),
    ],
)
def test_steps_of_a_run(rows: int, batch: int, epochs: float, limit: int | None, steps: int) -> None:
    settings = SimpleNamespace(**SETTINGS | {"batch_size": batch, "epochs": epochs, "max_steps": limit})
    assert Training.from_settings(settings, 0).steps(rows) == steps


def test_the_steps_announced_are_the_steps_taken(base: Any, tiny_tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    class Counter(TrainerCallback):
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = state.global_step

    counter = Counter()
    rows = encode_documents(tiny_tokenizer, read_documents(chats), 128).rows
    settings = arguments(tmp_path / "c", 0, max_steps=None, epochs=0.5, batch_size=16, micro_batch=8)
    model = build_adapted_model(base)
    train(
        partial(build_sft_trainer, model, tiny_tokenizer, rows, settings, max_length=128, packing=False), model, counter
    )
    assert counter.steps == Training(**SETTINGS | {"epochs": 0.5, "batch_size": 16}, seed=0).steps(len(rows)) == 2


class Logged(TrainerCallback):
    """Keep the loss that the trainer logs for each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def test_packed_rows_do_not_see_each_other(base: Any, tiny_tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    """A step over all rows has the same loss with and without packing. Attention between rows would change it."""
    rows = encode_documents(tiny_tokenizer, read_documents(chats), 128).rows
    losses = []
    for packing in (False, True):
        count = len(pack_rows(rows, 128)) if packing else len(rows)
        settings = arguments(tmp_path / "c", 1, batch_size=count, micro_batch=count)
        model = build_adapted_model(base)
        loss_log = Logged()
        build_trainer = partial(
            build_sft_trainer, model, tiny_tokenizer, rows, settings, max_length=128, packing=packing
        )
        train(build_trainer, model, loss_log)
        losses += loss_log.losses
    assert count < len(rows) / 2
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


# The reward model.


def test_the_score_head_is_trained_and_saved(base: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = build_reward_model(base)
    copy_adapter_weights(model, None)
    head = find_score_head(model).weight
    assert isinstance(head, torch.Tensor)
    assert not head.any()
    fit_reward(model, tiny_tokenizer, tmp_path / "c", 3)
    save_adapter(model, tmp_path / "a", base)
    saved = read_tensors(tmp_path / "a")[SCORE_KEY]
    assert saved.shape == (1, 64)
    assert saved.any()
    assert torch.equal(saved, head.detach())
    assert not any("training_args" in p.name for p in (tmp_path / "a").iterdir())


def test_a_reward_model_starts_from_the_sft_adapter(
    base: Any, tiny_tokenizer: Any, chats: Path, tmp_path: Path
) -> None:
    tuned = build_adapted_model(base)
    fit_sft(tuned, tiny_tokenizer, chats, tmp_path / "c", 2)
    save_adapter(tuned, tmp_path / "sft", base)
    model = build_reward_model(base, seed=1)
    assert copy_adapter_weights(model, tmp_path / "sft") == len(lora_weights(tuned)) == 28
    sft_weights = lora_weights(tuned)
    copied_weights = lora_weights(model)
    assert sft_weights.keys() == copied_weights.keys()
    assert all(torch.equal(sft_weights[n], copied_weights[n]) for n in sft_weights)
    assert any(t.any() for n, t in copied_weights.items() if "lora_B" in n)


def test_an_answer_is_read_once_however_many_pairs_it_stands_in() -> None:
    a = [1, 5]
    b = [1, 6, 7]
    c = [1, 8]
    rankings = group_rankings(
        [
            ("x", TokenizedPair(b, a, label=0.7)),
            ("y", TokenizedPair(a, c)),
            ("x", TokenizedPair(b, c, label=0.9)),
            ("x", TokenizedPair(a, c, label=0.4)),
        ]
    )
    expected = [Ranking([b, a, c], [(0, 1), (0, 2), (1, 2)], [0.7, 0.9, 0.4]), Ranking([a, c], [(0, 1)], [1.0])]
    assert rankings == expected
    rows = [asdict(ranking) for ranking in rankings]
    batch = collate_rankings(rows, filler=3, mean_judgements=compute_mean_judgements(rankings))
    assert batch["input_ids"].tolist() == [b, [*a, 3], [*c, 3], [*a, 3], [*c, 3]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 2, 2, 2, 2]
    assert batch["pairs"].tolist() == [[0, 1], [0, 2], [1, 2], [3, 4]]
    assert batch["pair_labels"].tolist() == pytest.approx([0.7, 0.9, 0.4, 1.0])
    assert batch["weights"].tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])


def test_several_judgements_of_one_item_are_one_example() -> None:
    """Two people prefer a to b, and a third prefers b; one also ranked another item: 4 judgements on 2 rows."""
    a = [1, 5]
    b = [1, 6, 7]
    c = [1, 8]
    rankings = group_rankings(
        [("x", TokenizedPair(a, b)), ("x", TokenizedPair(b, a)), ("y", TokenizedPair(a, c)), ("x", TokenizedPair(a, b))]
    )
    assert rankings == [Ranking([a, b], [(0, 1), (1, 0), (0, 1)], [1.0] * 3), Ranking([a, c], [(0, 1)], [1.0])]
    assert compute_mean_judgements(rankings) == 2
    batch = collate_rankings([asdict(ranking) for ranking in rankings], filler=3, mean_judgements=2)
    assert batch["weights"].tolist() == [0.25] * 4


def test_the_loss_of_rankings_by_hand() -> None:
    """Scores 2, 0, 1 with gaps 2, 1 and a reversed −1, each a third of one ranking."""
    gap = compute_pair_gaps(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([[0, 1], [0, 2], [1, 2]]))
    assert gap.tolist() == [2.0, 1.0, -1.0]
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 3
    assert float(compute_pair_losses(gap, torch.ones(3)).mean()) == pytest.approx(expected, rel=1e-6)


def test_a_soft_label_weighs_both_orders_of_a_pair() -> None:
    gap = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    losses = compute_pair_losses(gap, torch.tensor([0.9, 0.2, 0.5]))
    first, second = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert float(losses[0]) == pytest.approx(0.9 * first + 0.1 * second, rel=1e-6)
    losses.sum().backward()
    # The derivative is the modelled probability less the label, so it is 0 where the model agrees with the label.
    expected = [1 / (1 + math.exp(-2)) - 0.9, 1 / (1 + math.exp(1)) - 0.2, 1 / (1 + math.exp(-0.5)) - 0.5]
    assert gap.grad is not None
    assert gap.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_learns_from_its_soft_labels(base: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """One ranking with the labels p and one with the reversed pair and 1 − p are the same data."""
    heads = []
    for is_reversed in (False, True):
        rankings = [
            Ranking(
                ranking.texts,
                [(b, a) if is_reversed else (a, b) for a, b in ranking.pairs],
                [0.2 if is_reversed else 0.8 for _ in ranking.pairs],
            )
            for ranking in build_rankings()
        ]
        model = build_reward_model(base)
        output = tmp_path / str(is_reversed)
        train(partial(build_reward_trainer, model, tiny_tokenizer, rankings, arguments(output, 3)), model)
        heads.append(find_score_head(model).weight)
    assert heads[0].abs().max() > 0
    assert_close(heads[0], heads[1], atol=1e-6, rtol=1e-4)


def test_a_reward_step_does_not_depend_on_the_micro_batch(base: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    heads = []
    for micro_batch in (2, 8):
        model = build_reward_model(base)
        fit_reward(model, tiny_tokenizer, tmp_path / str(micro_batch), 3, batch_size=8, micro_batch=micro_batch)
        heads.append(find_score_head(model).weight)
    assert_close(heads[0], heads[1], atol=1e-6, rtol=1e-4)


def test_an_adapter_of_another_rank_does_not_fit(base: Any, tmp_path: Path) -> None:
    save_adapter(add_new_adapter(load_base(base, "qlora", CPU, torch.float32), Lora(8, 8)), tmp_path / "sft", base)
    with pytest.raises(InputError, match=r"init=.*do not fit a reward model"):
        copy_adapter_weights(build_reward_model(base), tmp_path / "sft")


# Checkpoints.


def test_a_seal_tells_a_torn_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "weights").write_bytes(b"0123456789")
    assert not is_intact(folder)
    seal_checkpoint(folder)
    assert is_intact(folder)
    for spoil in (b"012345678", b"0123456780", None):
        (folder / "weights").write_bytes(spoil) if spoil else (folder / "weights").unlink()
        assert not is_intact(folder)
        (folder / "weights").write_bytes(b"0123456789")
    for nothing in ("{", "{}", "[]", "null", "[" * 100_000):
        (folder / SEAL).write_text(nothing)
        assert not is_intact(folder)


def test_a_fresh_run_uses_no_old_checkpoint(tmp_path: Path) -> None:
    class Fresh:
        resumed = False
        folder = tmp_path

    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    assert remove_unusable_and_find_newest(Fresh()) is None  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "checkpoints").exists()
