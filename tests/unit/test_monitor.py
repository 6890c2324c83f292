"""Moments of a stream, the reward of a response and tripwires, compared with values by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from align.core.types import Conversation, Message, Rollout
from align.models.roles import ForwardOutput
from align.ops.moments import Moments
from align.ppo.checkpoint import Best, PpoState
from align.ppo.experience import Estimator, Experience, assemble_experience, shape_scores
from align.ppo.monitor import (
    WIRES,
    count_strikes,
    find_crossed_wires,
    find_tripped_wires,
    measure_answers,
    rank_answers,
)
from align.ppo.workers import Answers
from align.reward.combined import Ensemble, score_with_diagnostics
from align.rollout.strip_reasoning import JudgedAnswers


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3 + 1e3
    moments = Moments.from_values(values[:7]).with_batch(values[7:8]).with_batch(values[8:])
    assert moments.count == 50
    assert moments.mean == pytest.approx(float(values.mean()), abs=1e-9)
    assert moments.std == pytest.approx(float(values.std(unbiased=False)), abs=1e-9)


def test_moments_by_hand():
    moments = Moments.from_values(tensor([1.0, 3.0])).with_batch(tensor([5.0, 7.0]))
    assert (moments.count, moments.mean, moments.deviations) == (4, 4.0, 20.0)
    assert moments.standardise(tensor([4.0, 4.0 + 5**0.5])).tolist() == pytest.approx([0, 1])


def test_what_a_response_earns():
    mask = torch.ones(3, 3, dtype=torch.bool)
    rollout = Rollout(mask.long(), mask, 1, tensor([True, False, True]))
    moments = Moments(2, 1.0, 8.0)  # a standard deviation of 2
    raw = tensor([3.0, 1.0, 21.0])
    rewards = shape_scores(raw, rollout, moments, score_scale=0.5, score_clip=4.0, missing_eos_penalty=0.3)
    assert rewards.tolist() == pytest.approx([0.5, -0.3, 2.0])
    unclipped = shape_scores(raw, rollout, moments, score_scale=1.0, score_clip=None, missing_eos_penalty=0.0)
    assert unclipped.tolist() == [1, 0, 10]


def test_a_wire_has_a_side():
    figures = {"kl": 12.0, "entropy": 0.2, "repetition": 0.1, "score_length_correlation": -0.9}
    limits = {"kl": 10.0, "entropy": 0.3, "repetition": 0.3, "length_correlation": 0.8, "disagreement": 0.5}
    crossed = find_crossed_wires(figures, limits)
    assert set(crossed) == {"kl", "entropy"}  # the disagreement was not measured; a negative correlation is no sign
    assert crossed["kl"].startswith("kl 12 is above 10")
    assert crossed["entropy"].startswith("entropy 0.2 is below 0.3")
    assert find_crossed_wires(figures, dict.fromkeys(WIRES)) == {}


def test_only_updates_in_a_row_count():
    strikes: dict[str, int] = {}
    for crossed in ({"kl": ""}, {"kl": "", "entropy": ""}, {"entropy": ""}):
        strikes = count_strikes(strikes, crossed)
    assert strikes == {"entropy": 2}


def test_a_wire_that_was_tripped_and_recovered_is_told():
    rows = [{"kl": kl, "entropy": 1.0} for kl in (1, 12, 13, 1, 12)]
    assert find_tripped_wires(rows, {"kl": 10.0, "entropy": 0.3}, patience=2) == ["kl"]
    assert find_tripped_wires(rows, {"kl": 10.0, "entropy": 0.3}, patience=3) == []


def test_a_state_survives_json():
    import json

    best = Best(3, 0.1 + 0.2, (tensor([1.0]),))
    state = PpoState(1 / 3, Moments(5, 2 / 3, 1e-17), {"kl": 2}, best)
    restored = PpoState.from_numbers(json.loads(json.dumps(state.numbers())), best.weights)
    assert restored == state
    state_without_best = PpoState(0.1, Moments(1, 0.0, 1.0))
    assert PpoState.from_numbers(json.loads(json.dumps(state_without_best.numbers())), ()) == state_without_best


# The answers that show why a wire was crossed.

TEXTS = ("no", "a b c a b c a b c", "a b c d e f", "so so so so")
SCORES = tensor([2.0, 0.0, 4.0, 3.0])
LENGTHS = (1, 4, 3, 2)
MASK = torch.arange(4) < tensor(LENGTHS)[:, None]


class Given:
    """A scorer that returns given scores."""

    name = "learned"

    def __init__(self, *scores: float) -> None:
        self.scores = tensor(scores)

    def score(self, conversations: Any, rollout: Any = None) -> Tensor:
        return self.scores


def build_batch() -> tuple[Answers, Experience, dict[str, float]]:
    """Build four answers of 1 to 4 tokens to a prompt of one token, their experience and the update's metrics."""
    mask = torch.cat([torch.ones(4, 1, dtype=torch.bool), MASK], 1)
    rollout = Rollout(torch.arange(20).view(4, 5), mask, 1, torch.ones(4, dtype=torch.bool))
    conversations = [Conversation((Message("user", "?"), Message("assistant", text))) for text in TEXTS]
    old_logprobs = tensor([[-1.0], [-2.0], [-1.5], [-0.5]]) * MASK
    ref_logprobs = tensor([[-4.0], [-1.0], [-2.0], [-3.0]]) * MASK
    experience, figures = assemble_experience(
        rollout,
        SCORES,
        old_logprobs,
        ref_logprobs,
        torch.zeros(4, 4),
        estimator=Estimator(),
        kl_coef=0.1,
        kl_estimator="k1",
        kl_in_reward=True,
    )
    return Answers([], rollout, list(TEXTS), JudgedAnswers(conversations, rollout, [None] * 4)), experience, figures


def build_workers() -> Any:
    """Build workers whose entropy at a token is a tenth of its id, and whose scorer is an ensemble of two."""

    def compute_logprobs(role: str, rollout: Rollout, temperature: float) -> ForwardOutput:
        assert (role, temperature) == ("policy", 0.7)
        entropy = torch.where(rollout.response_mask_BT, rollout.response_BT / 10, 0.0)
        return ForwardOutput(torch.zeros_like(entropy), entropy, entropy)

    ensemble = Ensemble((Given(0.0, 5.0, 1.0, 3.0), Given(2.0, 5.0, 7.0, 4.0)))
    return SimpleNamespace(roles=SimpleNamespace(logprobs=compute_logprobs), scorer=ensemble)


@pytest.mark.parametrize(
    ("wire", "each", "order"),
    [
        # A quarter below the mean score and 3/2 below the mean length, and so on, over both standard deviations.
        ("length_correlation", [x / (2.1875 * 1.25) ** 0.5 for x in (0.375, -3.375, 0.875, -0.375)], [2, 0, 3, 1]),
        ("disagreement", [1.0, 0.0, 3.0, 0.5], [2, 0, 3, 1]),
        ("kl", [3.0, -4.0, 1.5, 5.0], [3, 0, 2, 1]),
        ("entropy", [0.1, 0.75, 1.2, 1.65], [0, 1, 2, 3]),
        ("repetition", [0.0, 4 / 7, 0.0, 0.5], [1, 3, 2, 0]),  # an equal sign is broken by the score
    ],
)
def test_the_most_suspicious_answer_is_the_one_that_shows_the_sign(wire: str, each: list[float], order: list[int]):
    answers, experience, figures = build_batch()
    measured = measure_answers([wire], build_workers(), answers, SCORES, experience, temperature=0.7, micro_batch=2)
    assert measured == {wire: pytest.approx(each, abs=1e-4)}
    assert rank_answers(measured, SCORES.tolist()) == order
    figures |= score_with_diagnostics(build_workers().scorer, answers.conversations, answers.rollout)[1]
    if wire not in ("entropy", "repetition"):
        assert sum(measured[wire]) / 4 == pytest.approx(figures[WIRES[wire].figure])


def test_every_wire_has_a_figure_of_each_answer():
    answers, experience, _ = build_batch()
    measured = measure_answers(WIRES, build_workers(), answers, SCORES, experience, temperature=0.7, micro_batch=32)
    assert measured.keys() == WIRES.keys()


def test_lengths_that_are_all_alike_explain_no_score():
    answers, experience, _ = build_batch()
    measured = measure_answers(
        ["length_correlation"], build_workers(), answers, torch.ones(4), experience, temperature=1.0, micro_batch=32
    )
    assert measured == {"length_correlation": [0.0] * 4}


def test_after_several_wires_an_answer_that_shows_all_of_them_comes_first():
    figures = {"kl": [9.0, 8.0, 0.0, 1.0], "entropy": [3.0, 0.1, 0.2, 4.0]}
    assert rank_answers(figures, [0.0, 0.0, 0.0, 9.0]) == [1, 0, 2, 3]  # places 0+2, 1+0, 3+1, 2+3
    assert rank_answers({"kl": [1.0, 2.0], "entropy": [1.0, 2.0]}, [0.0, 5.0]) == [1, 0]  # 1 each: the score decides
