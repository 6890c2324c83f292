"""Near-duplicates of rows of templates, whose pairs share keys and are near the threshold: CPU seconds of `find_near`.

    python benchmarks/data/templates.py [--rows 10000] [--families suffix20,spread6]

Texts and keys are made before the clock starts. The last figure is the process's peak memory in MB so far, its texts
included.
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

FIXED = [f"fixed{i}" for i in range(200)]


def own(draw: np.random.Generator, many: int, of: int = 5000) -> list[str]:
    return [f"own{i}" for i in draw.integers(0, of, many)]


def suffix(rows: int, draw: np.random.Generator, words: int, share: float) -> Iterator[list[str]]:
    """Rows whose last words are their own."""
    many = max(round(words * share), 1)
    for _ in range(rows):
        yield FIXED[: words - many] + own(draw, many)


def spread(rows: int, draw: np.random.Generator, share: float) -> Iterator[list[str]]:
    """Rows of 200 words, of which some, anywhere, are their own."""
    for _ in range(rows):
        mine, words = draw.random(200) < share, own(draw, 200)
        yield [words[i] if mine[i] else FIXED[i] for i in range(200)]


def slots(rows: int, draw: np.random.Generator, words: int, many: int, values: int) -> Iterator[list[str]]:
    """Rows of one template with slots."""
    for _ in range(rows):
        row = FIXED[:words]
        for slot in range(many):
            row[(slot + 1) * words // (many + 1)] = f"slot{slot}x{draw.integers(values)}"
        yield row


def lengths(rows: int, draw: np.random.Generator) -> Iterator[list[str]]:
    for _ in range(rows):
        words = int(draw.integers(5, 200))
        yield FIXED[:words] + own(draw, max(int(words * 0.28), 1))


def sentences(rows: int, draw: np.random.Generator, many: int, pool: int) -> Iterator[list[str]]:
    """Some sentences of a pool, in any order."""
    said = [[f"sentence{j}word{i}" for i in range(160 // pool)] for j in range(pool)]
    for _ in range(rows):
        yield [word for j in draw.permutation(pool)[:many] for word in said[j]]


def two(rows: int, draw: np.random.Generator) -> Iterator[list[str]]:
    for i in range(rows):
        yield FIXED[60 * (i % 2) :][:40] + own(draw, 10)


def licence(rows: int, draw: np.random.Generator, share: float) -> Iterator[list[str]]:
    """At most 1,000 documents of 30,000 words, some 200 kB."""
    text = [f"licence{i}" for i in range(int(30_000 * share))]
    for _ in range(min(rows, 1000)):
        yield text + own(draw, 30_000 - len(text), 100_000)


FAMILIES: dict[str, Callable[[int, np.random.Generator], Iterator[list[str]]]] = {
    **{f"suffix{n}": partial(suffix, words=50, share=n / 100) for n in (10, 20, 25, 45)},
    "suffix1": partial(suffix, words=100, share=0.01),
    **{f"spread{n}": partial(spread, share=n / 100) for n in (1, 3, 6, 8, 10)},
    "two": two,
    "lengths": lengths,
    "slots3of200": partial(slots, words=20, many=3, values=200),
    "slots5of1000": partial(slots, words=60, many=5, values=1000),
    "order": partial(sentences, many=20, pool=20),
    "sentences10of20": partial(sentences, many=10, pool=20),
    "sentences8of40": partial(sentences, many=8, pool=40),
    **{f"licence{n}": partial(licence, share=n / 100) for n in (60, 80, 90)},
}


def measure(name: str, rows: int) -> None:
    texts = pa.array([" ".join(words) for words in FAMILIES[name](rows, np.random.default_rng(0))])
    sets = build_shingles(texts)
    keys, sizes = np.ascontiguousarray(compute_band_keys(sets).T), sets.sizes
    del sets
    began = time.process_time()
    content = digest_normalised_texts(texts).view(np.uint64)[::2].copy()
    found = find_near(
        np.arange(len(texts)),
        sizes,
        keys.__getitem__,
        lambda some: build_shingles(texts.take(pa.array(some))),
        content=content,
    )
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name:16} {len(texts):8,} rows {took:8.2f} s {len(found.dropped):8,} dropped {peak:6} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--families", default=",".join(FAMILIES))
    given = parser.parse_args()
    for name in given.families.split(","):
        measure(name, given.rows)
    print(f"load {os.getloadavg()[0]:.1f}")
