"""Write a corpus of real dialogue with noise, in which near-duplicates are planted.

    python benchmarks/data/corpus.py FOLDER [--documents 200000] [--seed 0]

Writes `corpus.jsonl` (`id`, `text`) and `truth.parquet`. A document joins utterances of `chitchat-dataset`, with noise
in case, spacing and punctuation, and in one of ten documents typographic quotes, accents and emoji. Of all documents,
20 % are changed copies of others with a Jaccard similarity of at least 0.7, 5 % are changed more, to a similarity of
0.35 to 0.66, and 1 % are too short to keep. Copies keep all digits and signs. Similarities are those of sets of strings
and are computed here, without align's code.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from align.data import chitchat

TWIN = "twin"
NEGATIVE = "negative"
SHARES = {TWIN: 0.20, NEGATIVE: 0.05, "short": 0.01}
"""Kind of planted document → its share of all documents."""
JACCARD_RANGES = {TWIN: (0.70, 1.0), NEGATIVE: (0.35, 0.66)}
SURFACE_SHARE = 0.39
"""Share of the twins that differ in case, spacing and punctuation only."""
MIN_CHARACTERS = 60
MAX_CHARACTERS = 3000
MAX_TRIES = 100
SIGNS = re.compile(r"\d|[-+*/=<>^%&|~]")
"""Digits and signs. Texts in which they differ are not near-duplicates, so copies keep them."""


def compute_shingles(text: str) -> set[tuple[str, ...]]:
    """Return the runs of three words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def compute_jaccard(a: str, b: str) -> float:
    shingles_a = compute_shingles(a)
    shingles_b = compute_shingles(b)
    return len(shingles_a & shingles_b) / max(len(shingles_a | shingles_b), 1)


class DocumentGenerator:
    """Random documents, and changed copies of documents."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        turns = (turn for record in chitchat.load_records().values() for turn in chitchat.join_turns(record))
        self.utterances = sorted({turn for turn in turns if len(turn) >= 10})
        self.words = sorted({word for turn in self.utterances[::7] for word in turn.split()})

    def create_original(self) -> str:
        length = min(max(int(self.draw.lognormvariate(6.06, 0.55)), MIN_CHARACTERS), MAX_CHARACTERS)
        parts: list[str] = []
        while sum(map(len, parts)) < length:
            parts.append(self.draw.choice(self.utterances))
        text = " ".join(parts)
        if self.draw.random() < 0.1:
            text = text.replace("'", "’").replace(" the ", " thé ", 1) + self.draw.choice(["", "🙂", "…", "–", "❤️"])
        return text

    def change_surface(self, text: str) -> str:
        """Return the same words with other case, spacing and punctuation."""
        words = text.split(" ")
        for position in self.draw.sample(range(len(words)), max(len(words) // 12, 1)):
            change = self.draw.choice(
                (str.upper, str.capitalize, "{}!".format, "{},".format, " {}".format, "{}\n".format)
            )
            words[position] = change(words[position])
        return " ".join(words)

    def create_near_copy(self, text: str, low: float, high: float) -> tuple[str, float] | None:
        """Return a copy whose similarity to the text is in a range, and the similarity.

        Words are replaced, removed and inserted. Returns None if no try reaches the range, such as for a text that is
        one long word.
        """
        for _ in range(MAX_TRIES):
            target = self.draw.uniform(low, high)
            words = text.split(" ")
            for _ in range(max(round(len(words) * (1 - target) / (3 * (1 + target))), 1)):
                position = self.draw.randrange(len(words))
                words[position : position + self.draw.randrange(3)] = [self.draw.choice(self.words)]
            copy = self.change_surface(" ".join(words))
            jaccard = compute_jaccard(text, copy)
            if low <= jaccard <= high and SIGNS.findall(copy) == SIGNS.findall(text):
                return copy, jaccard
        return None


class Document(NamedTuple):
    """A document of the corpus.

    Attributes:
        family: number of the original that it is, or is a copy of.
        kind: `original`, `twin`, `negative` or `short`.
        jaccard: similarity to the original.
    """

    text: str
    family: int
    kind: str
    jaccard: float


def generate_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield the originals, then the planted documents of each kind."""
    generator = DocumentGenerator(seed)
    draw = generator.draw
    planted_counts = {kind: round(count * share) for kind, share in SHARES.items()}
    originals = [generator.create_original() for _ in range(count - sum(planted_counts.values()))]
    for number, text in enumerate(originals):
        yield Document(text, number, "original", 1.0)
    for kind, (low, high) in JACCARD_RANGES.items():
        copies = 0
        while copies < planted_counts[kind]:
            number = draw.randrange(len(originals))
            text = originals[number]
            if kind == TWIN and draw.random() < SURFACE_SHARE:
                copy = generator.change_surface(text)
                near_copy = copy, compute_jaccard(text, copy)
            else:
                near_copy = generator.create_near_copy(text, low, high)
            if near_copy is not None:
                copy, jaccard = near_copy
                yield Document(copy, number, kind, jaccard)
                copies += 1
    for number in range(planted_counts["short"]):
        text = draw.choice(("ok", "lol", "yes!", "", "👍", "no idea"))
        yield Document(text, len(originals) + number, "short", 0.0)


def write_corpus(folder: Path, count: int, seed: int) -> None:
    """Write `corpus.jsonl` and `truth.parquet` with so many documents, in random order."""
    documents = list(generate_documents(count, seed))
    random.Random(seed + 1).shuffle(documents)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            file.write(json.dumps({"id": str(number), "text": document.text}, ensure_ascii=False) + "\n")
    _, families, kinds, jaccards = zip(*documents, strict=True)
    truth = {"family": pa.array(families, pa.int32()), "kind": pa.array(kinds), "jaccard": pa.array(jaccards)}
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    size = sum(len(document.text.encode()) for document in documents)
    print(f"{count:,} documents, {size / count:.0f} bytes each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_corpus(options.folder, options.documents, options.seed)
