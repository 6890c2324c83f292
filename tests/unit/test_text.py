"""Text metrics equal counts done by hand."""

from __future__ import annotations

from align.data.ngrams import compute_repetition, tokenize_words
from align.evals.text import RisenWord, compute_distinct_n, find_most_risen_word


def test_words_are_lower_cased_and_bare():
    assert tokenize_words("Don't stop, ANNA! 3x über 猫 🙂") == ["don't", "stop", "anna", "3x", "über", "猫"]
    assert tokenize_words("... !") == []


def test_distinct_by_hand():
    texts = ["the cat the cat", "The dog"]
    assert compute_distinct_n(texts, 1) == 3 / 6  # the, cat, dog: three of six words
    assert compute_distinct_n(texts, 2) == 3 / 4  # (the cat), (cat the), (the dog): three of four bigrams
    assert compute_distinct_n(texts, 4) == 1
    # N-grams are pooled: one answer to every prompt is not diverse, even if its own words vary.
    assert compute_distinct_n(["a b c"] * 4, 1) == 0.25


def test_distinct_of_nothing():
    assert compute_distinct_n([], 1) == compute_distinct_n(["one"], 2) == compute_distinct_n(["!"], 1) == 0


def test_repetition_by_hand():
    # "a b a b a b": trigrams aba bab aba bab, two of four are new.
    assert compute_repetition(["a b a b a b"]) == 0.5
    assert compute_repetition(["a b c d", "a b c d"]) == 0  # within a text, not over texts
    assert compute_repetition(["a b a b a b", "a b c d", "too short"]) == 0.25
    assert compute_repetition([]) == 0


def test_the_word_that_rose_most_by_hand():
    ref = ["Haha yes", "no", "the end", "the dog"]
    policy = ["haha haha yes", "HAHA", "haha the", "yes yes"]
    assert find_most_risen_word(ref, policy) == RisenWord("haha", 0.25, 0.75)  # two uses in one text count once
    # A tie with `yes` goes by the alphabet.
    assert find_most_risen_word(ref, ["yes", "dog"]) == RisenWord("dog", 0.25, 0.5)
    assert find_most_risen_word(ref, ["no"]) == RisenWord("no", 0.25, 1.0)
    assert find_most_risen_word(["a b"], ["a"]) == RisenWord("", 0.0, 0.0)
