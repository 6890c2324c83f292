"""Measure recall and precision of near-duplicate removal on rows that share text, such as an instruction or a template.

    python benchmarks/data/shared_text.py

Prints the two tables of docs/data.md. The sets of rows are made from seeds, with planted copies. Each planted copy
differs in case, spacing and punctuation, and in at most 5 % of its own words. `before` is the number of rows that
MinHash and Jaccard alone remove, which count shared text and ignore numbers.
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
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.__main__ import main as main_of_align
from align.data.dedup.near_duplicates import Duplicates, find_near
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.shingles import build_shingles, compute_band_keys, digest_normalised_texts

STARTS = ("ka", "lo", "mi", "ru", "te", "so", "pa", "ni", "du", "fe")
MIDDLES = ("bor", "len", "mar", "tis", "von", "zel", "quin", "rad", "sov", "tum")
WORDS = [a + b + c for a in STARTS for b in MIDDLES for c in ("", "an", "is", "ot", "um")]
REPLACEMENT_WORDS = [f"other{a}" for a in STARTS]


class TextSet(NamedTuple):
    """Texts with planted copies.

    Attributes:
        texts: the originals, and the copies behind them.
        originals: index of each planted copy → index of its original.
    """

    texts: list[str]
    originals: dict[int, int]

    def compute_families(self) -> dict[int, int]:
        """Return the index of the original of each text. An original's own index is its family."""
        return {row: self.originals.get(row, row) for row in range(len(self.texts))}


def draw_words(count: int, draw: random.Random) -> list[str]:
    return draw.choices(WORDS, k=count)


def create_copy(text: str, shared_words: int, draw: random.Random, share: float = 0.05) -> str:
    """Return a copy in other case, spacing and punctuation, with a share of its own words replaced.

    Args:
        shared_words: number of words at the text's beginning that are shared with other texts.
    """
    words = text.split()
    own_words = len(words) - shared_words
    for position in draw.sample(range(shared_words, len(words)), int(draw.choice((0, share)) * own_words)):
        words[position] = draw.choice(REPLACEMENT_WORDS)
    for position in draw.sample(range(len(words)), max(len(words) // 10, 1)):
        change = draw.choice(
            (str.upper, str.title, "{},".format, "{}!".format, "{};".format, " {}".format, "{}\n".format)
        )
        words[position] = change(words[position])
    return " ".join(words)


def plant_copies(texts: list[str], shared_words: int, count: int, draw: random.Random, share: float = 0.05) -> TextSet:
    """Return the texts, and copies of some of them."""
    originals = draw.sample(range(len(texts)), count)
    copies = [create_copy(texts[i], shared_words, draw, share) for i in originals]
    return TextSet([*texts, *copies], {len(texts) + copy: original for copy, original in enumerate(originals)})


def create_instruction_set(own_words: int, draw: random.Random) -> TextSet:
    """Return texts with the same instruction of 57 words."""
    instruction = [f"instruction{a}{b}" for a in STARTS for b in "abcdef"][:57]
    texts = [" ".join([*instruction, *draw_words(own_words, draw)]) for _ in range(2000)]
    return plant_copies(texts, 57, 200 if own_words >= 30 else 40, draw, 0.05 if own_words >= 30 else 0)


def create_nested_set(draw: random.Random) -> TextSet:
    """Return texts with a preamble that all share, one of 20 instructions, and 40 words of their own."""
    preamble = [f"preamble{a}{b}" for a in STARTS for b in "abcd"]
    tasks = [[f"task{a}{b}{c}" for b in STARTS for c in "abc"] for a in "abcdefghijklmnopqrst"]
    texts = [" ".join([*preamble, *tasks[i % 20], *draw_words(40, draw)]) for i in range(2000)]
    return plant_copies(texts, 70, 200, draw)


def create_slot_set(draw: random.Random) -> TextSet:
    """Return texts of a template with four slots of ten words. Copies differ in one word of a slot."""
    template = [[f"part{a}{b}" for b in STARTS] for a in "abcde"]
    texts = list[str]()
    for _ in range(2000):
        row = [*template[0]]
        for part in template[1:]:
            row += [*draw_words(10, draw), *part]
        texts.append(" ".join(row))
    originals = draw.sample(range(2000), 200)
    slot_positions = [10 + 20 * slot + position for slot in range(4) for position in range(10)]
    copies = list[str]()
    for i in originals:
        row = texts[i].split()
        new_word = draw.choice(REPLACEMENT_WORDS)
        row[draw.choice(slot_positions)] = new_word
        copies.append(create_copy(" ".join(row), len(row), draw, 0))
    return TextSet([*texts, *copies], {2000 + copy: original for copy, original in enumerate(originals)})


def create_arithmetic_set(draw: random.Random) -> TextSet:
    """Return questions that differ in their numbers and signs only, without copies."""
    texts = [
        f"What is {a} {sign} {b}?\nThe answer is {eval(f'{a}{sign}{b}')}."
        for a in range(2, 41)
        for b in range(2, 21)
        for sign in "+-*"
    ]
    return TextSet(texts, {})


def create_untemplated_set(draw: random.Random) -> TextSet:
    """Return texts of 30 to 90 words, one to five copies of some, and texts that share half of their words with one."""
    originals = [" ".join(draw_words(draw.randint(30, 90), draw)) for _ in range(3000)]
    texts = [*originals]
    copied = dict[int, int]()
    for i in range(600):
        for _ in range(draw.randint(1, 5)):
            copied[len(texts)] = i
            texts.append(create_copy(originals[i], 0, draw))
    for text in originals[600:1200]:
        words = text.split()
        texts.append(" ".join([*words[: len(words) // 2], *draw_words(len(words) // 2, draw)]))
    return TextSet(texts, copied)


SETS: dict[str, Callable[[random.Random], TextSet]] = {
    "57-word instruction, 8 own words": lambda draw: create_instruction_set(8, draw),
    "57-word instruction, 30 own words": lambda draw: create_instruction_set(30, draw),
    "57-word instruction, 60 own words": lambda draw: create_instruction_set(60, draw),
    "preamble, 20 instructions, 40 own words": create_nested_set,
    "template with 4 slots of 10 words": create_slot_set,
    "arithmetic, 2,223 questions": create_arithmetic_set,
    "no template, families of 2 to 6": create_untemplated_set,
}


def find_duplicates(texts: Sequence[str], count_shared_text: bool) -> Duplicates:
    """Return the near-duplicates. With `count_shared_text`, they are those of MinHash and Jaccard alone."""
    array = pa.array(texts)
    sets = build_shingles(array)
    columns = np.ascontiguousarray(compute_band_keys(sets).T)
    options = {}
    if not count_shared_text:
        content = digest_normalised_texts(array).view(np.uint64)[::2].copy()
        options = {"numbers": hash_numbers(array), "content": content}
    return find_near(
        np.arange(len(texts)),
        sets.sizes,
        columns.__getitem__,
        lambda indexes: build_shingles(array.take(pa.array(indexes))),
        **options,
    )


def count_held_out_copies(text_set: TextSet) -> tuple[int, int, int]:
    """Run the data stage with 5 % of the rows held out and duplicates left in.

    Returns the number of training rows with a held-out copy, how many of them were removed, and how many other rows
    were removed.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in text_set.texts)
        path.write_text("".join(lines), encoding="utf-8")
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
    families = text_set.compute_families()
    held_out_families = {families[row] for row in sides["test"]}
    training_rows = {row for row in families if row not in sides["test"]}
    leaks = {row for row in training_rows if families[row] in held_out_families}
    removed = training_rows - sides["train"]
    return len(leaks), len(leaks & removed), len(removed - leaks)


def print_held_out_copies() -> None:
    """Print the table of copies of held-out rows."""
    print("\n| rows, 5 % held out | copies of held-out rows | removed | others removed |\n|---|---|---|---|")
    for seed, (name, create_set) in enumerate(SETS.items()):
        counts = count_held_out_copies(create_set(random.Random(seed)))
        print(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |", flush=True)


def print_duplicates() -> None:
    """Print the table of near-duplicates within a set."""
    print("| rows | planted | removed | recall | precision | before | µs a row |\n|---|---|---|---|---|---|---|")
    for seed, (name, create_set) in enumerate(SETS.items()):
        text_set = create_set(random.Random(seed))
        start = time.process_time()
        duplicates = find_duplicates(text_set.texts, False)
        seconds = time.process_time() - start
        dropped_before = len(find_duplicates(text_set.texts, True).dropped)
        families = text_set.compute_families()
        pairs = zip(duplicates.dropped.tolist(), duplicates.kept.tolist(), strict=True)
        right = sum(families[row] == families[kept_row] for row, kept_row in pairs)
        planted = len(text_set.originals)
        removed = len(duplicates.dropped)
        cells = (
            name,
            f"{planted:,}",
            f"{removed:,}",
            f"{right / planted:.3f}" if planted else "–",
            f"{right / removed:.3f}" if removed else "–",
            f"{dropped_before:,}",
            f"{1e6 * seconds / len(text_set.texts):.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    print_duplicates()
    print_held_out_copies()
