"""Near-duplicates in sets that share text: how many rows are lost, and what of planted copies is found.

    python benchmarks/data/templated.py

Prints the two tables of docs/data.md. Sets are made from seeds; what is planted is known by construction. Each planted
copy differs in case, spacing and punctuation, and in at most 5 % of its own words. `before` is what MinHash and Jaccard
alone remove, which count shared text and no numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.__main__ import main as main_of_align
from align.data.dedup.near_duplicates import Duplicates, find_near
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.shingles import build_shingles, compute_band_keys, digest_normalised_texts

Made = tuple[list[str], dict[int, int]]
"""Texts, and place of each planted copy → place of the text that it is of."""
STARTS = ("ka", "lo", "mi", "ru", "te", "so", "pa", "ni", "du", "fe")
MIDDLES = ("bor", "len", "mar", "tis", "von", "zel", "quin", "rad", "sov", "tum")
WORDS = [a + b + c for a in STARTS for b in MIDDLES for c in ("", "an", "is", "ot", "um")]
OTHERS = [f"other{a}" for a in STARTS]


def words(count: int, draw: random.Random) -> list[str]:
    return draw.choices(WORDS, k=count)


def changed(text: str, fixed: int, draw: random.Random, share: float = 0.05) -> str:
    """Return a copy in other case, spacing and punctuation, with a share of its own words replaced.

    Args:
        fixed: words that the text begins with and that are not its own.
    """
    parts = text.split()
    own = len(parts) - fixed
    for place in draw.sample(range(fixed, len(parts)), int(draw.choice((0, share)) * own)):
        parts[place] = draw.choice(OTHERS)
    for place in draw.sample(range(len(parts)), max(len(parts) // 10, 1)):
        change = draw.choice(
            (str.upper, str.title, "{},".format, "{}!".format, "{};".format, " {}".format, "{}\n".format)
        )
        parts[place] = change(parts[place])
    return " ".join(parts)


def plant(texts: list[str], fixed: int, count: int, draw: random.Random, share: float = 0.05) -> Made:
    """Return the texts with copies of some behind them."""
    of = draw.sample(range(len(texts)), count)
    return [*texts, *(changed(texts[i], fixed, draw, share) for i in of)], {
        len(texts) + at: i for at, i in enumerate(of)
    }


def instruction(own: int, draw: random.Random) -> Made:
    shared = [f"instruction{a}{b}" for a in STARTS for b in "abcdef"][:57]
    texts = [" ".join([*shared, *words(own, draw)]) for _ in range(2000)]
    return plant(texts, 57, 200 if own >= 30 else 40, draw, 0.05 if own >= 30 else 0)


def nested(draw: random.Random) -> Made:
    """A preamble of all rows, one of 20 instructions, and 40 words of their own."""
    preamble = [f"preamble{a}{b}" for a in STARTS for b in "abcd"]
    tasks = [[f"task{a}{b}{c}" for b in STARTS for c in "abc"] for a in "abcdefghijklmnopqrst"]
    texts = [" ".join([*preamble, *tasks[i % 20], *words(40, draw)]) for i in range(2000)]
    return plant(texts, 70, 200, draw)


def slots(draw: random.Random) -> Made:
    """Four slots of ten own words in a template, which copies change anywhere in these."""
    shared = [[f"part{a}{b}" for b in STARTS] for a in "abcde"]
    texts = list[str]()
    for _ in range(2000):
        row = [*shared[0]]
        for part in shared[1:]:
            row += [*words(10, draw), *part]
        texts.append(" ".join(row))
    of = draw.sample(range(2000), 200)
    copies = list[str]()
    for i in of:
        row = texts[i].split()
        row[draw.choice([10 + 20 * slot + place for slot in range(4) for place in range(10)])] = draw.choice(OTHERS)
        copies.append(changed(" ".join(row), len(row), draw, 0))
    return [*texts, *copies], {2000 + at: i for at, i in enumerate(of)}


def arithmetic(draw: random.Random) -> Made:
    return [
        f"What is {a} {sign} {b}?\nThe answer is {eval(f'{a}{sign}{b}')}."
        for a in range(2, 41) for b in range(2, 21) for sign in "+-*"
    ], {}  # fmt: skip


def untemplated(draw: random.Random) -> Made:
    """Texts of 30 to 90 words, with one to five copies of some; and texts that share half of their words with one."""
    texts = [" ".join(words(draw.randint(30, 90), draw)) for _ in range(3000)]
    made, planted = [*texts], dict[int, int]()
    for i in range(600):
        for _ in range(draw.randint(1, 5)):
            planted[len(made)] = i
            made.append(changed(texts[i], 0, draw))
    for text in texts[600:1200]:
        parts = text.split()
        made.append(" ".join([*parts[: len(parts) // 2], *words(len(parts) // 2, draw)]))
    return made, planted


SETS: dict[str, Callable[[random.Random], Made]] = {
    "57-word instruction, 8 own words": lambda draw: instruction(8, draw),
    "57-word instruction, 30 own words": lambda draw: instruction(30, draw),
    "57-word instruction, 60 own words": lambda draw: instruction(60, draw),
    "preamble, 20 instructions, 40 own words": nested,
    "template with 4 slots of 10 words": slots,
    "arithmetic, 2,223 questions": arithmetic,
    "no template, families of 2 to 6": untemplated,
}


def find(texts: Sequence[str], shared_counts: bool) -> Duplicates:
    array = pa.array(texts)
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)
    more = {}
    if not shared_counts:
        content = digest_normalised_texts(array).view(np.uint64)[::2].copy()
        more = {"numbers": hash_numbers(array), "content": content}
    return find_near(
        np.arange(len(texts)),
        sets.sizes,
        columns.__getitem__,
        lambda few: build_shingles(array.take(pa.array(few))),
        **more,
    )


def hold_out(texts: Sequence[str], planted: dict[int, int]) -> tuple[int, int, int]:
    """Run the stage with 5 % of the rows held out and duplicates left in.

    Returns:
        rows to train on of which a copy is held out; how many of them were removed; and how many others were.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        settings = ["data.held_out=0.05", "stage.duplicates.near=null", "stage.duplicates.exact=false"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main_of_align(["stage=data", f"stage.sources=[{path}]", f"run.root={folder}", *settings]) == 0
        sides = {
            side: {
                row - 1
                for file in Path(folder).glob(f"data/*/artifact/{side}-*.parquet")
                for row in pq.read_table(file, columns=["row"])["row"].to_pylist()
            }
            for side in ("train", "test")
        }
    family = {row: planted.get(row, row) for row in range(len(texts))}
    held_out = {family[row] for row in sides["test"]}
    others = {row for row in family if row not in sides["test"]}
    leaks = {row for row in others if family[row] in held_out}
    removed = others - sides["train"]
    return len(leaks), len(leaks & removed), len(removed - leaks)


def compare_sides() -> None:
    print("\n| rows, 5 % held out | copies of held-out rows | removed | others removed |\n|---|---|---|---|")
    for seed, (name, make) in enumerate(SETS.items()):
        counts = hold_out(*make(random.Random(seed)))
        print(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)


def main() -> None:
    print("| rows | planted | removed | recall | precision | before | µs a row |\n|---|---|---|---|---|---|---|")
    for seed, (name, make) in enumerate(SETS.items()):
        texts, planted = make(random.Random(seed))
        start = time.process_time()
        found = find(texts, False)
        took = time.process_time() - start
        old = len(find(texts, True).dropped)
        family = {row: planted.get(row, row) for row in range(len(texts))}
        pairs = zip(found.dropped.tolist(), found.kept.tolist(), strict=True)
        right = sum(family[row] == family[kept] for row, kept in pairs)
        recall = f"{right / len(planted):.3f}" if planted else "–"
        precision = f"{right / len(found.dropped):.3f}" if len(found.dropped) else "–"
        cells = (
            name,
            f"{len(planted):,}",
            f"{len(found.dropped):,}",
            recall,
            precision,
            f"{old:,}",
            f"{1e6 * took / len(texts):.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
    compare_sides()
