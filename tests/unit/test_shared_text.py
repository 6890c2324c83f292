"""Near-duplicates in sets that share text, against a plain implementation over sets of strings and all pairs."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.dedup import near_duplicates as near
from align.data.dedup.near_duplicates import Duplicates, hash_sets, list_groups_with_equal_bands, split_into_packs
from align.data.dedup.numbers import extract_numbers_and_operators, hash_numbers
from align.data.dedup.shingles import Shingles, build_shingles, compute_band_keys, digest_normalised_texts

BANDS = 32
VOCABULARY = [
    a + b + c for a in ("ka", "lo", "mi", "ru", "te") for b in ("bo", "len", "mar", "ti") for c in ("r", "s", "n", "")
]
INSTRUCTION = (
    " ".join(f"instr{word}" for word in "abcdefghijklmnopqrstuvwxyz" for _ in range(2)) + " then do as told here"
)


@cache
def collect_grams(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2))


def compute_content_keys(texts: Sequence[str]) -> np.ndarray:
    return digest_normalised_texts(pa.array(texts, pa.string())).view(np.uint64)[::2].copy()


def find_near_duplicates(
    texts: Sequence[str], order: Sequence[int] | None = None, threshold: float = 0.7, **options
) -> Duplicates:
    array = pa.array(texts, pa.string())
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)
    return near.find_near(
        np.arange(len(texts)) if order is None else np.asarray(order),
        sets.sizes,
        columns.__getitem__,
        lambda rows: build_shingles(array.take(pa.array(rows))),
        threshold,
        numbers=hash_numbers(array),
        content=compute_content_keys(texts),
        **options,
    )


def find_shared_by_force(
    texts: Sequence[str], keys: list[list[int]], min_group: int, sample_size: int
) -> set[tuple[str, ...]]:
    """Return the shared shingles, computed by dictionaries."""
    content = compute_content_keys(texts).tolist()
    groups = {
        frozenset(i for i in range(len(texts)) if collect_grams(texts[i]) and keys[i][band] == key)
        for band in range(BANDS)
        for key in {row[band] for row in keys}
    }
    large = [group for group in groups if len(group) >= min_group]
    shared = set[tuple[str, ...]]()
    for group in large:
        same_class = [other_group for other_group in large if len(other_group).bit_length() == len(group).bit_length()]
        counts = any(
            len(group) == max(len(other_group) for other_group in same_class if member in other_group)
            for member in group
        )
        if not counts:
            continue
        ranked = sorted(group, key=lambda i: content[i])
        if len(ranked) > sample_size:
            ranked = [i for i in ranked if content[i] <= content[ranked[sample_size - 1]]]
        for shingle in set().union(*(collect_grams(texts[i]) for i in ranked)):
            if 2 * sum(shingle in collect_grams(texts[i]) for i in ranked) >= len(ranked):
                shared.add(shingle)
    return shared


def are_twins(a: str, b: str, shared: set[tuple[str, ...]], threshold: float, min_own: int) -> bool:
    a_grams = collect_grams(a)
    b_grams = collect_grams(b)
    common = a_grams & b_grams
    if extract_numbers_and_operators(a) != extract_numbers_and_operators(b) or len(common) < threshold * len(
        a_grams | b_grams
    ):
        return False
    if len(common & shared) * 2 <= len(common):
        return True
    if len(a_grams - (common & shared)) < min_own or len(b_grams - (common & shared)) < min_own:
        return a_grams == b_grams
    return len(common - shared) >= threshold * len((a_grams | b_grams) - (common & shared))


def find_by_force(
    texts: Sequence[str], order: Sequence[int], threshold: float, min_group: int, sample_size: int, min_own: int
) -> list[tuple[int, int]]:
    keys = compute_band_keys(build_shingles(pa.array(texts, pa.string()))).tolist()
    shared = find_shared_by_force(texts, keys, min_group, sample_size)
    kept_rows = list[int]()
    dropped_rows = list[tuple[int, int]]()
    for i in sorted(range(len(texts)), key=lambda i: (order[i], i)):
        for k in kept_rows:
            meet = any(x == y for x, y in zip(keys[i], keys[k], strict=True)) and bool(collect_grams(texts[i]))
            if meet and are_twins(texts[i], texts[k], shared, threshold, min_own):
                dropped_rows.append((i, k))
                break
        else:
            kept_rows.append(i)
    return dropped_rows


@st.composite
def draw_templated(draw: st.DrawFn) -> list[str]:
    """Draw rows of nested templates with other words added, copies with small changes, and numbers."""
    preamble = draw(st.lists(st.sampled_from("abcdefgh"), max_size=8))
    templates = [preamble + draw(st.lists(st.sampled_from("ijklmnop"), max_size=14)) for _ in range(2)]
    rows = list[list[str]]()
    for _ in range(draw(st.integers(1, 16))):
        row = (
            list(draw(st.sampled_from(rows)))
            if rows and draw(st.booleans())
            else [*draw(st.sampled_from(templates)), *draw(st.lists(st.sampled_from("qrstuv"), max_size=6))]
        )
        for _ in range(draw(st.integers(0, 1))):
            place = draw(st.integers(0, len(row)))
            row[place : place + draw(st.integers(0, 1))] = draw(
                st.sampled_from([["x"], ["3"], ["Y", "z"], ["4,"], ["+"]])
            )
        rows.append(row)
    return [" ".join(row) for row in rows]


SMALL = {
    "as they are": {},
    "rare shingles": {(near, "LARGE_GROUP"): 1, (near, "RARITY_SAMPLE"): 2},
    "small blocks": {
        (near, "LARGE_GROUP"): 2,
        (near, "BLOCK"): 3,
        (near, "FEW_PAIRS"): 2,
        (near, "BLOCK_SHINGLES"): 20,
    },
    "few groups together": {(near, "BLOCK_GROUPS"): 1, (near, "BLOCK_SHINGLES"): 5, (near, "LARGE_GROUP"): 1},
}
"""Sizes that make small sets take the code paths of large ones."""


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
@settings(max_examples=60)
@given(draw_templated(), st.data())
def test_as_all_pairs_say(sizes, texts, data):
    order = data.draw(st.permutations(range(len(texts))))
    threshold = data.draw(st.sampled_from([0.3, 0.5, 0.7, 0.8]))
    min_group, sample_size, min_own = (
        data.draw(st.sampled_from(choices)) for choices in ((2, 4, 7), (2, 5, 64), (1, 4, 9))
    )
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), size in sizes.items():
            patch.setattr(module, name, size)
        patch.setattr(near, "MIN_SHARED_GROUP", min_group)
        patch.setattr(near, "SAMPLE_SIZE", sample_size)
        patch.setattr(near, "MIN_OWN_SHINGLES", min_own)
        duplicates = find_near_duplicates(texts, order, threshold)
    expected = find_by_force(texts, order, threshold, min_group, sample_size, min_own)
    assert list(zip(duplicates.dropped.tolist(), duplicates.kept.tolist(), strict=True)) == expected


def draw_instructed(rows: int, words: int, draw: random.Random) -> list[str]:
    return [f"{INSTRUCTION} {' '.join(draw.choices(VOCABULARY, k=words))}" for _ in range(rows)]


def change_copy(text: str, first_own: int, share: float, draw: random.Random) -> str:
    """Copy a text with other case, spacing and punctuation, and a share of the words after `first_own` replaced."""
    words = text.split()
    for place in draw.sample(range(first_own, len(words)), int(share * (len(words) - first_own))):
        words[place] = draw.choice([f"other{i}" for i in "abcdefghij"])
    for place in draw.sample(range(len(words)), len(words) // 8):
        words[place] = draw.choice((str.upper, str.title, "{},".format, "{}!".format, " {}".format))(words[place])
    return " ".join(words)


@pytest.mark.parametrize("words", [30, 45, 90])
def test_changed_copies_in_a_template_are_found(words: int):
    draw = random.Random(words)
    texts = draw_instructed(600, words, draw)
    planted = {len(texts) + i: i for i in range(200)}
    texts += [change_copy(texts[i], 57, draw.choice((0, 0.05)), draw) for i in planted.values()]
    duplicates = find_near_duplicates(texts)
    pairs = dict(zip(duplicates.dropped.tolist(), duplicates.kept.tolist(), strict=True))
    right = sum(planted.get(row) == kept for row, kept in pairs.items())
    assert right >= 0.95 * len(planted)
    assert right >= 0.99 * len(pairs)


@pytest.mark.parametrize(("own", "dropped"), [(8, 0), (20, 0), (30, 1)])
def test_short_rests_have_to_be_equal(own: int, dropped: int):
    """Rows that differ in the last word only are duplicates if they have enough words of their own."""
    texts = draw_instructed(40, own, random.Random(own))
    assert len(find_near_duplicates([*texts, f"{texts[0].rpartition(' ')[0]} somethingelse"]).dropped) == dropped


@pytest.mark.parametrize("count", [2, 5])
def test_packs_with_the_shared_text_of_all_lose_the_same(count: int):
    draw = random.Random(11)
    texts = draw_instructed(60, 30, draw) + [f"{' '.join(draw.choices(VOCABULARY, k=40))}" for _ in range(40)]
    texts += [change_copy(text, 0, 0.04, draw) for text in texts[::4]]
    array = pa.array(texts)
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)

    def read(rows: np.ndarray) -> Shingles:
        return build_shingles(array.take(pa.array(rows)))

    places = np.arange(len(texts), dtype=np.int32)
    groups = list_groups_with_equal_bands(places, sets.sizes > 0, columns.__getitem__, BANDS)
    shared = near.find_shared_shingles(groups, places, sets.sizes, compute_content_keys(texts), read)
    assert len(shared) > 50
    numbers = hash_numbers(array)
    dropped = set[int]()
    for pack in split_into_packs(groups, sets.sizes, count):
        duplicates = near.find_near(
            pack,
            sets.sizes[pack],
            lambda band, pack=pack: columns[band][pack],
            lambda rows, pack=pack: read(pack[rows]),
            numbers=numbers[pack],
            shared=shared,
        )
        dropped |= set(pack[duplicates.dropped].tolist())
    assert dropped == set(find_near_duplicates(texts).dropped.tolist())
    assert len(dropped) >= 10


def test_words_anywhere_in_a_long_template_cost_little():
    """Comparing these 4,000 rows of 200 words, 6 % of them their own, pair by pair would take a minute."""
    draw = np.random.default_rng(0)
    template = np.array([f"fixed{i}" for i in range(200)])
    texts = [" ".join(np.where(draw.random(200) < 0.06, f"w{i}", template)) for i in range(4000)]
    start = time.process_time()
    assert len(find_near_duplicates(texts).dropped) == 0
    assert time.process_time() - start < 15


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True), min_size=1, max_size=8))
def test_whole_sets_have_one_mark_if_and_only_if_they_are_equal(sets):
    ordered = [sorted(values) for values in sets]
    marks = hash_sets(
        Shingles(
            np.array([x for values in ordered for x in values], np.uint64),
            np.append(0, np.cumsum([*map(len, ordered)])),
        )
    )
    for i, j in combinations(range(len(sets)), 2):
        assert (marks[i] == marks[j]) == (ordered[i] == ordered[j])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 3 + 5?", "3 + 5"),
        ("5-3 and x - y and a/b", "5 - 3 - /"),
        ("it is -3 here", "- 3"),
        ("covid-19, well-known, he/she, and - so on – or not", "19"),
        ("- 5 apples\n* 3 pears\n+ a plum\n> a quote", "5 3"),
        ("1,234.5 or 1234.5", "1234.5 1234.5"),
        ("3,5 or 3.5; version 1.2.3", "3.5 3.5 1 2 3"),
        ("1.000.000,5 and 1'000", "1000000.5 1000"),
        ("٣٫٥ and ４", "3.5 4"),
        ("x², 52, 5²", "² 52 5 ²"),
        ("5*-3 = 5 × −3", "5 * - 3 = 5 * - 3"),
        ("a != b, a == b", "! = = ="),
        ("true && false || x", "& & | |"),
        ("5% of 3 %", "5 % 3 %"),
        (".5 and ..5 and x.5", ".5 5 5"),
        ("====\n----\n**bold** | table |", ""),
        ("not three, plus four", ""),
    ],
)
def test_numbers_and_operators_by_hand(text: str, expected: str):
    assert " ".join(extract_numbers_and_operators(text)) == expected
    assert (hash_numbers(pa.array([text]))[0] != 0) == bool(expected)


def test_hashes_are_equal_where_numbers_and_operators_are():
    """This holds on both code paths: digits alone are hashed as they are, other texts token by token."""
    draw = random.Random(0)
    signs = "0123456789 ab.,'+-*/%&|()=<>^~!\n²≤’٣٫– "
    texts = ["".join(draw.choices(signs, k=draw.randint(0, 9))) for _ in range(60_000)]
    by_tokens = dict[tuple[str, ...], int]()
    by_hash = dict[int, tuple[str, ...]]()
    for text, digest in zip(texts, hash_numbers(pa.array(texts)).tolist(), strict=True):
        tokens = tuple(extract_numbers_and_operators(text))
        assert by_tokens.setdefault(tokens, digest) == digest, text
        assert by_hash.setdefault(digest, tokens) == tokens, text
    assert by_hash[0] == ()
    assert len(by_hash) > 10_000
