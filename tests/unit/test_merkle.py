"""Roots and inclusion proofs of the Merkle tree, compared with hashes by hand and with a recursive definition."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.merkle import MerkleTree, build_inclusion_proof, compute_proof_root, compute_root


def compute_sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def compute_root_by_recursion(leaves: list[bytes]) -> bytes:
    """Compute the root as RFC 9162, section 2.1.1 defines it."""
    if not leaves:
        return compute_sha256(b"")
    if len(leaves) == 1:
        return compute_sha256(b"\x00" + leaves[0])
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return compute_sha256(b"\x01" + compute_root_by_recursion(leaves[:k]) + compute_root_by_recursion(leaves[k:]))


def test_three_leaves_by_hand():
    a, b, c = (compute_sha256(b"\x00" + leaf) for leaf in (b"a", b"b", b"c"))
    assert compute_root([b"a", b"b", b"c"]) == compute_sha256(b"\x01" + compute_sha256(b"\x01" + a + b) + c).hex()
    assert compute_root([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.lists(st.binary(max_size=3), max_size=70))
def test_any_leaves(leaves: list[bytes]):
    assert compute_root(leaves) == compute_root_by_recursion(leaves).hex()


def test_memory_grows_with_the_logarithm():
    tree = MerkleTree()
    for i in range(1000):
        tree.add(bytes([i % 251]))
    assert len(tree._full) == bin(1000).count("1")


def compute_path_by_recursion(index: int, leaves: list[bytes]) -> list[bytes]:
    """Compute the inclusion path as RFC 9162, section 2.1.3.1 defines it."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if index < k:
        return [*compute_path_by_recursion(index, leaves[:k]), compute_root_by_recursion(leaves[k:])]
    return [*compute_path_by_recursion(index - k, leaves[k:]), compute_root_by_recursion(leaves[:k])]


def verify_path_by_bits(leaf: bytes, index: int, size: int, path: list[bytes], root: str) -> bool:
    """Verify an inclusion path by the steps of RFC 9162, section 2.1.3.2."""
    if index >= size:
        return False
    fn = index
    sn = size - 1
    r = compute_sha256(b"\x00" + leaf)
    for p in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = compute_sha256(b"\x01" + p + r)
            if not fn & 1:
                while fn and not fn & 1:
                    fn = fn >> 1
                    sn = sn >> 1
        else:
            r = compute_sha256(b"\x01" + r + p)
        fn = fn >> 1
        sn = sn >> 1
    return sn == 0 and r.hex() == root


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=70), st.data())
def test_a_path_proves_its_leaf_and_no_other(leaves: list[bytes], data: st.DataObject):
    place = data.draw(st.integers(0, len(leaves) - 1))
    path = build_inclusion_proof(leaves, place)
    root = compute_root(leaves)
    assert path == compute_path_by_recursion(place, leaves)
    assert compute_proof_root(leaves[place], place, len(leaves), path) == root
    assert verify_path_by_bits(leaves[place], place, len(leaves), path, root)
    assert compute_proof_root(leaves[place] + b"x", place, len(leaves), path) != root
    assert compute_proof_root(leaves[place], place, len(leaves), [*path, compute_sha256(b"more")]) is None
    if path:
        assert compute_proof_root(leaves[place], place, len(leaves), path[:-1]) is None
        assert compute_proof_root(leaves[place], place, len(leaves), [*path[:-1], compute_sha256(b"other")]) != root


@given(
    st.integers(-1, 9),
    st.integers(0, 9),
    st.lists(st.sampled_from([compute_sha256(b"a"), compute_sha256(b"b")]), max_size=4),
)
def test_any_path_is_judged_as_the_standard_does(place: int, size: int, path: list[bytes]):
    root = compute_proof_root(b"leaf", place, size, path)
    if root is not None:
        assert verify_path_by_bits(b"leaf", place, size, path, root)
    else:  # the path is too long or too short, or the tree has no such leaf
        assert not 0 <= place < size or len(path) != len(compute_path_by_recursion(place, [b""] * size))


def test_a_leaf_that_is_not_there_has_no_path():
    for place in (-1, 2):
        with pytest.raises(ValueError, match="no leaf"):
            build_inclusion_proof([b"a", b"b"], place)
