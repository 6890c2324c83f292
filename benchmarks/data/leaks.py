"""Measure how many planted leaks of evaluation questions are found, by disguise, and how many unrelated rows match.

    python benchmarks/data/leaks.py [--seed 0] [--rows 20000] [--questions FILE …] [--unrelated FILE …]

Questions are from `leaks.json`, and long turns of the part `test` of the built-in corpus. `--questions` adds JSON lines
with a `question` or a `prompt`; `--unrelated` adds JSON lines with a `text`. Unrelated rows are pieces of conversations
of the corpus's other parts.
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
STRAY_PUNCTUATION = ("!", "...", " -", ",", ";", " *", '"')
ANSWERS = ("I would say that it depends.", "Let me think. It is the second one.", "Sure, here you go!")

Disguise = Callable[[str, random.Random], str]


def add_prefix(question: str, draw: random.Random) -> str:
    return draw.choice(PREFIXES).format(question)


def quote_in_prompt(question: str, draw: random.Random) -> str:
    return draw.choice(QUOTES).format(question)


def remove_punctuation(question: str, draw: random.Random) -> str:
    """Remove punctuation, except in numbers and formulas, where it has a meaning."""
    numeric = r"(?<=\d)\s*[.+*/^=<>%-]\s*(?=[\dx])|(?<=\bx)\s*[+*/^=<>-]\s*(?=\d)"
    pattern = re.compile(rf"({numeric})|[{re.escape(string.punctuation)}。？！，、《》『』“”‘’]")
    return pattern.sub(lambda match: match[1] or "", question)


def add_punctuation(question: str, draw: random.Random) -> str:
    words = question.split(" ")
    for _ in range(3):
        i = draw.randrange(len(words))
        if words[i].isalpha() and len(words[i]) > 1:
            words[i] += draw.choice(STRAY_PUNCTUATION)
    return " ".join(words) + draw.choice(("??", "?!", " ...", ""))


def use_arabic_digits(question: str, draw: random.Random) -> str:
    return question.translate(ARABIC_DIGITS)


def replace_word(question: str, draw: random.Random) -> str:
    """Replace a word that is not a number, or two letters in a script without blanks."""
    words = question.split(" ")
    if len(question.encode()) > 2 * len(question):
        positions = [i for i in range(len(question) - 1) if not question[i : i + 2].isascii()]
        position = draw.choice(positions)
        return question[:position] + draw.choice(("船城", "ねこ", "ปลา")) + question[position + 2 :]
    indexes = [i for i, word in enumerate(words) if word.isalpha()]
    words[draw.choice(indexes)] = draw.choice(WORDS)
    return " ".join(words)


DISGUISES: Mapping[str, Disguise] = {
    "verbatim": lambda question, draw: question,
    "upper case": lambda question, draw: question.upper(),
    "prefixed": add_prefix,
    "quoted in a longer prompt": quote_in_prompt,
    "punctuation missing": remove_punctuation,
    "punctuation added": add_punctuation,
    "Arabic-Indic digits": use_arabic_digits,
    "one word changed": replace_word,
}


def format_with_options(item: Mapping[str, Any], draw: random.Random, reorder: bool) -> str:
    """Return a multiple-choice question with its lettered options."""
    options = list(item["choices"])
    while reorder and options == item["choices"]:
        draw.shuffle(options)
    lettered = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    return "\n".join([item["question"], *lettered])


@dataclass(frozen=True)
class LeakOutcome:
    """Results for planted leaks of one kind.

    Attributes:
        planted: number of planted leaks.
        found: number of those that were found.
        missed: texts of those that were not.
    """

    planted: int
    found: int
    missed: Sequence[str]


def create_row(text: str, draw: random.Random) -> Conversation | str:
    """Return a training row with this question: a conversation, sometimes with turns before it, or plain text."""
    answer = draw.choice(ANSWERS)
    form = draw.randrange(4)
    if form == 0:
        return f"{text}\n{answer}"
    exchange = (Message("user", text), Message("assistant", answer))
    if form == 1:
        return Conversation((Message("user", "Good evening."), Message("assistant", "What can I do?"), *exchange))
    return Conversation(exchange)


def create_evaluations(rows: Sequence[Mapping[str, Any]]) -> LeakFinder:
    """Return the matcher of an evaluation set with these rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluation.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return LeakFinder([read_evaluation_set(EvaluationSet(str(path)), "against")], 0.7)


def find_leaks(evaluations: LeakFinder, rows: Sequence[Conversation | str]) -> dict[int, str]:
    """Return the indexes of the rows that match an evaluation question, with the rule that matched."""
    rules: dict[int, str] = {}
    for start in range(0, len(rows), 4096):
        batch = pa.RecordBatch.from_pydict(records_to_columns(DOCUMENTS, rows[start : start + 4096]))
        leaks = evaluations.find_leaks_in_batch(
            join_record_texts(DOCUMENTS, batch), join_record_texts(DOCUMENTS, batch, "prompts")
        )
        for text, rule in zip(leaks.text.tolist(), leaks.rule.tolist(), strict=True):
            rules[start + text] = RULES[rule]
    return rules


def count_found_leaks(evaluations: LeakFinder, texts: Sequence[str], rows: Sequence[Conversation | str]) -> LeakOutcome:
    """Count the rows that are found. `texts` are the questions in them."""
    leaks = find_leaks(evaluations, rows)
    missed = [text for i, text in enumerate(texts) if i not in leaks]
    return LeakOutcome(len(texts), len(leaks), missed)


def load_long_questions(count: int) -> list[str]:
    """Return long turns of the part of the corpus that is not used for training."""
    questions = [
        turn
        for id, record in load_records().items()
        if assign_part(id) == "test"
        for turn in join_turns(record)
        if 16 <= len(turn.split()) <= 80
    ]
    return questions[:count]


def load_unrelated_rows(count: int) -> list[Conversation]:
    """Return pieces of six turns of the other parts of the corpus."""
    rows = list[Conversation]()
    for id, record in sorted(load_records().items()):
        conversation = join_turns(record)
        if assign_part(id) != "test":
            for start in range(0, len(conversation) - 1, 3):
                piece = conversation[start : start + 6]
                messages = (Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(piece))
                rows.append(Conversation(tuple(messages)))
    return rows[:count]


def measure_leaks(questions: Mapping[str, Sequence[str]], seed: int) -> dict[tuple[str, str], LeakOutcome]:
    """Plant the questions in each disguise. One evaluation set has all questions.

    Returns outcomes by disguise and group.

    Args:
        questions: by group.
    """
    plain_rows = [{"question": question} for group in questions.values() for question in group]
    rows_with_options = [{"question": format_with_options(item, random.Random(0), False)} for item in CHOICES[::2]]
    evaluations = create_evaluations([*plain_rows, *rows_with_options, *CHOICES[1::2]])
    outcomes = dict[tuple[str, str], LeakOutcome]()
    for name, disguise in DISGUISES.items():
        for group, group_questions in questions.items():
            selected = group_questions
            if name == "Arabic-Indic digits":
                selected = [question for question in group_questions if re.search(r"\d", question)]
            if selected:
                draw = random.Random(f"{seed} {name} {group}")
                texts = [disguise(question, draw) for question in selected]
                rows = [create_row(text, draw) for text in texts]
                outcomes[name, group] = count_found_leaks(evaluations, texts, rows)
    draw = random.Random(f"{seed} options")
    for name, reorder in (("with options", False), ("options reordered", True)):
        texts = [format_with_options(item, draw, reorder) for item in CHOICES * 10]
        rows = [create_row(draw.choice(("{}", "Question: {}\nAnswer:")).format(text), draw) for text in texts]
        outcomes[name, "choices"] = count_found_leaks(evaluations, texts, rows)
    return outcomes


def read_questions(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Return the questions of each file, by its name without the ending."""
    questions = dict[str, list[str]]()
    for path in paths:
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        questions[path.stem] = [row.get("question") or row["prompt"] for row in rows]
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--questions", type=Path, nargs="*", default=[])
    parser.add_argument("--unrelated", type=Path, nargs="*", default=[])
    parser.add_argument("--show", type=int, default=0, help="number of examples of missed leaks and of wrong matches")
    options = parser.parse_args()
    questions = {**QUESTIONS, "long": load_long_questions(300), **read_questions(options.questions)}
    outcomes = measure_leaks(questions, options.seed)
    groups = [*questions, "choices"]
    print("| disguise |", " | ".join(groups), "|\n| --- |", " --- |" * len(groups))
    for name in dict.fromkeys(name for name, _ in outcomes):
        cells = []
        for group in groups:
            outcome = outcomes.get((name, group))
            cells.append(f"{outcome.found / outcome.planted:.3f} of {outcome.planted}" if outcome else "–")
        print(f"| {name} |", " | ".join(cells), "|")
    for (name, group), outcome in outcomes.items():
        for text in outcome.missed[: options.show]:
            print(f"missed, {name}, {group}: {text!r}")
    question_rows = [{"question": question} for group in questions.values() for question in group]
    evaluations = create_evaluations(question_rows)
    rows: list[Conversation | str] = [*load_unrelated_rows(options.rows)]
    for path in options.unrelated:
        rows += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    start = time.process_time()
    leaks = find_leaks(evaluations, rows)
    seconds = time.process_time() - start
    share = len(leaks) / len(rows)
    print(
        f"\nunrelated rows taken for leaks: {len(leaks)} of {len(rows):,} ({share:.3%}), {len(question_rows)} questions"
    )
    print(f"{1e6 * seconds / len(rows):.0f} µs of CPU a row")
    print(dict(Counter(leaks.values())))
    for i, rule in [*leaks.items()][: options.show]:
        row = rows[i]
        print(f"{rule}: {row if isinstance(row, str) else ' / '.join(turn.content for turn in row.messages)}")


if __name__ == "__main__":
    main()
