"""Each preference loss and its gradients equal a second implementation from the paper, in fp32 and off the start."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dpo import PAIRS
from test_trainers import arguments
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.data.pairs import TokenizedPair, smooth_labels
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
SOFT_PAIRS = [replace(pair, label=label) for pair, label in zip(PAIRS, (0.9, 0.35, 1.0, 0.0), strict=True)]
LABELLED_PAIRS = {"cdpo": smooth_labels(PAIRS, 0.2), "soft": SOFT_PAIRS}
"""Pairs whose labels are not 1, by the name of the loss."""
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "cdpo": {"loss": "sigmoid"},
    "soft": {"loss": "sigmoid"},
    "ipo": {"loss": "ipo"},
    "orpo": {"loss": "orpo"},
    "simpo": {"loss": "simpo", "simpo_gamma": 0.4},
}
SUMMED = ("sigmoid", "cdpo", "soft")
"""Losses of summed instead of mean logprobs."""


def perturb_adapter(model: Any, seed: int) -> None:
    """Add seeded noise to the weights of the adapter that trains."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


def fresh(folder: Path) -> Any:
    torch.manual_seed(1)  # seeds lora_A
    model = add_new_adapter(load_base(read_base(folder, "tiny"), "lora", CPU, torch.float32), Lora(4, 8))
    perturb_adapter(model, 3)  # lora_B is no longer zero: the policy differs from the base
    return model


def answer(model: Any, ids: list[int], start: int) -> Tensor:
    """Return the log-probability of each token of an answer [T]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    return logprobs[range(start - 1, len(ids) - 1), ids[start:]]


def compute_pair_loss(
    name: str, label: float, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """Compute the loss of a pair from the token logprobs of its answers under policy and reference."""
    if name in SUMMED:
        margin = BETA * (chosen.sum() - ref_chosen.sum() - rejected.sum() + ref_rejected.sum())
        probability = 0.8 if name == "cdpo" else label
        return -probability * logsigmoid(margin) - (1 - probability) * logsigmoid(-margin)
    if name == "ipo":
        margin = chosen.mean() - ref_chosen.mean() - rejected.mean() + ref_rejected.mean()
        return (margin - 1 / (2 * BETA)) ** 2
    chosen_prob = chosen.mean().exp()
    rejected_prob = rejected.mean().exp()
    if name == "orpo":
        return (
            -chosen_prob.log()
            - BETA * ((chosen_prob / (1 - chosen_prob)) / (rejected_prob / (1 - rejected_prob))).log().sigmoid().log()
        )
    return -(BETA * (chosen_prob.log() - rejected_prob.log()) - 0.4).sigmoid().log()


def compute_expected_loss(name: str, model: Any, start: Any, pairs: list[TokenizedPair]) -> Tensor:
    total = torch.zeros(())
    for pair in pairs:
        answers = (pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)
        logprobs = [answer(model, *answer_of_pair) for answer_of_pair in answers]
        with torch.no_grad():
            start_logprobs = [answer(start, *answer_of_pair) for answer_of_pair in answers]
        total = total + compute_pair_loss(name, pair.label, *logprobs, *start_logprobs)
    return total / len(pairs)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if ".default." in n and p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_every_gradient_are_those_of_the_paper(
    name: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
):
    model, reference_policy, start = (fresh(tiny_model) for _ in range(3))
    pairs = LABELLED_PAIRS.get(name, PAIRS)
    make_trainer = partial(
        build_dpo_trainer, model, tiny_tokenizer, pairs, arguments(tmp_path, 1), beta=BETA, **LOSSES[name]
    )
    trainer: Any = make_trainer()
    perturb_adapter(model, 5)
    perturb_adapter(reference_policy, 5)
    rows = [
        {"rows": [p.chosen_ids, p.rejected_ids], "starts": [p.chosen_start, p.rejected_start], "label": p.label}
        for p in pairs
    ]
    loss = trainer.compute_loss(model.train(), collate_pairs(rows, tiny_tokenizer.pad_token_id))
    loss.backward()
    expected_loss = compute_expected_loss(name, reference_policy, start, pairs)
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    policy_gradients = gradients(model)
    expected_gradients = gradients(reference_policy)
    assert policy_gradients.keys() == expected_gradients.keys()
    assert max(float(g.abs().max()) for g in expected_gradients.values()) > 1e-3
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(policy_gradients[key], gradient, rtol=1e-3, atol=1e-6)
    has_reference_adapter = any(f".{REFERENCE}." in key for key, _ in model.named_parameters())
    assert has_reference_adapter == (name in (*SUMMED, "ipo"))


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_measured_is_the_loss_that_trains(name: str, tiny_model: Path):
    pairs = LABELLED_PAIRS.get(name, PAIRS)
    model = fresh(tiny_model)
    start = fresh(tiny_model)
    perturb_adapter(model, 5)
    with torch.no_grad():
        expected_loss = float(compute_expected_loss(name, model, start, pairs))
    logprobs, start_logprobs = (compute_pair_logprobs(m.eval(), pairs, 0, name not in SUMMED) for m in (model, start))
    labels = torch.tensor([pair.label for pair in pairs])
    chosen_logprobs, rejected_logprobs = logprobs.unbind(-1)
    gap = (logprobs - start_logprobs)[:, 0] - (logprobs - start_logprobs)[:, 1]
    measured = {
        "sigmoid": lambda: dpo_loss(gap, BETA, "sigmoid"),
        "cdpo": lambda: dpo_loss(gap, BETA, "sigmoid", labels),
        "soft": lambda: dpo_loss(gap, BETA, "sigmoid", labels),
        "ipo": lambda: dpo_loss(gap, BETA, "ipo"),
        "orpo": lambda: orpo_loss(chosen_logprobs, rejected_logprobs, BETA),
        "simpo": lambda: simpo_loss(chosen_logprobs, rejected_logprobs, BETA, 0.4),
    }
    assert float(measured[name]()) == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("certain", [0.0, 1e-7])
def test_an_answer_learned_by_heart_has_finite_odds(
    certain: float, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path
):
    """fp32 rounds the log-probability of a short answer to 0. TRL's odds ratio loss has a gradient of nan there."""
    trainer: Any = build_dpo_trainer(
        fresh(tiny_model), tiny_tokenizer, PAIRS, arguments(tmp_path, 1), beta=BETA, loss="orpo"
    )
    for compute_loss in (
        lambda a, b: -(a + trainer.odds_ratio_loss(a, b)[0]).mean(),
        lambda a, b: orpo_loss(a, b, BETA),
    ):
        chosen_logprobs, rejected_logprobs = (
            torch.tensor([value], requires_grad=True, device=CPU) for value in (certain, -8.0)
        )
        loss = compute_loss(chosen_logprobs, rejected_logprobs)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert float(chosen_logprobs.grad) == pytest.approx(-1, abs=1e-3)  # type: ignore[arg-type]
        assert torch.isfinite(rejected_logprobs.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["soft", "orpo", "simpo"])
def test_a_step_is_the_same_however_its_pairs_are_cut(name: str, tiny_model: Path, tiny_tokenizer: Any, tmp_path: Path):
    """The loss is a mean over pairs, so the micro-batch size changes only the rounding."""
    weights = []
    for micro in (4, 1):
        model = fresh(tiny_model)
        training_arguments = arguments(tmp_path / str(micro), 3, micro_batch=micro)
        make_trainer = partial(
            build_dpo_trainer,
            model,
            tiny_tokenizer,
            LABELLED_PAIRS.get(name, PAIRS),
            training_arguments,
            beta=BETA,
            **LOSSES[name],
        )
        train(make_trainer, model)
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n})
    start = {n: p for n, p in fresh(tiny_model).named_parameters() if ".default." in n}
    assert all(not torch.equal(weights[0][n], start[n]) for n in start)
    differences = torch.cat([(weights[0][n] - weights[1][n]).abs().flatten() for n in start])
    assert float(differences.quantile(0.999)) < 1e-4
