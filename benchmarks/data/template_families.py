"""Measure the CPU seconds of `find_near` on rows of templates, whose pairs share keys and are near the threshold.

    python benchmarks/data/template_families.py [--rows 10000] [--families suffix20,spread6]

Texts and keys are computed before the clock starts. The last figure is the process's peak memory in MB so far,
including its texts.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from align.data.dedup.near_duplicates import find_near
from align.data.dedup.shingles import build_shingles, compute_band_keys, digest_normalised_texts

TEMPLATE_WORDS = [f"fixed{i}" for i in range(200)]


def draw_words(draw: np.random.Generator, count: int, vocabulary: int = 5000) -> list[str]:
    return [f"own{i}" for i in draw.integers(0, vocabulary, count)]


def generate_with_suffix(rows: int, draw: np.random.Generator, words: int, share: float) -> Iterator[list[str]]:
    """Yield rows in which a share of the words, at the end, is random."""
    count = max(round(words * share), 1)
    for _ in range(rows):
        yield TEMPLATE_WORDS[: words - count] + draw_words(draw, count)


def generate_with_spread_words(rows: int, draw: np.random.Generator, share: float) -> Iterator[list[str]]:
    """Yield rows of 200 words in which a share, at random positions, is random."""
    for _ in range(rows):
        is_random = draw.random(200) < share
        words = draw_words(draw, 200)
        yield [words[i] if is_random[i] else TEMPLATE_WORDS[i] for i in range(200)]


def generate_with_slots(
    rows: int, draw: np.random.Generator, words: int, slots: int, values: int
) -> Iterator[list[str]]:
    """Yield rows of one template with slots, each filled with one of so many values."""
    for _ in range(rows):
        row = TEMPLATE_WORDS[:words]
        for slot in range(slots):
            row[(slot + 1) * words // (slots + 1)] = f"slot{slot}x{draw.integers(values)}"
        yield row


def generate_lengths(rows: int, draw: np.random.Generator) -> Iterator[list[str]]:
    """Yield rows with templates of 5 to 199 words and random words behind them."""
    for _ in range(rows):
        words = int(draw.integers(5, 200))
        yield TEMPLATE_WORDS[:words] + draw_words(draw, max(int(words * 0.28), 1))


def generate_sentences(rows: int, draw: np.random.Generator, count: int, pool: int) -> Iterator[list[str]]:
    """Yield rows of some sentences of a pool, in random order."""
    sentences = [[f"sentence{j}word{i}" for i in range(160 // pool)] for j in range(pool)]
    for _ in range(rows):
        yield [word for j in draw.permutation(pool)[:count] for word in sentences[j]]


def generate_two_templates(rows: int, draw: np.random.Generator) -> Iterator[list[str]]:
    """Yield rows of two templates by turns, with ten random words each."""
    for i in range(rows):
        yield TEMPLATE_WORDS[60 * (i % 2) :][:40] + draw_words(draw, 10)


def generate_with_licence(rows: int, draw: np.random.Generator, share: float) -> Iterator[list[str]]:
    """Yield at most 1,000 documents of 30,000 words, some 200 kB, which begin with the same licence."""
    licence = [f"licence{i}" for i in range(int(30_000 * share))]
    for _ in range(min(rows, 1000)):
        yield licence + draw_words(draw, 30_000 - len(licence), 100_000)


FAMILIES: dict[str, Callable[[int, np.random.Generator], Iterator[list[str]]]] = {
    **{f"suffix{n}": partial(generate_with_suffix, words=50, share=n / 100) for n in (10, 20, 25, 45)},
    "suffix1": partial(generate_with_suffix, words=100, share=0.01),
    **{f"spread{n}": partial(generate_with_spread_words, share=n / 100) for n in (1, 3, 6, 8, 10)},
    "two": generate_two_templates,
    "lengths": generate_lengths,
    "slots3of200": partial(generate_with_slots, words=20, slots=3, values=200),
    "slots5of1000": partial(generate_with_slots, words=60, slots=5, values=1000),
    "order": partial(generate_sentences, count=20, pool=20),
    "sentences10of20": partial(generate_sentences, count=10, pool=20),
    "sentences8of40": partial(generate_sentences, count=8, pool=40),
    **{f"licence{n}": partial(generate_with_licence, share=n / 100) for n in (60, 80, 90)},
}


def measure_family(name: str, rows: int) -> None:
    """Print the CPU seconds of `find_near` on a family of rows."""
    texts = pa.array([" ".join(words) for words in FAMILIES[name](rows, np.random.default_rng(0))])
    sets = build_shingles(texts)
    keys = np.ascontiguousarray(compute_band_keys(sets).T)
    sizes = sets.sizes
    del sets
    start = time.process_time()
    content = digest_normalised_texts(texts).view(np.uint64)[::2].copy()
    duplicates = find_near(
        np.arange(len(texts)),
        sizes,
        keys.__getitem__,
        lambda indexes: build_shingles(texts.take(pa.array(indexes))),
        content=content,
    )
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{name:16} {len(texts):8,} rows {seconds:8.2f} s {len(duplicates.dropped):8,} dropped {peak:6} MB", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    for name in options.families.split(","):
        measure_family(name, options.rows)
    print(f"load {os.getloadavg()[0]:.1f}")
