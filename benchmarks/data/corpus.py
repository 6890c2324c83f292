"""Documents of real dialogue with noise, in which near-duplicates are planted.

    python benchmarks/data/corpus.py FOLDER [--documents 200000] [--seed 0]

Writes `corpus.jsonl` (`id`, `text`) and `truth.parquet`. A document is utterances of `chitchat-dataset` joined, with
noise in case, spacing and punctuation; in one of ten, typographic quotes, accents and emoji. Of all documents 20 % are
changed copies of others with a Jaccard similarity of at least 0.7, 5 % are changed more, to 0.35 to 0.66, and 1 % are
too short to keep. Copies keep all digits and signs. Similarities are those of sets of strings, computed here, by
nothing of align's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.data import chitchat

TWIN, NEGATIVE = "twin", "negative"
SHARES = {TWIN: 0.20, NEGATIVE: 0.05, "short": 0.01}
RANGES = {TWIN: (0.70, 1.0), NEGATIVE: (0.35, 0.66)}
SAME_WORDS = 0.39
"""Of the copies: those that differ in case, spacing and punctuation alone."""
CHARACTERS = (60, 3000)
TRIES = 100
SIGNS = re.compile(r"\d|[-+*/=<>^%&|~]")
"""Digits and signs: texts in which they differ are no near-duplicates, and copies keep them."""


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def similarity(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / max(len(one | other), 1)


class Writer:
    """Makes documents, and changed copies of them."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        found = (turn for record in chitchat.load_records().values() for turn in chitchat.join_turns(record))
        self.utterances = sorted({turn for turn in found if len(turn) >= 10})
        self.words = sorted({word for turn in self.utterances[::7] for word in turn.split()})

    def original(self) -> str:
        want = min(max(int(self.draw.lognormvariate(6.06, 0.55)), CHARACTERS[0]), CHARACTERS[1])
        parts: list[str] = []
        while sum(map(len, parts)) < want:
            parts.append(self.draw.choice(self.utterances))
        text = " ".join(parts)
        if self.draw.random() < 0.1:
            text = text.replace("'", "’").replace(" the ", " thé ", 1) + self.draw.choice(["", "🙂", "…", "–", "❤️"])
        return text

    def resurfaced(self, text: str) -> str:
        """The same words in another dress."""
        words = text.split(" ")
        for at in self.draw.sample(range(len(words)), max(len(words) // 12, 1)):
            change = self.draw.choice(
                (str.upper, str.capitalize, "{}!".format, "{},".format, " {}".format, "{}\n".format)
            )
            words[at] = change(words[at])
        return " ".join(words)

    def changed(self, text: str, low: float, high: float) -> tuple[str, float] | None:
        """A copy whose similarity is in the range, by words that are replaced, left out and put in; None of a text that
        gives none, for it is one long word."""
        for _ in range(TRIES):
            aim = self.draw.uniform(low, high)
            words = text.split(" ")
            for _ in range(max(round(len(words) * (1 - aim) / (3 * (1 + aim))), 1)):
                at = self.draw.randrange(len(words))
                words[at : at + self.draw.randrange(3)] = [self.draw.choice(self.words)]
            copy = self.resurfaced(" ".join(words))
            reached = similarity(text, copy)
            if low <= reached <= high and SIGNS.findall(copy) == SIGNS.findall(text):
                return copy, reached
        return None


def documents(count: int, seed: int) -> Iterator[tuple[str, int, str, float]]:
    """Text, which original it is of, what it is of it, and their similarity."""
    write = Writer(seed)
    copies = {kind: round(count * share) for kind, share in SHARES.items()}
    originals = [write.original() for _ in range(count - sum(copies.values()))]
    for number, text in enumerate(originals):
        yield text, number, "original", 1.0
    for kind, (low, high) in RANGES.items():
        made = 0
        while made < copies[kind]:
            number = write.draw.randrange(len(originals))
            text = originals[number]
            if kind == TWIN and write.draw.random() < SAME_WORDS:
                copy = write.resurfaced(text)
                found = copy, similarity(text, copy)
            else:
                found = write.changed(text, low, high)
            if found is not None:
                copy, reached = found
                yield copy, number, kind, reached
                made += 1
    for number in range(copies["short"]):
        yield write.draw.choice(("ok", "lol", "yes!", "", "👍", "no idea")), len(originals) + number, "short", 0.0


def write(folder: Path, count: int, seed: int) -> None:
    rows = list(documents(count, seed))
    random.Random(seed + 1).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, (text, *_) in enumerate(rows):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    _, family, kind, reached = zip(*rows, strict=True)
    truth = {"family": pa.array(family, pa.int32()), "kind": pa.array(kind), "jaccard": pa.array(reached)}
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    print(f"{count:,} documents, {sum(len(text.encode()) for text, *_ in rows) / count:.0f} bytes each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, given.documents, given.seed)
