"""Let three readers judge 30 pairs of answers without knowing which is which, and count their votes.

    draw    draw pairs by a seed and write two files: the page for readers, and the key, which says what A and B are.
            In half of the pairs A is the trained policy's answer
    count   count the votes of three readers: files with a line such as `12 A`, `12 B` or `12 =` for each pair. Ends
            with status 1 if their majority prefers the trained policy's answer in fewer than 21 pairs
    show    print ten of the pairs as Markdown

Usage: python recipes/demo/readers.py draw KEY.json PAGE.md RUN_ROOT [SEED]
       python recipes/demo/readers.py count KEY.json VOTES VOTES VOTES
       python recipes/demo/readers.py show KEY.json
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guards import Side

READERS = 3
PAIRS = 30
MIN_PREFERRED = 21
SHOWN = 10
INSTRUCTIONS = """# {count} pairs of answers

Which answer would you rather get to this question? Write a line for each pair into a file: its number, and A, B, or =
if neither is better. An answer that ends in […] was cut off.
"""
VOTE = re.compile(r"^\s*(\d+)[.:)]?\s+([ABab=])\s*$", re.MULTILINE)

Pair = dict[str, str]
"""A question, the answers `before` and `after`, and in `A` which of them the page calls A."""


def format_answer(side: Side, row: int) -> str:
    answer = side.sampled[row]
    return answer.text.strip() + ("" if answer.is_finished else " […]")


def draw_pairs(sides: Mapping[str, Side], count: int, seed: int) -> list[Pair]:
    """Return pairs of sampled answers to questions that are drawn by a seed."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(sides["before"].sampled)), count)
    names_of_a = ["before", "after"] * (count // 2) + ["before"] * (count % 2)
    rng.shuffle(names_of_a)
    return [
        {
            "question": sides["before"].sampled[row].question,
            "before": format_answer(sides["before"], row),
            "after": format_answer(sides["after"], row),
            "A": name_of_a,
        }
        for row, name_of_a in zip(rows, names_of_a, strict=True)
    ]


def get_name_of_b(pair: Pair) -> str:
    return "after" if pair["A"] == "before" else "before"


def format_page(pairs: Sequence[Pair]) -> str:
    """Return the page for readers, which does not say what A and B are."""
    parts = [INSTRUCTIONS.format(count=len(pairs))]
    for number, pair in enumerate(pairs, 1):
        parts.append(
            f"## {number}. {pair['question']}\n\n**A:** {pair[pair['A']]}\n\n**B:** {pair[get_name_of_b(pair)]}\n"
        )
    return "\n".join(parts)


def read_votes(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """Read one reader's votes as `before`, `after` or `tie`, one a pair. Exits unless each pair has one vote."""
    votes = VOTE.findall(path.read_text(encoding="utf-8"))
    counts = Counter(int(number) for number, _ in votes)
    wrong = [number for number in range(1, len(pairs) + 1) if counts[number] != 1]
    unknown = sorted(counts.keys() - {*range(1, len(pairs) + 1)})
    if wrong or unknown:
        sys.exit(
            f"{path}: pairs without exactly one vote: {wrong}; unknown pairs: {unknown}. Write lines such as `1 A`"
        )
    letters = {int(number): letter.upper() for number, letter in votes}
    return [
        {"A": pair["A"], "B": get_name_of_b(pair), "=": "tie"}[letters[number]] for number, pair in enumerate(pairs, 1)
    ]


def find_majority(votes: Sequence[str]) -> str:
    """Return the side that more than half of the readers chose, otherwise `tie`."""
    side, count = Counter(votes).most_common(1)[0]
    return side if count > len(votes) / 2 else "tie"


def compute_p_value(wins: int, pairs: int) -> float:
    """Return the one-sided probability of at least so many wins if each side wins half of the pairs."""
    return sum(comb(pairs, k) for k in range(wins, pairs + 1)) / 2**pairs


def count_votes(pairs: Sequence[Pair], files: Sequence[Path]) -> tuple[int, str]:
    """Return the number of pairs in which the majority prefers `after`, and a table of all votes."""
    by_reader = [read_votes(path, pairs) for path in files]
    majority = [find_majority(votes) for votes in zip(*by_reader, strict=True)]
    lines = [f"{'reader':<12}after  before  tie"]
    for name, votes in [*zip((path.stem for path in files), by_reader, strict=True), ("majority", majority)]:
        counts = Counter(votes)
        lines.append(f"{name:<12}{counts['after']:5d}  {counts['before']:6d}  {counts['tie']:3d}")
    return majority.count("after"), "\n".join(lines)


def format_table(pairs: Sequence[Pair]) -> str:
    """Return the first pairs as a Markdown table."""
    rows = [[pair["question"], pair["before"], pair["after"]] for pair in pairs[:SHOWN]]
    cells = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [["question", "before", "after"], ["---"] * 3, *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(action: str, key: Path, *arguments: str) -> int:
    if action == "draw":
        page, root, seed = Path(arguments[0]), Path(arguments[1]), int((*arguments, "0")[2])
        if key.exists():
            sys.exit(f"{key} exists: readers may have voted on its pairs. Name another file")
        from guards import EVALUATION, read_sides  # with torch, which the other actions do without

        from align.run import resolve

        _, sides = read_sides(resolve(EVALUATION, root).path)
        pairs = draw_pairs(sides, PAIRS, seed)
        key.write_text(json.dumps(pairs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write_text(format_page(pairs), encoding="utf-8")
        return 0
    pairs = json.loads(key.read_text(encoding="utf-8"))
    if action == "show":
        print(format_table(pairs))
        return 0
    if len(arguments) != READERS:
        sys.exit(f"{len(arguments)} files of votes: name those of {READERS} readers")
    preferred, table = count_votes(pairs, [Path(name) for name in arguments])
    verdict = "" if preferred >= MIN_PREFERRED else "  MISSED"
    print(table)
    print(f"after is preferred in {preferred} of {len(pairs)} pairs (bar: >= {MIN_PREFERRED}){verdict}, ", end="")
    print(f"one-sided p = {compute_p_value(preferred, len(pairs)):.3f}")
    return int(preferred < MIN_PREFERRED)


if __name__ == "__main__":
    if (
        len(sys.argv) < 3
        or sys.argv[1] not in ("draw", "count", "show")
        or (sys.argv[1] == "draw" and len(sys.argv) < 5)
    ):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
