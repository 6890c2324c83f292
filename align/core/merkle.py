"""A Merkle tree over a sequence of leaves: one root that changes with any leaf, and with their order or number.

Hashes are SHA-256; leaves and nodes are told apart by a byte in front (RFC 9162, section 2.1.1), so that no leaf can
pass for a node. Pure: it knows no table and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

LEAF, NODE = b"\x00", b"\x01"
EMPTY = hashlib.sha256(b"").digest()
"""The root of no leaves."""


class Tree:
    """Leaves are added one by one; memory grows with the logarithm of their number."""

    def __init__(self) -> None:
        self.size = 0
        self._full: list[bytes] = []  # roots of full subtrees, the largest first: one for each 1 bit of `size`

    def add(self, leaf: bytes) -> None:
        """Append a leaf."""
        self.extend((leaf,))

    def extend(self, leaves: Iterable[bytes]) -> None:
        """Append leaves in their order."""
        sha256, full, count = hashlib.sha256, self._full, self.size  # there are millions of leaves
        for leaf in leaves:
            node, size = sha256(LEAF + leaf).digest(), count
            while size & 1:  # as adding 1 to a binary number carries
                node = sha256(NODE + full.pop() + node).digest()
                size >>= 1
            full.append(node)
            count += 1
        self.size = count

    def root(self) -> str:
        """The root of what was added so far, 64 hex digits."""
        if not self._full:
            return EMPTY.hex()
        *larger, node = self._full
        for left in reversed(larger):
            node = hashlib.sha256(NODE + left + node).digest()
        return node.hex()


def root_of(leaves: Iterable[bytes]) -> str:
    """The root of all these leaves, 64 hex digits."""
    tree = Tree()
    tree.extend(leaves)
    return tree.root()


def path_of(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """What proves that a leaf is in the tree: the roots of the subtrees beside its way up, the lowest first (RFC 9162,
    section 2.1.3.1).

    Args:
        place: of the leaf, from 0.

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= place < len(leaves):
        raise ValueError(f"there is no leaf {place} among {len(leaves)}")
    if len(leaves) == 1:
        return []
    middle = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = leaves[:middle], leaves[middle:]
    if place < middle:
        return [*path_of(left, place), bytes.fromhex(root_of(right))]
    return [*path_of(right, place - middle), bytes.fromhex(root_of(left))]


def root_through(leaf: bytes, place: int, size: int, path: Sequence[bytes]) -> str | None:
    """The root of a tree of so many leaves, of which one and its path are known (RFC 9162, section 2.1.3.2); None where
    the path is not one of such a leaf. A leaf is in a tree if this is the tree's root."""
    if not 0 <= place < size:
        return None
    node, last, above = hashlib.sha256(LEAF + leaf).digest(), size - 1, iter(path)
    while last:
        if place & 1 or place < last:  # the last one of an odd number goes up as it is
            if (beside := next(above, None)) is None:
                return None
            node = hashlib.sha256(NODE + (beside + node if place & 1 else node + beside)).digest()
        place, last = place >> 1, last >> 1
    return node.hex() if next(above, None) is None else None
