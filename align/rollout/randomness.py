"""Randomness as a function of the place where it is drawn."""

from __future__ import annotations

import hashlib

import torch


def generator_for(device: torch.device, seed: int, *where: str | int) -> torch.Generator:
    """A generator for one place in a run, such as `(seed, "rollout", update)`."""
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
