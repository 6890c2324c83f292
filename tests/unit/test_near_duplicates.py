"""Near-duplicates, compared with a search that goes through sets of strings one by one."""

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


def get_runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def find_duplicates(texts, order=None, threshold=0.7, bands=32, rows=4, **options) -> Duplicates:
    array = pa.array(texts, pa.string())
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets, bands, rows).T)

    def read(indexes: np.ndarray) -> Shingles:
        assert (np.diff(indexes) > 0).all()
        return build_shingles(array.take(pa.array(indexes)))

    order = np.arange(len(texts)) if order is None else np.asarray(order)
    return near.find_near(order, sets.sizes, columns.__getitem__, read, threshold, bands, **options)


def find_one_by_one(texts, order, threshold, bands, rows, is_allowed=lambda a, b: True) -> list[tuple[int, int, float]]:
    """List the expected duplicates: each document is compared with all kept documents that share a band key with it."""
    keys = [
        [*zip(range(bands), row, strict=True)]
        for row in compute_band_keys(build_shingles(pa.array(texts)), bands, rows).tolist()
    ]
    sets = [get_runs(text) for text in texts]
    kept: list[int] = []
    dropped = []
    for i in sorted(range(len(texts)), key=lambda i: (order[i], i)):
        for k in kept:
            similarity = len(sets[i] & sets[k]) / max(len(sets[i] | sets[k]), 1)
            if similarity >= threshold and set(keys[i]) & set(keys[k]) and is_allowed(i, k):
                dropped.append((i, k, similarity))
                break
        else:
            kept.append(i)
    return dropped


def list_rows(pairs: Duplicates) -> list[tuple[int, int, float]]:
    return list(zip(pairs.dropped.tolist(), pairs.kept.tolist(), pairs.jaccard.tolist(), strict=True))


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Draw slightly changed copies of a few texts, so that chains and groups of similar texts are common."""
    seeds = draw(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=0, max_size=14), min_size=1, max_size=4))
    texts = []
    for _ in range(draw(st.integers(1, 40))):
        words = list(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, 3))):
            position = draw(st.integers(0, len(words)))
            words[position : position + draw(st.integers(0, 2))] = draw(st.lists(st.sampled_from("abcxyz"), max_size=2))
        texts.append(" ".join(words))
    return texts


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
}
"""Limits that make small corpora take the code paths of huge ones."""


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
@settings(max_examples=150)
@given(corpora(), st.data())
def test_as_one_by_one(sizes, texts, data):
    order = data.draw(st.permutations(range(len(texts))))
    threshold = data.draw(st.sampled_from([0.3, 0.5, 2 / 3, 0.7, 0.8, 1.0]))
    bands, rows = data.draw(st.sampled_from([(32, 4), (4, 2), (1, 1), (2, 4)]))
    sources = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts))))
    options, is_allowed = data.draw(
        st.sampled_from(
            [
                ({}, lambda a, b: True),
                ({"sources": sources}, lambda a, b: sources[a] == sources[b]),
                ({"sources": sources, "only_across_sources": True}, lambda a, b: sources[a] != sources[b]),
            ]
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in sizes.items():
            patch.setattr(module, name, size)
        assert list_rows(find_duplicates(texts, order, threshold, bands, rows, **options)) == find_one_by_one(
            texts, order, threshold, bands, rows, is_allowed
        )


@pytest.mark.parametrize("count", [1, 2, 5])
@settings(max_examples=150)
@given(corpora(), st.data())
def test_packs_give_what_all_give_together(count, texts, data):
    order = np.array(data.draw(st.permutations(range(len(texts)))))
    threshold = data.draw(st.sampled_from([0.3, 0.5, 0.7]))
    sets = build_shingles(pa.array(texts))
    columns = np.ascontiguousarray(compute_band_keys(sets).T)
    groups = list_groups_with_equal_bands(
        np.arange(len(texts), dtype=np.int32), sets.sizes > 0, columns.__getitem__, 32
    )
    packs = split_into_packs(groups, sets.sizes, count)
    dropped = []
    assert len(packs) <= count
    assert sorted(i for pack in packs for i in pack) == sorted({*groups.members.tolist()})  # each in one
    for pack in packs:
        for i, k, similarity in list_rows(find_duplicates([texts[i] for i in pack], order[pack], threshold)):
            dropped.append((int(pack[i]), int(pack[k]), similarity))
    assert sorted(dropped) == sorted(list_rows(find_duplicates(texts, order, threshold)))


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
    expected = find_one_by_one(texts, order, 0.7, bands, 4)
    assert 300 < len(expected) < 800
    assert list_rows(find_duplicates(texts, order, bands=bands)) == expected


def test_a_chain_loses_its_middle_alone():
    words = [f"w{i}" for i in range(22)]
    a, b, c = (" ".join(words[i : i + 18]) for i in (0, 2, 4))  # 16 shingles, 14 in common: 14 / 18; a and c 12 / 20
    assert list_rows(find_duplicates([a, b, c])) == [(1, 0, 14 / 18)]
    # If b is first, both others are dropped.
    assert list_rows(find_duplicates([a, b, c], order=[2, 0, 1])) == [
        (2, 1, 14 / 18),
        (0, 1, 14 / 18),
    ]


def test_the_first_kept_twin_is_named_though_another_one_is_more_alike():
    words = [f"w{i}" for i in range(40)]
    first = " ".join(words)
    nearer = " ".join([*words[:31], *"abcdefghi"])
    last = " ".join([*words[:34], *"abcdef"])
    twin = find_duplicates([first, nearer, last])
    assert twin.dropped.tolist() == [2]
    assert twin.kept.tolist() == [0]


def test_the_most_preferred_document_counts_in_its_groups():
    """Two groups that differ only in that document are both listed. Equal groups of two bands are listed once."""
    columns = np.array([[7, 8, 8], [9, 9, 9], [5, 5, 5]], np.uint64)
    groups = list_groups_with_equal_bands(np.arange(3, dtype=np.int32), np.ones(3, bool), columns.__getitem__, 3)
    assert groups.members.tolist() == [1, 2, 0, 1, 2]
    assert groups.sizes.tolist() == [2, 3]


def test_equal_ranks_go_by_index():
    assert list_rows(find_duplicates(["a b c d"] * 3, order=[5, 5, 1])) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_texts_without_shingles_are_kept():
    assert list_rows(find_duplicates(["", "a b", "", "a b", "a b c", "A, b; c!"])) == [(5, 4, 1.0)]
    assert list_rows(find_duplicates(["", "one", ""])) == list_rows(find_duplicates([])) == []


def test_input_in_another_order_gives_the_same():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(SENTENCE, 12)) for _ in range(30)]
    texts += [text.replace("the", "a", 1) for text in texts for _ in range(5)]
    order = rng.permutation(len(texts))
    expected = list_rows(find_duplicates(texts, order))
    assert len(expected) > 50
    new_order = rng.permutation(len(texts))
    duplicates = find_duplicates([texts[i] for i in new_order], order[new_order])
    assert (
        list(zip(new_order[duplicates.dropped], new_order[duplicates.kept], duplicates.jaccard, strict=True))
        == expected
    )


@given(
    st.lists(st.sampled_from(["a", "A ", "b", "", " ", "a b"]), max_size=12), st.booleans(), st.booleans(), st.data()
)
def test_exact_duplicates_as_one_by_one(texts, by_source, across, data):
    numbers = st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts))
    order = np.array(data.draw(numbers), np.int64)
    sources = np.array(data.draw(numbers), np.int64)
    kept = []
    dropped = []
    for i in sorted(range(len(texts)), key=lambda i: (order[i], i)):
        twins = [k for k in kept if texts[k].lower().split() == texts[i].lower().split()]
        twins = [k for k in twins if not by_source or (sources[k] != sources[i]) == across]
        dropped += [(i, twins[0], 1.0)] if twins else []
        kept += [] if twins else [i]
    digests = digest_normalised_texts(pa.array(texts, pa.string()))
    assert list_rows(find_exact(digests, order, sources if by_source else None, across)) == dropped


def build_templates(rows: int) -> dict[str, list[str]]:
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 5000, (rows, 14))
    rare = rng.integers(0, 10**12, (rows, 10))
    forty_words = " ".join(f"fixed{i}" for i in range(40))
    return {
        "equal": [START] * rows,
        "a number in it": [f"{START} and {i} mice" for i in range(rows)],
        "mostly a number": [f"order number {i} has shipped to the address that you gave" for i in range(rows)],
        "a prompt": [f"{START} {' '.join(f'w{word}' for word in draw)}" for draw in draws],
        "just under the threshold": [f"{forty_words} {' '.join(f'w{word}' for word in words)}" for words in rare],
    }


KEPT = {"equal": 1, "a number in it": None, "mostly a number": None, "a prompt": None, "just under the threshold": None}


@pytest.mark.parametrize(("name", "kept"), KEPT.items())
def test_huge_groups(name: str, kept: int | None):
    """Rows of one template cost little more time and memory than others, duplicates or not."""
    rows = 50_000
    array = pa.array(build_templates(rows)[name])
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)

    def read(indexes: np.ndarray) -> Shingles:
        return build_shingles(array.take(pa.array(indexes)))

    content = np.random.default_rng(1).integers(0, 1 << 63, rows).astype(np.uint64)
    started = time.process_time()
    duplicates = near.find_near(np.arange(rows), sets.sizes, columns.__getitem__, read, content=content)
    seconds = time.process_time() - started
    assert len(duplicates.dropped) == (rows - kept if kept else 0)
    assert seconds < 15
    tenth = rows // 10
    tracemalloc.start()
    near.find_near(np.arange(tenth), sets.sizes[:tenth], lambda b: columns[b, :tenth], read, content=content[:tenth])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


@given(
    st.lists(st.sets(st.integers(0, 30), max_size=12), min_size=1, max_size=12),
    st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
)
def test_alike_sets_have_a_rare_shingle_in_common(sets, threshold):
    """The rarity is estimated from a sample of the shingles: the property holds for any sample."""
    hashed = [sorted((x * 0x9E3779B97F4A7C15) % (1 << 54) for x in members) for members in sets]
    shingles = Shingles(
        np.array([x for members in hashed for x in members], np.uint64),
        np.append(0, np.cumsum([len(members) for members in sets])),
    )
    rarity = ShingleRarity()
    rarity.add(Shingles(shingles.values[: len(shingles.values) // 2], shingles.offsets[:1]))
    marks, owners = rarity.select_marks(shingles, threshold)
    marks_by_set = [set(marks[owners == i].tolist()) for i in range(len(sets))]
    for (a, marks_a), (b, marks_b) in product(zip(sets, marks_by_set, strict=True), repeat=2):
        if a and b and len(a & b) / len(a | b) >= threshold:
            assert marks_a & marks_b
    assert all(
        len(members) == (len(s) - int(np.ceil(threshold * len(s) - 1e-9)) + 1 if s else 0)
        for s, members in zip(sets, marks_by_set, strict=True)
    )
