"""Tests of the split into training and held-out rows: units by hand, and against a search through the links."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.errors import InputError
from align.data.sets.splits import (
    assign_units,
    extend_to_units,
    is_written_since,
    label_groups,
    parse_split_column,
    select_held_out,
)
from align.data.split import select_held_out_keys as held_back_of_files


def hash_names(names: str) -> np.ndarray:
    return np.array([int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) for name in names], np.uint64)


def search_units(questions: list[int], *links: list[int]) -> list[int]:
    """Return, for each row, the linked question with the smallest lower half."""
    units = []
    for start in range(len(questions)):
        reached = {start}
        frontier = [start]
        while frontier:
            row = frontier.pop()
            for neighbour in range(len(questions)):
                same = questions[row] == questions[neighbour]
                same |= any(labels[row] >= 0 and labels[row] == labels[neighbour] for labels in links)
                if same and neighbour not in reached:
                    reached.add(neighbour)
                    frontier.append(neighbour)
        units.append(min((questions[row] % 2**32, questions[row]) for row in reached)[1])
    return units


@given(st.integers(0, 12).flatmap(lambda n: st.tuples(*(st.lists(st.integers(-1, 5), min_size=n, max_size=n),) * 3)))
def test_units_against_a_search(drawn: tuple[list[int], list[int], list[int]]):
    questions = [(value * 7919 % 11) << 32 | (value + 1) for value in drawn[0]]
    units = assign_units(np.array(questions, np.uint64), *(np.array(labels, np.int64) for labels in drawn[1:]))
    assert units.tolist() == search_units(questions, *drawn[1:])


def test_a_long_chain_of_links_is_one_unit_soon():
    """The rows of the chain are shuffled, and its links alternate between two columns."""
    count = 300_000
    place = np.random.default_rng(0).permutation(count)
    even_links = np.empty(count, np.int64)
    odd_links = np.empty(count, np.int64)
    even_links[place] = np.arange(count) // 2
    odd_links[place] = (np.arange(count) + 1) // 2
    start = time.process_time()
    units = assign_units(np.arange(count, dtype=np.uint64) * np.uint64(2**33 + 1), even_links, odd_links)
    assert time.process_time() - start < 5
    assert (units == 0).all()


def test_units_without_links_are_held_back_as_a_file_is():
    names = [f"question {i}" for i in range(400)]
    hexed = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    ids = np.array([int(key[:16], 16) for key in hexed], np.uint64)
    for share in (0, 1e-6, 0.05, 0.5, 1):
        held_out = held_back_of_files(hexed, share)
        assert select_held_out(assign_units(ids), share).tolist() == [key in held_out for key in hexed]


def test_rows_stay_on_their_side_when_others_come_in():
    units = hash_names("".join(map(chr, range(200, 500))))
    held_out_of_100 = select_held_out(units[:100], 0.2)
    held_out = select_held_out(units, 0.2)
    assert np.array_equal(held_out_of_100, held_out[:100])
    assert 0 < held_out_of_100.sum() < 100


def test_one_unit_is_not_held_out_and_none_where_nothing_is_asked():
    assert not select_held_out(hash_names("aa"), 0.001).any() or hash_names("a")[0] >> np.uint64(32) < 2**32 * 0.001
    assert not select_held_out(hash_names("abc"), 0).any()
    assert select_held_out(hash_names("abc"), 1e-9).sum() == 1


def test_a_unit_of_which_a_row_is_measured_on_is_measured_on():
    assert extend_to_units(hash_names("aabc"), np.array([True, False, False, False])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_groups_by_column():
    groups = pa.chunked_array([["x", None], ["y", "x", "x"]])
    labels = label_groups(groups, np.array([0, 0, 0, 0, 1])).tolist()
    assert labels[1] == -1
    assert labels[0] == labels[3]
    assert len({labels[0], labels[2], labels[4]}) == 3  # `x` of another source is another group


def test_the_share_is_that_of_units_however_large_they_are():
    generator = np.random.default_rng(0)
    for size in (1, 20):
        units = assign_units(
            generator.integers(0, 2**64, 20_000, np.uint64), np.repeat(np.arange(20_000 // size), size)
        )
        assert select_held_out(units, 0.1).mean() == pytest.approx(0.1, abs=0.03)


def test_sides_by_column():
    assert parse_split_column(["train", "Test", "validation", "dev"], "split").tolist() == [False, True, True, True]
    with pytest.raises(InputError, match=r"column=part=None: names no split \(train or test\), in 2 rows"):
        parse_split_column(["train", None, None], "part")
    with pytest.raises(InputError, match="names no split"):
        parse_split_column(["holdout"], "part")


@pytest.mark.parametrize(
    ("time", "later"),
    [
        ("2026-11-01", True),
        ("20261101", True),
        ("2026-10-31T23:59:59Z", False),
        ("2026-11-01T00:30:00+01:00", False),
        ("1793491200", True),
        ("1793491200000", True),
        ("1793491199", False),
        ("2026-11-01 00:00:00", True),
    ],
)
def test_sides_by_time(time: str, later: bool):
    assert is_written_since([time], "2026-11-01", "created_at").tolist() == [later]


@pytest.mark.parametrize("time", ["", "yesterday", "nan", "2026-13-01", "2024", "7", "1e300"])
def test_a_row_without_a_time(time: str | None):
    with pytest.raises(InputError, match="is no time"):
        is_written_since([time], "2026-11-01", "created_at")
    with pytest.raises(InputError, match="is a column that no row has"):
        is_written_since([None], "2026-11-01", "created_at")
