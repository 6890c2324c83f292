"""Words, shingles, digests and band keys, against plain implementations that follow their docstrings."""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from align.data.dedup import shingles
from align.data.dedup.shingles import (
    Shingles,
    build_shingles,
    compute_band_keys,
    compute_jaccard,
    digest_normalised_texts,
    hash_block_words,
    iter_byte_blocks,
)

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(
    st.sampled_from("aAbB7_ .,\0\n\t'’éÉßİ漢字かカไทय़ि́🙂❤️ﬁＡ\u200d𝔸𐐀"), max_size=40
)


def split_words(text: str) -> list[str]:
    """Split a text into words, character by character."""
    words = []
    before = ""  # kind of the previous character
    for c in unicodedata.normalize("NFKD", text).casefold():
        kind = "letter" if c.isalnum() else "mark" if unicodedata.category(c)[0] == "M" else ""
        if kind == "letter" and any(unicodedata.name(c, "").startswith(script) for script in UNSPACED):
            kind = "alone"
        if kind and not (kind == "mark" and (not before or "\ufe00" <= c <= "\ufe0f")):
            if kind == "mark" or (kind == before == "letter"):
                words[-1] += c
            else:
                words.append(c)
            before = before if kind == "mark" else kind
        else:
            before = ""
    return words


def collect_runs(text: str, width: int = 3) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def shingle_text(text: str, width: int = 3) -> Shingles:
    return build_shingles(pa.array([text]), width)


def have_same_shingles(a: str, b: str) -> bool:
    return bool(np.array_equal(shingle_text(a).values, shingle_text(b).values))


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("Hello,  World! Again", "hello world again"),
        ("«Hello»\u00a0– world… AGAIN 🙂", "hello world again"),
        ("hello_world\0again", "hello world again"),
        ("Ça coûte ÉNORMÉMENT cher", "c\u0327a cou\u0302te e\u0301norme\u0301ment cher"),
        ("ＡＢＣ １２ ﬁn", "abc 12 fin"),
        ("नमस्ते दुनिया फिर", "नमस्ते, दुनिया: फिर!"),
        ("1\ufe0f one ❤️ heart", "1 one heart"),
        ("𝔸𝔹 𐐀𐐁 x", "ab 𐐨𐐩 x"),
        ("ΟΔΟΣ straße aΣ", "οδος STRASSE aσ"),
        ("a猫b c", "a 猫 b c"),
        ("I love 猫と犬", "i love 猫 と 犬"),
    ],
)
def test_texts_of_the_same_words(text: str, like: str):
    assert len(shingle_text(text).values) >= 1
    assert have_same_shingles(text, like)


def test_fewer_words_than_a_run_have_no_shingles():
    sets = build_shingles(
        pa.array(["", "one", "one two", "one two three", None, "... !! 🙂🙂🙂", "a b c d", "b c d a b c d"])
    )
    assert sets.sizes.tolist() == [0, 0, 0, 1, 0, 0, 2, 4]
    assert build_shingles(pa.array(["a b c d"]), 2).sizes.tolist() == [3]
    assert len(build_shingles(pa.array([], pa.string()))) == 0


def test_a_characters_script_without_blanks():
    assert len(shingle_text("今日は").values) == 1
    assert len(shingle_text("ไทย").values) == 1
    assert have_same_shingles("กิขิคิ", "กิ ขิ คิ")
    assert not have_same_shingles("กิขิคิ", "กีขิคิ")  # another vowel
    assert have_same_shingles("မြန်မာစာ။", "မြန်မာစာ")  # a full stop is no letter
    assert len(shingle_text("привет").values) == 0


@settings(max_examples=400)
@given(st.lists(ANY_TEXT | st.none(), max_size=8))
@example(["a b c\0", "\0a b c", "a b c", "", "d"])
@example(["x", "y", "z"])
@example(["É", "a", "bc"])
def test_sets_are_those_of_the_runs_of_words(texts):
    """Hashes are equal exactly where strings are, in one document and over all."""
    strings = [collect_runs(text or "") for text in texts]
    sets = build_shingles(pa.array(texts, pa.string()))
    values = [sets.values[a:b].tolist() for a, b in zip(sets.offsets, sets.offsets[1:], strict=False)]
    assert [len(v) for v in values] == [len(s) for s in strings]
    assert all(v == sorted(set(v)) for v in values)
    assert len({x for v in values for x in v}) == len(set().union(*strings))
    for v, w in zip(values, strings, strict=True):
        for other_values, other_strings in zip(values, strings, strict=True):
            assert len(set(v) & set(other_values)) == len(w & other_strings)


@settings(max_examples=100)
@given(st.lists(ANY_TEXT, min_size=1, max_size=30), st.data())
def test_batches_types_and_slices_change_nothing(texts, data):
    expected = build_shingles(pa.array(texts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=4)))
    parts = [texts[a:b] for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
    for column in (
        pa.chunked_array([pa.array(part, pa.string()) for part in parts]),
        pa.array(texts, pa.large_string()),
        pa.array(["é before", *texts, "after"]).slice(1, len(texts)),
    ):
        sets = build_shingles(column)
        assert np.array_equal(sets.values, expected.values)
        assert np.array_equal(sets.offsets, expected.offsets)


def test_blocks_end_where_a_cache_is_full(monkeypatch):
    texts = ["a b c"] * 40 + ["d e f g" * 30] + ["", "h i j"]
    expected = build_shingles(pa.array(texts))
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 50)
    assert max(len(starts) - 1 for _, starts in iter_byte_blocks(pa.array(texts))) == 10
    assert np.array_equal(build_shingles(pa.array(texts)).values, expected.values)
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 1 << 19)
    assert [len(starts) - 1 for _, starts in iter_byte_blocks(pa.array(["a"] * 3000))] == [1024, 1024, 952]


def test_a_large_text_and_a_large_word():
    text = " ".join(str(i) for i in range(180_000))  # a megabyte
    assert len(shingle_text(text).values) == 180_000 - 2
    assert len(shingle_text("x" * 1_000_000 + " y z").values) == 1
    assert not have_same_shingles("x" * 1_000_000 + " y z", "x" * 999_999 + "w y z")


def test_no_two_words_of_many_have_one_hash():
    words = {f"{a}{b}" for a in ("", "x", "longer", "wordwithmany") for b in range(50_000)}
    hashes, counts = hash_block_words(*next(iter_byte_blocks(pa.array([" ".join(sorted(words))]))))
    assert counts.tolist() == [len(words)]
    assert len(set(hashes.tolist())) == len(words)


@settings(max_examples=300)
@given(st.lists(ANY_TEXT | st.text(" \t\n\x1c\x85aA", max_size=9) | st.none(), max_size=8))
@example(["a ", " b", "", "  ", "c  d", " "])
def test_digests_are_those_of_each_text(texts):
    def normalise(text: str) -> bytes:
        return " ".join(unicodedata.normalize("NFC", text).lower().split()).encode()

    expected = [blake2b(normalise(text or ""), digest_size=16).digest() for text in texts]
    assert [digest.tobytes() for digest in digest_normalised_texts(pa.array(texts, pa.string()))] == expected


def test_jaccard_by_hand():
    sets = Shingles(np.array([1, 2, 3, 2, 3, 4, 5, 9], np.uint64), np.array([0, 3, 7, 7, 8]))
    pairs = np.array([[0, 1], [0, 0], [0, 2], [2, 2], [1, 3], [3, 3]])
    similarities = compute_jaccard(sets, pairs[:, 0], sets, pairs[:, 1])
    assert similarities.tolist() == [2 / 5, 1, 0, 0, 0, 1]
    assert compute_jaccard(sets, pairs[:0, 0], sets, pairs[:0, 1]).tolist() == []


def test_jaccard_of_more_pairs_than_a_block():
    texts = [" ".join(f"w{i % 7}{j}" for j in range(i % 11)) for i in range(90)]
    sets = build_shingles(pa.array(texts))
    strings = [collect_runs(text) for text in texts]
    a, b = (side.ravel() for side in np.meshgrid(np.arange(90), np.arange(90)))
    expected = [len(strings[i] & strings[j]) / max(len(strings[i] | strings[j]), 1) for i, j in zip(a, b, strict=True)]
    assert compute_jaccard(sets, a, sets, b).tolist() == expected


def test_keys_are_shared_as_often_as_theory_says():
    """A share of J^4 of the pairs with similarity J has a given band's key in common."""
    rng = np.random.default_rng(0)
    # each pair's similarity J is 45 / 75 = 0.6
    pairs = 1500
    size = 60
    common = 45
    values = np.sort(rng.integers(0, 1 << 54, (pairs, 2 * size - common), np.uint64))
    rows = [rng.permutation(row) for row in values]
    first, second = (np.sort([row[side] for row in rows]) for side in (slice(size), slice(-size, None)))
    offsets = np.arange(pairs + 1) * size
    a, b = (compute_band_keys(Shingles(side.ravel(), offsets)) for side in (first, second))
    alike = compute_jaccard(
        Shingles(first.ravel(), offsets), np.arange(3), Shingles(second.ravel(), offsets), np.arange(3)
    )
    assert alike.tolist() == [0.6] * 3
    assert (a == b).mean() == pytest.approx(0.6**4, abs=0.006)  # 48,000 draws: three deviations
    assert (a == b).any(1).mean() == pytest.approx(1 - (1 - 0.6**4) ** 32, abs=0.01)
    by_pair = (a == b).sum(1)
    assert by_pair.var() == pytest.approx(32 * 0.6**4 * (1 - 0.6**4), rel=0.12)  # bands draw independently


def test_keys_are_those_of_the_document_alone():
    texts = ["", "a b c", "one two", "a b c d e f g", *(f"some text of number {i} with words" for i in range(5000))]
    keys = compute_band_keys(build_shingles(pa.array(texts)))
    assert keys.shape == (len(texts), 32)
    assert not keys[[0, 2]].any()
    for i in (1, 3, 4, 2000, 5003):
        assert np.array_equal(keys[i], compute_band_keys(build_shingles(pa.array([texts[i]])))[0])
    assert keys[1, 0] != keys[1, 1]
    assert len(set(keys[1].tolist())) == 32  # a band's number is in its key
    seeded_keys = compute_band_keys(build_shingles(pa.array(["a b c"])), bands=3, rows=2, seed=5)
    assert seeded_keys.shape == (1, 3)
    assert not np.array_equal(
        compute_band_keys(build_shingles(pa.array(["a b c"])), bands=3, rows=2)[0], seeded_keys[0]
    )


def test_hashes_stay_what_they_are():
    """Keys are stored on disk, so that a change of the hash would break stored keys."""
    sets = build_shingles(pa.array(["Hello there, wide world of words", "naïve 漢字 text"]))
    assert sets.values.tolist() == [
        815161791096939,
        3609044299101525,
        10074465364848625,
        16886342487835939,
        15038654059481430,
        16433562434971025,
    ]
    assert compute_band_keys(sets)[:, 0].tolist() == [16579160647541642079, 14285935519075193149]


@given(st.lists(ANY_TEXT, max_size=6), st.data())
def test_sets_outlive_a_column(texts, draw):
    """Any slice and any choice of rows of the column gives the sets of these documents."""
    sets = build_shingles(pa.array(texts, pa.string()))
    rows = draw.draw(st.lists(st.integers(0, len(texts) - 1), max_size=6)) if texts else []
    start = draw.draw(st.integers(0, len(texts)))
    column = sets.to_column()
    for column_part, expected_rows in (
        (column.slice(start), range(start, len(texts))),
        (column.take(pa.array(rows, pa.int64())), rows),
    ):
        restored = Shingles.from_column(column_part)
        assert [restored.values[a:b].tolist() for a, b in pairwise(restored.offsets)] == [
            sets.values[sets.offsets[i] : sets.offsets[i + 1]].tolist() for i in expected_rows
        ]
