"""What each cleaning step costs, what it finds of what was planted, and what it takes real dialogue for.

    python benchmarks/data/steps.py [--save benchmarks/data/steps.json]

Documents are conversations of the chit-chat corpus, cut to about 600 bytes; the same with personal data; and German.
Times are processor time on one core, the best of five rounds, in microseconds a document.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planted import MAKERS, planted

from align.core.types import Conversation, Record
from align.data.chitchat import join_turns, load_records, to_conversation
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Step, join_texts
from align.data.clean.pii import KINDS, PersonalDataFilter
from align.data.clean.steps import create_steps

BYTES, DOCUMENTS, ROUNDS, PLANTED = 600, 2_000, 5, 1_000
STEPS = ["unicode", "control", "empty", "roles", {"language": {"keep": ["en"]}}, {"length": {"most": 2000}},
         "repetition", "boilerplate", "pii"]  # fmt: skip
ELSEWHERE = "Die Lampe steht auf dem Tisch, und für die Küche brauche ich noch größere Glühbirnen – „warmweiße“. "
"""Of a text in another language than English, for steps that look longer at such."""


def documents() -> list[Conversation]:
    """Conversations of about 600 bytes."""
    found = []
    for id, record in load_records().items():
        lines: list[str] = []
        for line in join_turns(record):
            lines.append(line[: BYTES - sum(map(len, lines))])
            if sum(map(len, lines)) == BYTES and len(lines) % 2 == 0:
                found.append(to_conversation(lines, id))
                break
    return found[:DOCUMENTS]


def microseconds(step: Step, rows: Sequence[Record]) -> float:
    """Processor time of a document."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for row in rows:
            step(row)
        best = min(best, time.process_time() - began)
    return round(best / len(rows) * 1e6, 2)


def costs() -> dict[str, dict[str, float]]:
    """Step → microseconds on English dialogue, on dialogue that has personal data, and on German."""
    draw, plain = random.Random(0), documents()
    german = [to_conversation([ELSEWHERE * 3, ELSEWHERE * 3], str(i)) for i in range(200)]
    marked = [to_conversation([planted(m.content, draw.choice(KINDS), draw)[0] for m in row.messages[:2]]
                      + [m.content for m in row.messages[2:]], row.id) for row in plain[:400]]  # fmt: skip
    found = {}
    for name, step in create_steps(STEPS):
        for row in (*plain[:20], *german[:20], *marked[:20]):
            step(row)  # loads what the step needs
        found[name] = {
            "english": microseconds(step, plain), "german": microseconds(step, german),
            "marked": microseconds(step, marked),
        }  # fmt: skip
    return found


def recall() -> dict[str, float]:
    """Kind → share of those planted in a turn that are masked as that kind, whole."""
    draw, lines = random.Random(1), [m.content for row in documents() for m in row.messages]
    found = {}
    for kind in MAKERS:
        hits = 0
        for _ in range(PLANTED):
            text, made = planted(draw.choice(lines), kind, draw)
            hidden = PersonalDataFilter().mask_personal_data(text)
            hits += f"[{kind.upper()}]" in hidden and made not in hidden
        found[kind] = hits / PLANTED
    return found


def on_dialogue() -> tuple[int, dict[str, Counter[str]]]:
    """Conversations of the whole corpus; and what each step, alone, changes, drops or notes of them."""
    whole = [to_conversation(lines, id) for id, record in load_records().items() if (lines := join_turns(record))]
    found = {}
    for name, step in create_steps([*STEPS[:-1], {"pii": {"action": "report"}}]):
        cleaner = Cleaner([(name, step)])
        for i, row in enumerate(whole):
            cleaner.clean(row, i)
        (counts,) = cleaner.counts
        found[name] = Counter({"changed": counts.changed, **counts.reasons, **counts.notes})
    return len(whole), found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    size = sum(len(join_texts(row).encode()) for row in documents()) / len(documents())
    turns_each = sum(len(row.messages) for row in documents()) / len(documents())
    print(f"{len(documents())} documents of {size:.0f} bytes in {turns_each:.1f} turns; µs a document")
    print(f"{'step':12} {'English':>8} {'German':>8} {'with personal data':>20}")
    cost = costs()
    for name, row in cost.items():
        print(f"{name:12} {row['english']:8.1f} {row['german']:8.1f} {row['marked']:20.1f}")
    found = recall()
    print("recall of personal data: " + ", ".join(f"{kind} {share:.3f}" for kind, share in found.items()))
    count, seen = on_dialogue()
    print(f"on {count} conversations of people, each step alone:")
    for name, what in seen.items():
        print(f"  {name:12} {', '.join(f'{n} {reason}' for reason, n in what.most_common() if n) or 'nothing'}")
    if arguments.save:
        result: dict[str, Any] = {
            "machine": {"system": platform.platform(), "python": platform.python_version(), "threads": 1},
            "bytes": round(size), "turns": round(turns_each, 1), "microseconds": cost, "recall": found,
            "conversations": count, "dialogue": seen,
        }  # fmt: skip
        arguments.save.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
