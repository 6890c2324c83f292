"""Near-duplicates against sets of strings that are gone through one by one."""

from __future__ import annotations

import time
import tracemalloc
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.dedup import near_duplicates as near
from align.data.dedup.near_duplicates import Duplicates, find_exact, list_groups_with_equal_bands, split_into_packs
from align.data.dedup.shingles import (
    ShingleRarity,
    Shingles,
    build_shingles,
    compute_band_keys,
    digest_normalised_texts,
)

START = "the quick brown fox jumps over the lazy dog while a small grey cat looks on from the old stone wall"
SENTENCE = START.split()


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def found(texts, order=None, threshold=0.7, bands=32, rows=4, **how) -> Duplicates:
    array = pa.array(texts, pa.string())
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets, bands, rows).T)

    def read(indexes: np.ndarray) -> Shingles:
        assert (np.diff(indexes) > 0).all()
        return build_shingles(array.take(pa.array(indexes)))

    order = np.arange(len(texts)) if order is None else np.asarray(order)
    return near.find_near(order, sets.sizes, columns.__getitem__, read, threshold, bands, **how)


def one_by_one(texts, order, threshold, bands, rows, may=lambda a, b: True) -> list[tuple[int, int, float]]:
    """What must be found: every document is compared with every earlier one that is kept and has a key of its."""
    keys = [
        [*zip(range(bands), row, strict=True)]
        for row in compute_band_keys(build_shingles(pa.array(texts)), bands, rows).tolist()
    ]
    sets = [runs_of(text) for text in texts]
    kept: list[int] = []
    gone = []
    for i in sorted(range(len(texts)), key=lambda i: (order[i], i)):
        for k in kept:
            similarity = len(sets[i] & sets[k]) / max(len(sets[i] | sets[k]), 1)
            if similarity >= threshold and set(keys[i]) & set(keys[k]) and may(i, k):
                gone.append((i, k, similarity))
                break
        else:
            kept.append(i)
    return gone


def rows_of(pairs: Duplicates) -> list[tuple[int, int, float]]:
    return list(zip(pairs.dropped.tolist(), pairs.kept.tolist(), pairs.jaccard.tolist(), strict=True))


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Texts that are cut out of few others and changed a little, so that chains and groups of alike ones are common."""
    seeds = draw(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=0, max_size=14), min_size=1, max_size=4))
    made = []
    for _ in range(draw(st.integers(1, 40))):
        words = list(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(words)))
            words[at : at + draw(st.integers(0, 2))] = draw(st.lists(st.sampled_from("abcxyz"), max_size=2))
        made.append(" ".join(words))
    return made


SMALL = {
    "as they are": {},
    "rare shingles": {(near, "LARGE_GROUP"): 1, (near, "RARITY_SAMPLE"): 2},
    "a block each": {(near, "BLOCK"): 1},
    "blocks of three": {(near, "BLOCK"): 3, (near, "LARGE_GROUP"): 3, (near, "BLOCK_SHINGLES"): 20},
    "few pairs": {(near, "FEW_PAIRS"): 1, (near, "BLOCK_PAIRS"): 2},
    "few pairs, rare shingles": {(near, "FEW_PAIRS"): 2, (near, "BLOCK_PAIRS"): 5, (near, "LARGE_GROUP"): 1},
    "sketches": {(near, "SKETCHED_GROUP"): 1},
    "runs that stay apart": {(near, "MAX_MERGED_RUN"): 1, (near, "BLOCK"): 2},
    "runs that stay apart, rare shingles": {(near, "MAX_MERGED_RUN"): 2, (near, "BLOCK"): 2, (near, "LARGE_GROUP"): 1},
}  # fmt: skip
"""Sizes that make small corpora take the ways of huge ones."""


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
@settings(max_examples=150, deadline=None)
@given(corpora(), st.data())
def test_as_one_by_one(sizes, texts, data):
    order = data.draw(st.permutations(range(len(texts))))
    threshold = data.draw(st.sampled_from([0.3, 0.5, 2 / 3, 0.7, 0.8, 1.0]))
    bands, rows = data.draw(st.sampled_from([(32, 4), (4, 2), (1, 1), (2, 4)]))
    sources = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts))))
    how, may = data.draw(st.sampled_from([
        ({}, lambda a, b: True),
        ({"sources": sources}, lambda a, b: sources[a] == sources[b]),
        ({"sources": sources, "across": True}, lambda a, b: sources[a] != sources[b]),
    ]))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in sizes.items():
            patch.setattr(module, name, size)
        assert rows_of(found(texts, order, threshold, bands, rows, **how)) == one_by_one(
            texts, order, threshold, bands, rows, may
        )


@pytest.mark.parametrize("count", [1, 2, 5])
@settings(max_examples=150, deadline=None)
@given(corpora(), st.data())
def test_packs_give_what_all_give_together(count, texts, data):
    order = np.array(data.draw(st.permutations(range(len(texts)))))
    threshold = data.draw(st.sampled_from([0.3, 0.5, 0.7]))
    sets = build_shingles(pa.array(texts))
    columns = np.ascontiguousarray(compute_band_keys(sets).T)
    groups = list_groups_with_equal_bands(
        np.arange(len(texts), dtype=np.int32), sets.sizes > 0, columns.__getitem__, 32
    )
    made, gone = split_into_packs(groups, sets.sizes, count), []
    assert len(made) <= count
    assert sorted(i for pack in made for i in pack) == sorted({*groups.members.tolist()})  # each in one
    for pack in made:
        for i, k, similarity in rows_of(found([texts[i] for i in pack], order[pack], threshold)):
            gone.append((int(pack[i]), int(pack[k]), similarity))
    assert sorted(gone) == sorted(rows_of(found(texts, order, threshold)))


@pytest.mark.parametrize(
    ("large", "block", "bands"),
    [(64, 1024, 32), (4, 64, 32), (4, 64, 2), (8, 64, 32), (8, 64, 2)],
)
def test_as_one_by_one_on_a_larger_corpus(monkeypatch, large: int, block: int, bands: int):
    monkeypatch.setattr(near, "LARGE_GROUP", large)
    monkeypatch.setattr(near, "BLOCK", block)
    monkeypatch.setattr(near, "FEW_PAIRS", 100)
    rng = np.random.default_rng(3)
    seeds = [rng.integers(0, 30, rng.integers(0, 40)) for _ in range(12)]
    texts = []
    for _ in range(900):
        words = seeds[rng.integers(len(seeds))].copy()
        words[rng.random(len(words)) < rng.choice([0.0, 0.03, 0.1, 0.3])] = rng.integers(0, 30)
        texts.append(" ".join(f"w{word}" for word in words))
    order = rng.permutation(len(texts))
    expected = one_by_one(texts, order, 0.7, bands, 4)
    assert 300 < len(expected) < 800
    assert rows_of(found(texts, order, bands=bands)) == expected


def test_a_chain_loses_its_middle_alone():
    words = [f"w{i}" for i in range(22)]
    a, b, c = (" ".join(words[i : i + 18]) for i in (0, 2, 4))  # 16 shingles, 14 in common: 14 / 18; a and c 12 / 20
    assert rows_of(found([a, b, c])) == [(1, 0, 14 / 18)]
    assert rows_of(found([a, b, c], order=[2, 0, 1])) == [(2, 1, 14 / 18), (0, 1, 14 / 18)]  # b first: both go


def test_the_first_kept_twin_is_named_though_another_one_is_more_alike():
    words = [f"w{i}" for i in range(40)]
    first, nearer, last = " ".join(words), " ".join([*words[:31], *"abcdefghi"]), " ".join([*words[:34], *"abcdef"])
    twin = found([first, nearer, last])
    assert twin.dropped.tolist() == [2]
    assert twin.kept.tolist() == [0]


def test_the_most_preferred_document_counts_in_its_groups():
    """Two groups that differ in it alone are two; equal groups of two bands are one."""
    columns = np.array([[7, 8, 8], [9, 9, 9], [5, 5, 5]], np.uint64)
    groups = list_groups_with_equal_bands(np.arange(3, dtype=np.int32), np.ones(3, bool), columns.__getitem__, 3)
    assert groups.members.tolist() == [1, 2, 0, 1, 2]
    assert groups.sizes.tolist() == [2, 3]


def test_equal_ranks_go_by_index():
    assert rows_of(found(["a b c d"] * 3, order=[5, 5, 1])) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_texts_without_shingles_are_kept():
    assert rows_of(found(["", "a b", "", "a b", "a b c", "A, b; c!"])) == [(5, 4, 1.0)]
    assert rows_of(found(["", "one", ""])) == rows_of(found([])) == []


def test_input_in_another_order_gives_the_same():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(SENTENCE, 12)) for _ in range(30)]
    texts += [text.replace("the", "a", 1) for text in texts for _ in range(5)]
    order = rng.permutation(len(texts))
    expected = rows_of(found(texts, order))
    assert len(expected) > 50
    moved = rng.permutation(len(texts))
    again = found([texts[i] for i in moved], order[moved])
    assert list(zip(moved[again.dropped], moved[again.kept], again.jaccard, strict=True)) == expected


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "A ", "b", "", " ", "a b"]), max_size=12), st.booleans(), st.booleans(), st.data()
)
def test_exact_duplicates_as_one_by_one(texts, by_source, across, data):
    some = st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts))
    order, sources = np.array(data.draw(some), np.int64), np.array(data.draw(some), np.int64)
    kept, gone = [], []
    for i in sorted(range(len(texts)), key=lambda i: (order[i], i)):
        same = [k for k in kept if texts[k].lower().split() == texts[i].lower().split()]
        same = [k for k in same if not by_source or (sources[k] != sources[i]) == across]
        gone += [(i, same[0], 1.0)] if same else []
        kept += [] if same else [i]
    digests = digest_normalised_texts(pa.array(texts, pa.string()))
    assert rows_of(find_exact(digests, order, sources if by_source else None, across)) == gone


def templates(rows: int) -> dict[str, list[str]]:
    rng = np.random.default_rng(0)
    draws, rare = rng.integers(0, 5000, (rows, 14)), rng.integers(0, 10**12, (rows, 10))
    forty = " ".join(f"fixed{i}" for i in range(40))
    return {
        "equal": [START] * rows,
        "a number in it": [f"{START} and {i} mice" for i in range(rows)],
        "mostly a number": [f"order number {i} has shipped to the address that you gave" for i in range(rows)],
        "a prompt": [f"{START} {' '.join(f'w{word}' for word in draw)}" for draw in draws],
        "just under the threshold": [f"{forty} {' '.join(f'w{word}' for word in words)}" for words in rare],
    }


KEPT = {"equal": 1, "a number in it": None, "mostly a number": None, "a prompt": None, "just under the threshold": None}


@pytest.mark.parametrize(("name", "kept"), KEPT.items())
def test_huge_groups(name: str, kept: int | None):
    """Rows of one template cost little more time and memory than others, whether they are twins or not."""
    rows = 50_000
    array = pa.array(templates(rows)[name])
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)

    def read(indexes: np.ndarray) -> Shingles:
        return build_shingles(array.take(pa.array(indexes)))

    content = np.random.default_rng(1).integers(0, 1 << 63, rows).astype(np.uint64)
    began = time.process_time()
    made = near.find_near(np.arange(rows), sets.sizes, columns.__getitem__, read, content=content)
    took = time.process_time() - began
    assert len(made.dropped) == (rows - kept if kept else 0)
    assert took < 15
    few = rows // 10
    tracemalloc.start()
    near.find_near(np.arange(few), sets.sizes[:few], lambda b: columns[b, :few], read, content=content[:few])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 30), max_size=12), min_size=1, max_size=12),
    st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
)
def test_alike_sets_have_a_rare_shingle_in_common(sets, threshold):
    """Whatever sample says what is rare."""
    hashed = [sorted((x * 0x9E3779B97F4A7C15) % (1 << 54) for x in one) for one in sets]
    given = Shingles(
        np.array([x for one in hashed for x in one], np.uint64), np.append(0, np.cumsum([len(one) for one in sets]))
    )
    rarity = ShingleRarity()
    rarity.add(Shingles(given.values[: len(given.values) // 2], given.offsets[:1]))
    marks, owners = rarity.select_marks(given, threshold)
    of = [set(marks[owners == i].tolist()) for i in range(len(sets))]
    for (a, marks_a), (b, marks_b) in product(zip(sets, of, strict=True), repeat=2):
        if a and b and len(a & b) / len(a | b) >= threshold:
            assert marks_a & marks_b
    assert all(
        len(one) == (len(s) - int(np.ceil(threshold * len(s) - 1e-9)) + 1 if s else 0)
        for s, one in zip(sets, of, strict=True)
    )
