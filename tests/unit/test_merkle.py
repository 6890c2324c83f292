"""The tree's roots, against hashes written out by hand and a definition by recursion."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core.merkle import MerkleTree, build_inclusion_proof, compute_proof_root, compute_root


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
    assert compute_root([b"a", b"b", b"c"]) == sha(b"\x01" + sha(b"\x01" + a + b) + c).hex()
    assert compute_root([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3), max_size=70))
def test_any_leaves(leaves: list[bytes]):
    assert compute_root(leaves) == by_recursion(leaves).hex()


def test_memory_grows_with_the_logarithm():
    tree = MerkleTree()
    for i in range(1000):
        tree.add(bytes([i % 251]))
    assert len(tree._full) == bin(1000).count("1")


def path_by_recursion(place: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 9162, section 2.1.3.1, as it is written there."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if place < k:
        return [*path_by_recursion(place, leaves[:k]), by_recursion(leaves[k:])]
    return [*path_by_recursion(place - k, leaves[k:]), by_recursion(leaves[:k])]


def checked_by_bits(leaf: bytes, place: int, size: int, path: list[bytes], root: str) -> bool:
    """RFC 9162, section 2.1.3.2, step by step as it is written there."""
    if place >= size:
        return False
    fn, sn, r = place, size - 1, sha(b"\x00" + leaf)
    for p in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = sha(b"\x01" + p + r)
            if not fn & 1:
                while fn and not fn & 1:
                    fn, sn = fn >> 1, sn >> 1
        else:
            r = sha(b"\x01" + r + p)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r.hex() == root


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3), min_size=1, max_size=70), st.data())
def test_a_path_proves_its_leaf_and_no_other(leaves: list[bytes], data: st.DataObject):
    place = data.draw(st.integers(0, len(leaves) - 1))
    path, root = build_inclusion_proof(leaves, place), compute_root(leaves)
    assert path == path_by_recursion(place, leaves)
    assert compute_proof_root(leaves[place], place, len(leaves), path) == root
    assert checked_by_bits(leaves[place], place, len(leaves), path, root)
    assert compute_proof_root(leaves[place] + b"x", place, len(leaves), path) != root
    assert compute_proof_root(leaves[place], place, len(leaves), [*path, sha(b"more")]) is None
    if path:
        assert compute_proof_root(leaves[place], place, len(leaves), path[:-1]) is None
        assert compute_proof_root(leaves[place], place, len(leaves), [*path[:-1], sha(b"other")]) != root


@settings(deadline=None)
@given(st.integers(-1, 9), st.integers(0, 9), st.lists(st.sampled_from([sha(b"a"), sha(b"b")]), max_size=4))
def test_any_path_is_judged_as_the_standard_does(place: int, size: int, path: list[bytes]):
    found = compute_proof_root(b"leaf", place, size, path)
    if found is not None:
        assert checked_by_bits(b"leaf", place, size, path, found)
    else:  # too long, too short, or of no leaf
        assert not 0 <= place < size or len(path) != len(path_by_recursion(place, [b""] * size))


def test_a_leaf_that_is_not_there_has_no_path():
    for place in (-1, 2):
        with pytest.raises(ValueError, match="no leaf"):
            build_inclusion_proof([b"a", b"b"], place)
