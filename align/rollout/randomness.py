"""Randomness as a function of the place where it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch


def place_seed(*where: Any) -> int:
    """63 bits that belong to one place, such as `(seed, "rollout", update, row)`."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big") >> 1


def generator_for(device: torch.device, seed: int, *where: str | int) -> torch.Generator:
    """A generator for one place in a run, such as `(seed, "minibatches", update)`."""
    return torch.Generator(device).manual_seed(place_seed(seed, *where))


def row_seeds(rows: Iterable[Any], seed: int, *where: str | int) -> list[int]:
    """A seed for each row that is sampled at one place in a run. What a row draws depends on its own seed, and so on no
    other row: not on how many are sampled, in which order, or in which process.

    Args:
        rows: what tells the rows of that place apart, such as their numbers.
    """
    return [place_seed(seed, *where, row) for row in rows]
