"""Planted leaks of evaluation questions: how many are found, by disguise, and how many other rows are taken for any.

    python benchmarks/data/leaks.py [--seed 0] [--rows 20000] [--questions FILE …] [--unrelated FILE …]

Questions are those of `leaks.json`, and long turns of the part `test` of the built-in corpus. `--questions` adds JSON
lines with a `question` or a `prompt`; `--unrelated` adds JSON lines with a `text`. Unrelated rows are pieces of
conversations of the corpus's other parts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from align.core.types import Conversation, Message
from align.data.chitchat import assign_part, join_turns, load_records
from align.data.dedup.evaluation_overlap import RULES
from align.data.read.content import DOCUMENTS
from align.data.sets.contamination import LeakFinder
from align.data.sets.evaluations import EvaluationSet, read_evaluation_set
from align.data.sets.record_columns import join_record_texts, records_to_columns

QUESTIONS = json.loads((Path(__file__).parent / "leaks.json").read_text(encoding="utf-8"))
CHOICES = QUESTIONS.pop("choices")
ARABIC_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
PREFIXES = (
    "Question: {}",
    "Q: {}",
    "12. {}",
    "3) {}",
    "Question 7: {}",
    "Question: {}\nAnswer:",
    "Q. {}\nA:",
    "(4) {}",
)
QUOTES = (
    'My teacher gave us this one: "{}" Please explain how you would approach it, step by step.',
    "You are a careful assistant. Answer the question below in one sentence.\n\n{}\n\nThink before you answer.",
    "I was asked the following in an interview - {} - and I had no idea what to say.",
    "Hi! Quick one for you. {} Thanks a lot in advance, I really need this by tonight.",
    "### Task\n{}\n### Rules\nBe brief.",
)
WORDS = ("marble", "lantern", "window", "harbour", "copper", "velvet", "thunder", "pocket", "orchard", "ribbon")
STRAY = ("!", "...", " -", ",", ";", " *", '"')
ANSWERS = ("I would say that it depends.", "Let me think. It is the second one.", "Sure, here you go!")

Disguise = Callable[[str, random.Random], str]


def prefixed(question: str, draw: random.Random) -> str:
    return draw.choice(PREFIXES).format(question)


def quoted(question: str, draw: random.Random) -> str:
    return draw.choice(QUOTES).format(question)


def punctuation_missing(question: str, draw: random.Random) -> str:
    """Remove punctuation, except in numbers and formulas, whose meaning it carries."""
    keep = r"(?<=\d)\s*[.+*/^=<>%-]\s*(?=[\dx])|(?<=\bx)\s*[+*/^=<>-]\s*(?=\d)"
    kept = re.compile(rf"({keep})|[{re.escape(string.punctuation)}。？！，、《》『』“”‘’]")
    return kept.sub(lambda match: match[1] or "", question)


def punctuation_added(question: str, draw: random.Random) -> str:
    words = question.split(" ")
    for _ in range(3):
        place = draw.randrange(len(words))
        if words[place].isalpha() and len(words[place]) > 1:
            words[place] += draw.choice(STRAY)
    return " ".join(words) + draw.choice(("??", "?!", " ...", ""))


def in_arabic_digits(question: str, draw: random.Random) -> str:
    return question.translate(ARABIC_DIGITS)


def word_changed(question: str, draw: random.Random) -> str:
    """Replace a word that is no number; two letters in a script without blanks."""
    words = question.split(" ")
    if len(question.encode()) > 2 * len(question):
        places = [i for i in range(len(question) - 1) if not question[i : i + 2].isascii()]
        place = draw.choice(places)
        return question[:place] + draw.choice(("船城", "ねこ", "ปลา")) + question[place + 2 :]
    places = [i for i, word in enumerate(words) if word.isalpha()]
    words[draw.choice(places)] = draw.choice(WORDS)
    return " ".join(words)


DISGUISES: Mapping[str, Disguise] = {
    "verbatim": lambda question, draw: question,
    "upper case": lambda question, draw: question.upper(),
    "prefixed": prefixed,
    "quoted in a longer prompt": quoted,
    "punctuation missing": punctuation_missing,
    "punctuation added": punctuation_added,
    "Arabic-Indic digits": in_arabic_digits,
    "one word changed": word_changed,
}


def with_options(item: Mapping[str, Any], draw: random.Random, reorder: bool) -> str:
    options = list(item["choices"])
    while reorder and options == item["choices"]:
        draw.shuffle(options)
    lettered = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    return "\n".join([item["question"], *lettered])


@dataclass(frozen=True)
class Outcome:
    """Planted leaks of one kind, how many were found, and examples of those that were not."""

    planted: int
    found: int
    missed: Sequence[str]


def as_row(text: str, draw: random.Random) -> Conversation | str:
    """A row that asks this: a conversation, at times with turns before it, or plain text."""
    answer = draw.choice(ANSWERS)
    form = draw.randrange(4)
    if form == 0:
        return f"{text}\n{answer}"
    asked = (Message("user", text), Message("assistant", answer))
    if form == 1:
        return Conversation((Message("user", "Good evening."), Message("assistant", "What can I do?"), *asked))
    return Conversation(asked)


def evaluations_of(rows: Sequence[Mapping[str, Any]]) -> LeakFinder:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluation.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return LeakFinder([read_evaluation_set(EvaluationSet(str(path)), "against")], 0.7)


def found_rows(evaluations: LeakFinder, rows: Sequence[Conversation | str]) -> dict[int, str]:
    """The numbers of rows that are found, and the rule."""
    found: dict[int, str] = {}
    for at in range(0, len(rows), 4096):
        batch = pa.RecordBatch.from_pydict(records_to_columns(DOCUMENTS, rows[at : at + 4096]))
        leaks = evaluations.find(join_record_texts(DOCUMENTS, batch), join_record_texts(DOCUMENTS, batch, "prompts"))
        found |= {at + text: RULES[rule] for text, rule in zip(leaks.text.tolist(), leaks.rule.tolist(), strict=True)}
    return found


def planted_leaks(
    evaluations: LeakFinder, questions: Sequence[str], disguise: Disguise, draw: random.Random
) -> Outcome:
    texts = [disguise(question, draw) for question in questions]
    found = found_rows(evaluations, [as_row(text, draw) for text in texts])
    missed = [text for i, text in enumerate(texts) if i not in found]
    return Outcome(len(texts), len(found), missed)


def long_questions(count: int) -> list[str]:
    """Long turns of the part of the corpus that nothing trains on."""
    found = [
        turn
        for id, record in load_records().items()
        if assign_part(id) == "test"
        for turn in join_turns(record)
        if 16 <= len(turn.split()) <= 80
    ]
    return found[:count]


def unrelated_rows(count: int) -> list[Conversation]:
    """Pieces of six turns of the other parts of the corpus."""
    rows = list[Conversation]()
    for id, record in sorted(load_records().items()):
        said = join_turns(record)
        if assign_part(id) != "test":
            for at in range(0, len(said) - 1, 3):
                piece = said[at : at + 6]
                rows.append(Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(piece))))
    return rows[:count]


def battery(questions: Mapping[str, Sequence[str]], seed: int) -> dict[tuple[str, str], Outcome]:
    """Leaks of each group of questions (one evaluation set for all) in each disguise."""
    in_one_text = [{"question": with_options(item, random.Random(0), False)} for item in CHOICES[::2]]
    plain = [{"question": question} for group in questions.values() for question in group]
    together = evaluations_of([*plain, *in_one_text, *CHOICES[1::2]])
    outcomes = dict[tuple[str, str], Outcome]()
    for name, disguise in DISGUISES.items():
        for group, of_group in questions.items():
            some = of_group
            if name == "Arabic-Indic digits":
                some = [question for question in of_group if re.search(r"\d", question)]
            if some:
                outcomes[name, group] = planted_leaks(together, some, disguise, random.Random(f"{seed} {name} {group}"))
    draw = random.Random(f"{seed} options")
    for name, reorder in (("with options", False), ("options reordered", True)):
        rows = [with_options(item, draw, reorder) for item in CHOICES * 10]
        found = found_rows(
            together, [as_row(draw.choice(("{}", "Question: {}\nAnswer:")).format(r), draw) for r in rows]
        )
        missed = [row for i, row in enumerate(rows) if i not in found]
        outcomes[name, "choices"] = Outcome(len(rows), len(found), missed)
    return outcomes


def questions_in(paths: Iterable[Path]) -> dict[str, list[str]]:
    found = dict[str, list[str]]()
    for path in paths:
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found[path.stem] = [row.get("question") or row["prompt"] for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--questions", type=Path, nargs="*", default=[])
    parser.add_argument("--unrelated", type=Path, nargs="*", default=[])
    parser.add_argument("--show", type=int, default=0, help="examples of what is missed or taken for a leak")
    given = parser.parse_args()
    questions = {**QUESTIONS, "long": long_questions(300), **questions_in(given.questions)}
    outcomes = battery(questions, given.seed)
    groups = [*questions, "choices"]
    print("| disguise |", " | ".join(groups), "|\n| --- |", " --- |" * len(groups))
    for name in dict.fromkeys(name for name, _ in outcomes):
        cells = [outcomes.get((name, group)) for group in groups]
        shown = (f"{one.found / one.planted:.3f} of {one.planted}" if one else "–" for one in cells)
        print(f"| {name} |", " | ".join(shown), "|")
    for (name, group), outcome in outcomes.items():
        for text in outcome.missed[: given.show]:
            print(f"missed, {name}, {group}: {text!r}")
    everything = [{"question": question} for group in questions.values() for question in group]
    evaluations = evaluations_of(everything)
    rows: list[Conversation | str] = [*unrelated_rows(given.rows)]
    for path in given.unrelated:
        rows += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    began = time.process_time()
    found = found_rows(evaluations, rows)
    seconds = time.process_time() - began
    share = len(found) / len(rows)
    print(f"\nunrelated rows taken for leaks: {len(found)} of {len(rows):,} ({share:.3%}), {len(everything)} questions")
    print(f"{1e6 * seconds / len(rows):.0f} µs of CPU a row")
    print(dict(Counter(found.values())))
    for place, rule in [*found.items()][: given.show]:
        row = rows[place]
        print(f"{rule}: {row if isinstance(row, str) else ' / '.join(turn.content for turn in row.messages)}")


if __name__ == "__main__":
    main()
