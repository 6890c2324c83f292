"""`BloomFilter` agrees with a set and `HashCounter` with a `Counter`. Their use is tested in test_data_leaks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from align.data.dedup.arrays import BITS_PER_HASH, PROBES, BloomFilter
from align.data.dedup.evaluation_overlap import HashCounter


@pytest.mark.parametrize("count", [0, 1, 3_000, 100_000])
def test_a_filter_never_misses_and_is_seldom_wrong(count: int) -> None:
    generator = np.random.default_rng(count)
    added_hashes, absent_hashes = (generator.integers(1 << 64, size=size, dtype=np.uint64) for size in (count, 400_000))
    filter = BloomFilter(count)
    for part in np.array_split(added_hashes, 3):
        filter.add(part)
    assert filter.might_contain(added_hashes).all()
    false_positive_rate = filter.might_contain(absent_hashes).mean()
    assert false_positive_rate < 5 * (1 - np.exp(-PROBES / BITS_PER_HASH)) ** PROBES


def test_a_filter_at_its_fullest_is_wrong_as_often_as_is_said() -> None:
    generator = np.random.default_rng(0)
    count = (1 << 21) // BITS_PER_HASH - 1  # one more would double the table
    filter = BloomFilter(count)
    filter.add(generator.integers(1 << 64, size=count, dtype=np.uint64))
    assert len(filter.table) == 1 << 18
    assert filter.might_contain(generator.integers(1 << 64, size=2_000_000, dtype=np.uint64)).mean() < 1 / 70_000


def test_a_tally_of_many_stays_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashCounter, "LEAST", 1)
    counter = HashCounter()
    for _ in range(260):
        counter.add(np.array([7], np.uint64))
    counter.add(np.full(1030, 9, np.uint64))
    counter.add(np.full(1030, 9, np.uint64))
    assert counter.select_above(200).tolist() == [7, 9]


@pytest.mark.parametrize("least", [1, 50, 1 << 20])
def test_a_tally_counts_as_a_counter_does(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(HashCounter, "LEAST", least)
    generator = np.random.default_rng(least)
    counter = HashCounter()
    expected = Counter[int]()
    assert counter.select_above(0).tolist() == []
    for _ in range(40):
        hashes = generator.integers(60, size=generator.integers(0, 30), dtype=np.uint64)
        counter.add(hashes)
        expected.update(hashes.tolist())
    for limit in (0, 1, 10, 100):
        assert counter.select_above(limit).tolist() == sorted(key for key, count in expected.items() if count > limit)
