"""The tree's roots, against hashes written out by hand and a definition by recursion."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.merkle import Tree, root_of


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def by_recursion(leaves: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written there."""
    if not leaves:
        return sha(b"")
    if len(leaves) == 1:
        return sha(b"\x00" + leaves[0])
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return sha(b"\x01" + by_recursion(leaves[:k]) + by_recursion(leaves[k:]))


def test_three_leaves_by_hand():
    a, b, c = (sha(b"\x00" + leaf) for leaf in (b"a", b"b", b"c"))
    assert root_of([b"a", b"b", b"c"]) == sha(b"\x01" + sha(b"\x01" + a + b) + c).hex()
    assert root_of([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.lists(st.binary(max_size=3), max_size=70))
def test_any_leaves(leaves: list[bytes]):
    assert root_of(leaves) == by_recursion(leaves).hex()


def test_memory_grows_with_the_logarithm():
    tree = Tree()
    for i in range(1000):
        tree.add(bytes([i % 251]))
    assert len(tree._full) == bin(1000).count("1")


@pytest.mark.parametrize("other", [[b"b", b"a"], [b"a"], [b"a", b"b", b"b"], [b"ab"], []])
def test_order_number_and_bounds_of_leaves_count(other: list[bytes]):
    assert root_of([b"a", b"b"]) != root_of(other)
