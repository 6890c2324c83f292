"""Proofs that a row is in a data set, for somebody who knows its root alone."""

from __future__ import annotations

from dataclasses import dataclass

from align.data.sets.published import DataSet, leaf
from align.data.sets.sides import SIDES
from align.merkle import path_of, root_of, root_through


@dataclass(frozen=True, slots=True)
class Proof:
    """Where a row is, and what its root is made with.

    Attributes:
        side: `train` or `test`.
        place: in the side's sequence, from 0.
        size: rows of the sequence, forgotten ones among them.
        path: see `align.merkle.path_of`.
        other: the root of the other side.
    """

    side: str
    place: int
    size: int
    path: tuple[bytes, ...]
    other: str


def proof_of(found: DataSet, side: str, content_id: bytes) -> Proof:
    """Return a proof that one side of a data set has a row: where it stands first, if it is repeated.

    Raises:
        ValueError: it has none.
    """
    leaves = found.leaves(side)
    place = leaves.index(leaf(content_id))
    [other] = (found.data["splits"][name]["root"] for name in SIDES if name != side)
    return Proof(side, place, len(leaves), tuple(path_of(leaves, place)), other)


def holds(proof: Proof, content_id: bytes, root: str) -> bool:
    """Whether a proof shows that the data set with this root has the row."""
    own = root_through(leaf(content_id), proof.place, proof.size, proof.path)
    if own is None or proof.side not in SIDES:
        return False
    return root_of(bytes.fromhex(own if side == proof.side else proof.other) for side in SIDES) == root
