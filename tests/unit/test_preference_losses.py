"""Each loss on preferences against its paper, written out a second time: the loss of a batch and every gradient, in
fp32, away from the start."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dpo import PAIRS
from test_trainers import arguments
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.data.pairs import TokenizedPair
from align.evals.held_out import compute_pair_logprobs
from align.models.adapters import add_new_adapter
from align.models.base import read_base
from align.models.load import load_base
from align.models.lora import Lora
from align.ops.losses import dpo_loss, orpo_loss, simpo_loss
from align.trainers.common import train
from align.trainers.dpo import REFERENCE, build_dpo_trainer, collate_pairs

CPU = torch.device("cpu")
BETA = 0.7
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"}, "cdpo": {"loss": "sigmoid", "label_smoothing": 0.2}, "ipo": {"loss": "ipo"},
    "orpo": {"loss": "orpo"}, "simpo": {"loss": "simpo", "simpo_gamma": 0.4},
}  # fmt: skip


def moved(model: Any, seed: int) -> None:
    """The adapter that trains, somewhere else."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def fresh(folder: Path) -> Any:
    torch.manual_seed(1)  # of lora_A
    model = add_new_adapter(load_base(read_base(folder, "tiny"), "lora", CPU, torch.float32), Lora(4, 8))
    moved(model, 3)  # B is no longer zero: the start is not the base
    return model


def answer(model: Any, ids: list[int], start: int) -> Tensor:
    """log π of each token of an answer [T]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    return logprobs[range(start - 1, len(ids) - 1), ids[start:]]


def by_hand(name: str, better: Tensor, worse: Tensor, ref_better: Tensor, ref_worse: Tensor) -> Tensor:
    """The loss of a pair, of the logprobs of the tokens of its answers under policy and reference."""
    if name in ("sigmoid", "cdpo"):
        h = BETA * (better.sum() - ref_better.sum() - worse.sum() + ref_worse.sum())
        wrong = 0.2 if name == "cdpo" else 0.0
        return -(1 - wrong) * logsigmoid(h) - wrong * logsigmoid(-h)
    if name == "ipo":
        h = better.mean() - ref_better.mean() - worse.mean() + ref_worse.mean()
        return (h - 1 / (2 * BETA)) ** 2
    p, q = better.mean().exp(), worse.mean().exp()
    if name == "orpo":
        return -p.log() - BETA * ((p / (1 - p)) / (q / (1 - q))).log().sigmoid().log()
    return -(BETA * (p.log() - q.log()) - 0.4).sigmoid().log()


def expected(name: str, model: Any, start: Any, pairs: list[TokenizedPair]) -> Tensor:
    total = torch.zeros(())
    for pair in pairs:
        sides = (pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)
        now = [answer(model, *side) for side in sides]
        with torch.no_grad():
            then = [answer(start, *side) for side in sides]
        total = total + by_hand(name, *now, *then)
    return total / len(pairs)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if ".default." in n and p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_every_gradient_are_those_of_the_paper(
    name: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
):
    model, other, start = (fresh(tiny_model) for _ in range(3))
    make = partial(build_dpo_trainer, model, tiny_tokenizer, PAIRS, arguments(tmp_path, 1), beta=BETA, **LOSSES[name])
    trainer: Any = make()
    moved(model, 5)
    moved(other, 5)
    rows = [{"rows": [p.chosen_ids, p.rejected_ids], "starts": [p.chosen_start, p.rejected_start]} for p in PAIRS]
    loss = trainer.compute_loss(model.train(), collate_pairs(rows, tiny_tokenizer.pad_token_id))
    loss.backward()
    wanted = expected(name, other, start, PAIRS)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found, right = gradients(model), gradients(other)
    assert found.keys() == right.keys()
    assert max(float(g.abs().max()) for g in right.values()) > 1e-3
    for key, gradient in right.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)
    kept = any(f".{REFERENCE}." in key for key, _ in model.named_parameters())
    assert kept == (name in ("sigmoid", "cdpo", "ipo"))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_measured_is_the_loss_that_trains(name: str, tiny_model: Path):
    model, start = fresh(tiny_model), fresh(tiny_model)
    moved(model, 5)
    with torch.no_grad():
        wanted = float(expected(name, model, start, PAIRS))
    now, then = (compute_pair_logprobs(m.eval(), PAIRS, 0, name not in ("sigmoid", "cdpo")) for m in (model, start))
    chosen, rejected = now.unbind(-1)
    gap = (now - then)[:, 0] - (now - then)[:, 1]
    measured = {
        "sigmoid": lambda: dpo_loss(gap, BETA, "sigmoid"), "cdpo": lambda: dpo_loss(gap, BETA, "sigmoid", 0.2),
        "ipo": lambda: dpo_loss(gap, BETA, "ipo"), "orpo": lambda: orpo_loss(chosen, rejected, BETA),
        "simpo": lambda: simpo_loss(chosen, rejected, BETA, 0.4),
    }  # fmt: skip
    assert float(measured[name]()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("certain", [0.0, 1e-7])
def test_an_answer_learned_by_heart_has_finite_odds(
    certain: float, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
):
    """fp32 rounds the log p of a short answer to 0 and beyond. TRL's own odds give a gradient of nan there."""
    trainer: Any = build_dpo_trainer(
        fresh(tiny_model), tiny_tokenizer, PAIRS, arguments(tmp_path, 1), beta=BETA, loss="orpo"
    )  # fmt: skip
    for of in (lambda a, b: -(a + trainer.odds_ratio_loss(a, b)[0]).mean(), lambda a, b: orpo_loss(a, b, BETA)):
        chosen, rejected = (torch.tensor([value], requires_grad=True, device=CPU) for value in (certain, -8.0))
        loss = of(chosen, rejected)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert float(chosen.grad) == pytest.approx(-1, abs=1e-3)  # type: ignore[arg-type]
        assert torch.isfinite(rejected.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cdpo", "orpo", "simpo"])
def test_a_step_is_the_same_however_its_pairs_are_cut(name: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path):
    """A mean over pairs: micro-batches change nothing but the rounding."""
    weights = []
    for micro in (4, 1):
        model = fresh(tiny_model)
        given = arguments(tmp_path / str(micro), 3, micro_batch=micro)
        make = partial(build_dpo_trainer, model, tiny_tokenizer, PAIRS, given, beta=BETA, **LOSSES[name])
        train(make, model)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n})
    start = {n: p for n, p in fresh(tiny_model).named_parameters() if ".default." in n}
    assert all(not torch.equal(weights[0][n], start[n]) for n in start)
    off = torch.cat([(weights[0][n] - weights[1][n]).abs().flatten() for n in start])
    assert float(off.quantile(0.999)) < 1e-4
