"""Counter-based random numbers: the published vectors, and uniform numbers computed from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from align.ops.philox import draw_uniform_row, draw_uniforms, philox
from align.rollout.engine import derive_row_seeds

# Known answers of Random123 1.14 (Salmon et al.), philox4x32, 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def parse_words(text: str) -> tuple[Tensor, ...]:
    return tuple(tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_vectors(counter: str, key: str, expected: str):
    numbers = philox(parse_words(counter), parse_words(key))  # pyright: ignore[reportArgumentType]
    assert " ".join(f"{int(word):08x}" for word in numbers) == expected


def test_numbers_are_in_the_unit_interval_to_53_bits():
    """The expected number is put together by hand from the first words of a zero key and counter."""
    expected = ((0x6627E8D5 >> 6) * 2**27 + (0xE169C58D >> 5)) / 2**53
    numbers = draw_uniforms(tensor([0]), 3)
    assert numbers.dtype == torch.double
    assert float(numbers[0, 0]) == expected
    many_numbers = draw_uniforms(torch.arange(100_000), 10)
    assert 0 <= float(many_numbers.min()) < 1e-5
    assert 1 - 1e-5 < float(many_numbers.max()) < 1


def test_numbers_are_uniform_along_rows_and_across_them():
    numbers = draw_uniforms(tensor(derive_row_seeds(range(2000), 0, "here")), 500)
    counts = torch.histc(numbers.float(), 100, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 160  # chi-squared with 99 degrees: mean 99, deviation 14
    for first, second in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        r = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(float(r)) < 0.004  # four deviations of a million pairs


def test_a_number_depends_on_its_seed_and_column_alone():
    seeds = derive_row_seeds(range(8), 5, "rollout", 2)
    numbers = draw_uniforms(tensor(seeds), 20)
    assert torch.equal(draw_uniforms(tensor(seeds[3:4]), 7)[0], numbers[3, :7])
    for changed in ((5, "rollout", 3), (6, "rollout", 2), (5, "held_out", 2)):
        other_numbers = draw_uniforms(tensor(derive_row_seeds(range(8), *changed)), 20)
        assert not (other_numbers == numbers).any()
    assert derive_row_seeds([(1, 2)], 0) != derive_row_seeds([(2, 1)], 0)


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 - 1, -(2**63)])
def test_one_row_by_numpy_is_the_row_by_torch(seed: int):
    assert draw_uniform_row(seed, 300) == draw_uniforms(tensor([seed]), 300)[0].tolist()


def test_both_halves_of_a_seed_count():
    seeds = tensor([1, 1 + (1 << 32), -1, (1 << 62) + 1])
    assert len(draw_uniforms(seeds, 1).unique()) == 4
