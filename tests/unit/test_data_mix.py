"""Tests of how often a mixture shows each row: shares computed by hand, and properties of any mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.errors import InputError
from align.data.sets.mix import (
    compute_draw_keys,
    compute_mixture,
    compute_row_repeats,
    compute_target_shares,
    select_over_caps,
)


def mix(counts: list[int], weights: list[float | None], size: int = 1, **options: object):
    source = np.repeat(np.arange(len(counts)), counts)
    ids = np.arange(len(source), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    names = [f"s{i}" for i in range(len(counts))]
    is_inside = np.ones(len(source), bool)
    mixture = compute_mixture(
        is_inside, source, np.full(len(source), size), compute_draw_keys(ids, 0), names, weights=weights, **options
    )  # type: ignore[arg-type]
    return mixture, [int(mixture.times[source == i].sum()) for i in range(len(counts))]


def test_without_weights_every_row_is_seen_once():
    mixture, counts = mix([5, 3], [None, None])
    assert counts == [5, 3]
    assert set(mixture.times) == {1}
    assert mixture.target_shares == mixture.actual_shares == (0.625, 0.375)


def test_the_rest_of_one_goes_to_sources_without_a_weight():
    assert compute_target_shares([900, 100, 7], [None, None, 0.3], None) == pytest.approx((0.63, 0.07, 0.3))
    assert compute_target_shares([1, 1], [3, 1], None) == (0.75, 0.25)


def test_a_temperature_raises_small_sources():
    assert compute_target_shares([900, 100], [None, None], 2) == pytest.approx((0.75, 0.25))  # square roots: 30 to 10
    assert compute_target_shares([900, 100], [None, None], 1) == pytest.approx((0.9, 0.1))


def test_a_temperature_near_0_overflows_nothing():
    assert compute_target_shares([900, 100], [None, None], 1e-3) == (1, 0)


def test_the_largest_mixture_without_repetition():
    mixture, counts = mix([700, 10_000], [None, 0.3])
    assert counts == [700, 300]
    assert mixture.limit == 0
    assert max(mixture.times) == 1
    mixture, counts = mix([700, 100], [None, 0.3])
    assert counts == [233, 100]
    assert mixture.limit == 1


def test_repetition_lets_a_small_source_be_seen_again():
    mixture, counts = mix([700, 100], [None, 0.3], repeat=3)
    assert counts == [700, 300]
    assert set(mixture.times[700:]) == {3}


def test_a_total_that_cannot_be_met_says_how_often_rows_would_be_seen():
    with pytest.raises(InputError, match=r"stage\.sources\.s1=100: is less than the 300 .*stage\.mix\.repeat=3"):
        mix([700, 100], [None, 0.3], total=1000)
    assert mix([700, 100], [None, 0.3], total=1000, repeat=3)[1] == [700, 300]


def test_weights_that_leave_nothing_for_the_others():
    with pytest.raises(InputError, match="which leaves no share for"):
        mix([5, 5], [1.0, None])


def test_a_cap_leaves_the_first_rows_of_the_order():
    source = np.repeat([0, 1], 50)
    draw = compute_draw_keys(np.arange(100, dtype=np.uint64), 0)
    is_kept = np.arange(100) % 10 != 0
    rows_over_cap = [set(select_over_caps(is_kept, source, draw, [cap, None]).tolist()) for cap in (10, 20)]
    assert [len(rows) for rows in rows_over_cap] == [35, 25]
    assert rows_over_cap[1] < rows_over_cap[0]
    assert rows_over_cap[0].isdisjoint(range(50, 100))
    assert rows_over_cap[0].isdisjoint(np.flatnonzero(~is_kept))
    assert max(draw[sorted({*range(50)} - rows_over_cap[0] - {0, 10, 20, 30, 40})]) < min(
        draw[sorted(rows_over_cap[0])]
    )


def test_shares_of_turns():
    source = np.array([0, 0, 0, 0, 1, 1])
    size = np.array([10, 10, 10, 10, 4, 4])
    mixture = compute_mixture(
        np.ones(6, bool), source, size, np.arange(6, dtype=np.uint64), ["a", "b"], weights=[0.5, 0.5]
    )
    assert mixture.times.tolist() == [1, 0, 0, 0, 1, 1]
    assert mixture.actual_shares == pytest.approx((10 / 18, 8 / 18))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.floats(0, 400))
def test_units_come_within_half_a_row(sizes: list[int], units: float):
    rows = np.array(sizes)
    times = compute_row_repeats(rows, units)
    assert times.max() - times.min() <= 1
    assert np.all(np.diff(times) <= 0)
    assert abs(int((rows * times).sum()) - units) <= max(sizes) / 2 + 1e-6


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.integers(0, 3), st.data())
def test_another_source_changes_counts_and_no_order(counts: list[int], seed: int, data: st.DataObject):
    """A larger count of a source adds the next rows of its order, for any other sources."""
    source = np.repeat(np.arange(len(counts)), counts)
    draw = compute_draw_keys(np.arange(1, len(source) + 1, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93), seed)
    weights = [data.draw(st.floats(0.1, 1)) for _ in counts]

    def list_seen_rows(first: int, number: int) -> list[int]:
        inside = source < number
        sizes = np.ones(len(source), np.int64)
        names = [f"s{i}" for i in range(number)]
        mixture = compute_mixture(inside, source, sizes, draw, names, weights=weights[:number])
        return np.flatnonzero((source == first) & (mixture.times > 0)).tolist()

    fewer, more = sorted((set(list_seen_rows(0, n)) for n in (len(counts) - 1, len(counts))), key=len)
    assert fewer <= more
    order = np.flatnonzero(source == 0)[np.argsort(draw[source == 0])]
    assert more == set(order[: len(more)].tolist())


def test_the_order_of_draw_goes_by_the_seed():
    ids = np.arange(1000, dtype=np.uint64)
    keys = compute_draw_keys(ids, 1)
    same_keys = compute_draw_keys(ids, 1)
    other_keys = compute_draw_keys(ids, 2)
    assert np.array_equal(keys, same_keys)
    assert len(set(keys.tolist())) == 1000
    assert abs(np.corrcoef(np.argsort(keys), np.argsort(other_keys))[0, 1]) < 0.2


def test_rows_that_are_not_inside_are_not_seen():
    is_inside = np.array([True, True, False, True])
    source = np.array([0, 0, 1, 2])
    arguments = is_inside, source, np.ones(4, np.int64), np.arange(4, dtype=np.uint64), ["a", "b", "c"]
    mixture = compute_mixture(*arguments, weights=[None] * 3)
    assert mixture.times.tolist() == [1, 1, 0, 1]
    with pytest.raises(InputError, match=r"stage\.sources\.b=0\.2: has a weight, but none of its rows"):
        compute_mixture(*arguments, weights=[0.5, 0.2, 0.3])
