"""Measure the time of each cleaning step, its recall of planted personal data, and its effect on real dialogue.

    python benchmarks/data/cleaning_steps.py [--save benchmarks/data/steps.json]

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

from fake_pii import MAKERS, plant

from align.core.types import Conversation, Record
from align.data.chitchat import join_turns, load_records, to_conversation
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Step, join_texts
from align.data.clean.pii import KINDS, PersonalDataFilter
from align.data.clean.steps import create_steps

DOCUMENT_BYTES = 600
DOCUMENTS = 2_000
ROUNDS = 5
PLANTED = 1_000
"""Planted values of each kind."""
STEPS = [
    "unicode",
    "control",
    "empty",
    "roles",
    {"language": {"keep": ["en"]}},
    {"length": {"most": 2000}},
    "repetition",
    "boilerplate",
    "pii",
]
GERMAN = "Die Lampe steht auf dem Tisch, und für die Küche brauche ich noch größere Glühbirnen – „warmweiße“. "
"""A text that is not English, for steps that take longer on such texts."""


def create_documents() -> list[Conversation]:
    """Return conversations of about 600 bytes."""
    documents = []
    for id, record in load_records().items():
        lines: list[str] = []
        for line in join_turns(record):
            lines.append(line[: DOCUMENT_BYTES - sum(map(len, lines))])
            if sum(map(len, lines)) == DOCUMENT_BYTES and len(lines) % 2 == 0:
                documents.append(to_conversation(lines, id))
                break
    return documents[:DOCUMENTS]


def measure_microseconds(step: Step, rows: Sequence[Record]) -> float:
    """Return a step's processor time per document."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for row in rows:
            step(row)
        best_s = min(best_s, time.process_time() - start)
    return round(best_s / len(rows) * 1e6, 2)


def measure_steps() -> dict[str, dict[str, float]]:
    """Return the microseconds of each step on English dialogue, on dialogue with personal data, and on German."""
    draw = random.Random(0)
    english = create_documents()
    german = [to_conversation([GERMAN * 3, GERMAN * 3], str(i)) for i in range(200)]
    with_pii = []
    for row in english[:400]:
        planted_turns = [plant(message.content, draw.choice(KINDS), draw)[0] for message in row.messages[:2]]
        with_pii.append(to_conversation([*planted_turns, *(message.content for message in row.messages[2:])], row.id))
    microseconds = {}
    for name, step in create_steps(STEPS):
        for row in (*english[:20], *german[:20], *with_pii[:20]):
            step(row)  # load models and tables
        microseconds[name] = {
            "english": measure_microseconds(step, english),
            "german": measure_microseconds(step, german),
            "marked": measure_microseconds(step, with_pii),
        }
    return microseconds


def measure_recall() -> dict[str, float]:
    """Return the share of planted values that are masked completely and as their kind, by kind."""
    draw = random.Random(1)
    lines = [message.content for row in create_documents() for message in row.messages]
    recall = {}
    for kind in MAKERS:
        hits = 0
        for _ in range(PLANTED):
            text, value = plant(draw.choice(lines), kind, draw)
            masked = PersonalDataFilter().mask_personal_data(text)
            hits += f"[{kind.upper()}]" in masked and value not in masked
        recall[kind] = hits / PLANTED
    return recall


def count_effects() -> tuple[int, dict[str, Counter[str]]]:
    """Run each step alone on the whole corpus.

    Returns the number of conversations, and for each step how many it changes, drops and notes, by reason.
    """
    conversations = [
        to_conversation(lines, id) for id, record in load_records().items() if (lines := join_turns(record))
    ]
    effects = {}
    for name, step in create_steps([*STEPS[:-1], {"pii": {"action": "report"}}]):
        cleaner = Cleaner([(name, step)])
        for i, row in enumerate(conversations):
            cleaner.clean(row, i)
        (counts,) = cleaner.counts
        effects[name] = Counter({"changed": counts.changed, **counts.reasons, **counts.notes})
    return len(conversations), effects


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    documents = create_documents()
    size = sum(len(join_texts(row).encode()) for row in documents) / len(documents)
    mean_turns = sum(len(row.messages) for row in documents) / len(documents)
    print(f"{len(documents)} documents of {size:.0f} bytes in {mean_turns:.1f} turns; µs a document")
    print(f"{'step':12} {'English':>8} {'German':>8} {'with personal data':>20}")
    microseconds = measure_steps()
    for name, row in microseconds.items():
        print(f"{name:12} {row['english']:8.1f} {row['german']:8.1f} {row['marked']:20.1f}")
    recall = measure_recall()
    print("recall of personal data: " + ", ".join(f"{kind} {share:.3f}" for kind, share in recall.items()))
    count, effects = count_effects()
    print(f"on {count} conversations of people, each step alone:")
    for name, counts in effects.items():
        parts = [f"{number} {reason}" for reason, number in counts.most_common() if number]
        print(f"  {name:12} {', '.join(parts) or 'nothing'}")
    if options.save:
        results: dict[str, Any] = {
            "machine": {"system": platform.platform(), "python": platform.python_version(), "threads": 1},
            "bytes": round(size),
            "turns": round(mean_turns, 1),
            "microseconds": microseconds,
            "recall": recall,
            "conversations": count,
            "dialogue": effects,
        }
        options.save.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
