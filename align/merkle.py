"""A Merkle tree over a sequence of leaves: one root that changes with any leaf, and with their order or number.

Hashes are SHA-256; leaves and nodes are told apart by a byte in front (RFC 9162, section 2.1.1), so that no leaf can
pass for a node. Pure: it knows no table and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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
        node, size = hashlib.sha256(LEAF + leaf).digest(), self.size
        while size & 1:  # as adding 1 to a binary number carries
            node = hashlib.sha256(NODE + self._full.pop() + node).digest()
            size >>= 1
        self._full.append(node)
        self.size += 1

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
    for leaf in leaves:
        tree.add(leaf)
    return tree.root()
