"""The order of rows: each once, similar lengths together, another order in each epoch and with each seed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from align.trainers.multi_rank import EpochSampler, build_epoch_order


def draw_lengths(rows: int) -> list[int]:
    return torch.randint(1, 500, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 50, 64, 999])
def test_every_row_is_read_once_an_epoch(rows: int, batch_size: int):
    assert sorted(build_epoch_order(draw_lengths(rows), batch_size, 0, 0)) == list(range(rows))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    lengths = draw_lengths(64)
    first = build_epoch_order(draw_lengths(64), 8, 0, 0)
    torch.randn(7)
    assert build_epoch_order(lengths, 8, 0, 0) == first
    other_orders = [
        build_epoch_order(lengths, 8, 0, 1),
        build_epoch_order(lengths, 8, 0, 2),
        build_epoch_order(lengths, 8, 1, 0),
    ]
    assert len({tuple(order) for order in (first, *other_orders)}) == 4


def test_the_batches_of_one_epoch_are_not_those_of_the_next():
    lengths = draw_lengths(64)
    epochs = [
        {frozenset(order[i : i + 8]) for i in range(0, 64, 8)}
        for order in (build_epoch_order(lengths, 8, 0, e) for e in (0, 1))
    ]
    assert not epochs[0] & epochs[1]


def test_rows_of_a_batch_have_like_lengths_and_the_longest_comes_first():
    lengths = draw_lengths(1000)
    order = build_epoch_order(lengths, 10, 0, 0)
    batches = [[lengths[i] for i in order[n : n + 10]] for n in range(0, 1000, 10)]
    computed = sum(10 * max(batch) for batch in batches)
    assert sum(lengths) < computed < 1.1 * sum(lengths)  # in a random order: 1.8
    assert max(batches[0]) == max(lengths)
    means = torch.tensor([sum(batch) / 10 for batch in batches[1:]])
    r = torch.corrcoef(torch.stack([means, torch.arange(99.0)]))[0, 1]
    assert abs(float(r)) < 0.3  # long and short batches are in random order


def test_rows_that_fill_no_batch_come_last_and_are_of_any_length():
    lengths = list(range(1, 104))
    last_lengths = [lengths[i] for epoch in range(200) for i in build_epoch_order(lengths, 10, 0, epoch)[100:]]
    assert len(last_lengths) == 600
    assert abs(sum(last_lengths) / 600 - 52) < 4 * 30 / 600**0.5


def test_the_sampler_reads_the_epoch_that_it_was_told():
    lengths = draw_lengths(30)
    sampler = EpochSampler(lengths, 4, 5)
    assert len(sampler) == 30
    assert list(sampler) == list(sampler) == build_epoch_order(lengths, 4, 5, 0)
    sampler.set_epoch(3)
    assert list(islice(sampler, 12)) == build_epoch_order(lengths, 4, 5, 3)[:12]
