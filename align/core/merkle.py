"""A Merkle tree over a sequence of leaves, without I/O: its root changes with any leaf, their order and their number.

Hashes are SHA-256. A byte in front tells leaves and nodes apart (RFC 9162, section 2.1.1), so that no leaf can pass for
a node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

LEAF = b"\x00"
NODE = b"\x01"
EMPTY = hashlib.sha256(b"").digest()
"""The root of a tree without leaves."""


class MerkleTree:
    """A Merkle tree to which leaves are added one by one. Memory grows with the logarithm of their number."""

    def __init__(self) -> None:
        self.size = 0
        self._full: list[bytes] = []  # roots of full subtrees, the largest first: one for each 1 bit of `size`

    def add(self, leaf: bytes) -> None:
        self.extend((leaf,))

    def extend(self, leaves: Iterable[bytes]) -> None:
        """Append leaves to the tree in their order."""
        sha256 = hashlib.sha256  # local names, because there are millions of leaves
        full = self._full
        count = self.size
        for leaf in leaves:
            node = sha256(LEAF + leaf).digest()
            size = count
            while size & 1:  # as adding 1 to a binary number carries
                node = sha256(NODE + full.pop() + node).digest()
                size >>= 1
            full.append(node)
            count += 1
        self.size = count

    def root(self) -> str:
        """Return the Merkle root of the leaves added so far, 64 hex digits."""
        if not self._full:
            return EMPTY.hex()
        *larger, node = self._full
        for left_root in reversed(larger):
            node = hashlib.sha256(NODE + left_root + node).digest()
        return node.hex()


def compute_root(leaves: Iterable[bytes]) -> str:
    """Return the Merkle root of a sequence of leaves, 64 hex digits."""
    tree = MerkleTree()
    tree.extend(leaves)
    return tree.root()


def build_inclusion_proof(leaves: Sequence[bytes], leaf_index: int) -> list[bytes]:
    """Return a leaf's inclusion proof: the roots of the sibling subtrees on its way up to the root, the lowest first.

    Source: RFC 9162, section 2.1.3.1.

    Args:
        leaf_index: index of the leaf, from 0.

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= leaf_index < len(leaves):
        raise ValueError(f"there is no leaf {leaf_index} among {len(leaves)}")
    if len(leaves) == 1:
        return []
    middle = 1 << (len(leaves) - 1).bit_length() - 1
    first_half = leaves[:middle]
    second_half = leaves[middle:]
    if leaf_index < middle:
        return [*build_inclusion_proof(first_half, leaf_index), bytes.fromhex(compute_root(second_half))]
    return [*build_inclusion_proof(second_half, leaf_index - middle), bytes.fromhex(compute_root(first_half))]


def compute_proof_root(leaf: bytes, leaf_index: int, leaf_count: int, path: Sequence[bytes]) -> str | None:
    """Compute the Merkle root from a leaf and its inclusion proof, or return None if the proof has a wrong length.

    The root has 64 hex digits. The proof holds if it is the tree's root. Returns None also if the tree has no such
    leaf. Source: RFC 9162, section 2.1.3.2.

    Args:
        leaf_index: index of the leaf, from 0.
        leaf_count: number of leaves of the tree.
        path: the proof, see `build_inclusion_proof`.
    """
    if not 0 <= leaf_index < leaf_count:
        return None
    node = hashlib.sha256(LEAF + leaf).digest()
    last = leaf_count - 1
    siblings = iter(path)
    while last:
        if leaf_index & 1 or leaf_index < last:  # the last node of an odd number goes up as it is
            if (sibling := next(siblings, None)) is None:
                return None
            node = hashlib.sha256(NODE + (sibling + node if leaf_index & 1 else node + sibling)).digest()
        leaf_index >>= 1
        last >>= 1
    return node.hex() if next(siblings, None) is None else None
