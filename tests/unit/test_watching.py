"""Moments of a stream, what a response earns, and tripwires: by hand."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from align.ops.moments import Moments
from align.ppo.experience import earned
from align.ppo.state import Best, State
from align.ppo.tripwires import WIRES, counted, crossed, tripped_in
from align.types import Rollout


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3 + 1e3
    found = Moments.of(values[:7]).joined(values[7:8]).joined(values[8:])
    assert found.count == 50
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-9)
    assert found.std == pytest.approx(float(values.std(unbiased=False)), abs=1e-9)


def test_moments_by_hand():
    found = Moments.of(tensor([1.0, 3.0])).joined(tensor([5.0, 7.0]))
    assert (found.count, found.mean, found.deviations) == (4, 4.0, 20.0)
    assert found.standardised(tensor([4.0, 4.0 + 5**0.5])).tolist() == pytest.approx([0, 1])


def test_what_a_response_earns():
    mask = torch.ones(3, 3, dtype=torch.bool)
    rollout = Rollout(mask.long(), mask, 1, tensor([True, False, True]))
    moments = Moments(2, 1.0, 8.0)  # a standard deviation of 2
    found = earned(tensor([3.0, 1.0, 21.0]), rollout, moments, score_scale=0.5, score_clip=4.0, missing_eos_penalty=0.3)
    assert found.tolist() == pytest.approx([0.5, -0.3, 2.0])
    free = earned(tensor([3.0, 1.0, 21.0]), rollout, moments, score_scale=1.0, score_clip=None, missing_eos_penalty=0.0)
    assert free.tolist() == [1, 0, 10]


def test_a_wire_has_a_side():
    figures = {"kl": 12.0, "entropy": 0.2, "repetition": 0.1, "score_length_correlation": -0.9}
    limits = {"kl": 10.0, "entropy": 0.3, "repetition": 0.3, "length_correlation": 0.8, "disagreement": 0.5}
    found = crossed(figures, limits)
    assert set(found) == {"kl", "entropy"}  # nothing measured the disagreement; a negative correlation is no sign
    assert found["kl"].startswith("kl 12 is above 10")
    assert found["entropy"].startswith("entropy 0.2 is below 0.3")
    assert crossed(figures, dict.fromkeys(WIRES)) == {}


def test_only_updates_in_a_row_count():
    strikes: dict[str, int] = {}
    for now in ({"kl": ""}, {"kl": "", "entropy": ""}, {"entropy": ""}):
        strikes = counted(strikes, now)
    assert strikes == {"entropy": 2}


def test_a_wire_that_was_tripped_and_recovered_is_told():
    rows = [{"kl": kl, "entropy": 1.0} for kl in (1, 12, 13, 1, 12)]
    assert tripped_in(rows, {"kl": 10.0, "entropy": 0.3}, patience=2) == ["kl"]
    assert tripped_in(rows, {"kl": 10.0, "entropy": 0.3}, patience=3) == []


def test_a_state_survives_json():
    import json

    best = Best(3, 0.1 + 0.2, (tensor([1.0]),))
    state = State(1 / 3, Moments(5, 2 / 3, 1e-17), {"kl": 2}, best)
    again = State.of(json.loads(json.dumps(state.numbers())), best.weights)
    assert again == state
    plain = State(0.1, Moments(1, 0.0, 1.0))
    assert State.of(json.loads(json.dumps(plain.numbers())), ()) == plain
