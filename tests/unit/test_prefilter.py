"""A filter of hashes and a tally of them, beside a set and a `Counter`. What is filtered by them: test_data_leaks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from align.data.dedup.arrays import BITS_PER_HASH, PROBES, BloomFilter
from align.data.dedup.evaluation_overlap import HashCounter


@pytest.mark.parametrize("count", [0, 1, 3_000, 100_000])
def test_a_filter_never_misses_and_is_seldom_wrong(count: int) -> None:
    draw = np.random.default_rng(count)
    there, others = (draw.integers(1 << 64, size=many, dtype=np.uint64) for many in (count, 400_000))
    filter = BloomFilter(count)
    for part in np.array_split(there, 3):
        filter.add(part)
    assert filter.might_contain(there).all()
    wrong = filter.might_contain(others).mean()
    assert wrong < 5 * (1 - np.exp(-PROBES / BITS_PER_HASH)) ** PROBES


def test_a_filter_at_its_fullest_is_wrong_as_often_as_is_said() -> None:
    draw = np.random.default_rng(0)
    count = (1 << 21) // BITS_PER_HASH - 1  # one more would double the table
    filter = BloomFilter(count)
    filter.add(draw.integers(1 << 64, size=count, dtype=np.uint64))
    assert len(filter.table) == 1 << 18
    assert filter.might_contain(draw.integers(1 << 64, size=2_000_000, dtype=np.uint64)).mean() < 1 / 70_000


def test_a_tally_of_many_stays_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashCounter, "LEAST", 1)
    tally = HashCounter()
    for _ in range(260):
        tally.add(np.array([7], np.uint64))
    tally.add(np.full(1030, 9, np.uint64))
    tally.add(np.full(1030, 9, np.uint64))
    assert tally.select_above(200).tolist() == [7, 9]


@pytest.mark.parametrize("least", [1, 50, 1 << 20])
def test_a_tally_counts_as_a_counter_does(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(HashCounter, "LEAST", least)
    draw, tally, expected = np.random.default_rng(least), HashCounter(), Counter[int]()
    assert tally.select_above(0).tolist() == []
    for _ in range(40):
        hashes = draw.integers(60, size=draw.integers(0, 30), dtype=np.uint64)
        tally.add(hashes)
        expected.update(hashes.tolist())
    for most in (0, 1, 10, 100):
        assert tally.select_above(most).tolist() == sorted(one for one, many in expected.items() if many > most)
