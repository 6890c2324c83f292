"""Edit a model's own answers until they follow instructions, for imitation.

Usage: python recipes/instructions/edited_answers.py REQUESTS SAMPLES FILE SEED

REQUESTS is `requests.jsonl`, SAMPLES the `samples.jsonl` of a run of `stage=sample` on it. An answer is cut to whole
sentences and edited: its letters become capitals, a title is put above it, or its last sentence becomes a postscript.
FILE receives pairs of a prompt, which asks for what was edited, and an answer that passes the prompt's check.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instruction_prompts import AVOIDED, KINDS, LEAST_WORDS, build_check, draw_names, write_instruction, write_prompt

from align.reward.checkers import build_checker

EXAMPLES = 900
ATTEMPTS = 30
"""How often a part of an answer and arguments are drawn for the same kinds of instructions."""
TRIES = 10
"""At most this many times `EXAMPLES` answers are tried, because some give no example."""
SENTENCES = 5
"""Most examples are cut to at most this many sentences."""
BREAK = re.compile(r"(?<=[^\d\s][.!?])(?=\s)|(?<=[.!?][”\")])(?=\s)|(?<=[.!?]\*\*)(?=\s)|(?<!\n)(?=\n)")
"""The ends of sentences and of lines. A number and its point, as in lists, end no sentence."""
MARKS = re.compile(r"^\s*(?:[-*•#>]+\s*|\d+[.)]\s+)*|\*+")
"""Numbers and signs of lists, and asterisks, which are removed to get plain text."""
BLANKS = (
    "To: [name]",
    "From: [your name]",
    "Date: [date]",
    "Town: [town]",
    "Email: [email address]",
    "Phone: [phone number]",
    "Item: [item]",
    "Price: [amount]",
)
WHOLE = {"at least": 0.6, "at most": 0.0}
"""The probability of a whole answer by the relation of an instruction on length. It is 0.2 for other instructions."""


@dataclass(slots=True)
class Draft:
    """An answer while it is edited.

    Attributes:
        body: its sentences. Each has the spaces, breaks and signs that stand before it.
        ending: the text behind them.
    """

    body: list[str]
    ending: str = ""

    def write(self) -> str:
        return re.sub(r"\n{3,}", "\n\n", "".join(self.body) + self.ending).strip()


Arguments = Mapping[str, Any]
Edit = Callable[[Draft, Arguments, random.Random], None]


def split_answer(answer: str) -> list[str]:
    """Return the sentences of an answer before the first repeated one, without unfinished ones at the end."""
    sentences: list[str] = []
    plain_sentences: set[str] = set()
    for sentence in BREAK.split(answer.strip()):
        plain = remove_marks(sentence)
        if plain in plain_sentences:
            break
        if plain:
            plain_sentences.add(plain)
            sentences.append(sentence)
    return drop_unfinished(sentences)


def remove_marks(sentence: str) -> str:
    return MARKS.sub("", sentence).strip()


def is_finished(sentence: str) -> bool:
    return sentence.rstrip('*”") ').endswith((".", "!", "?"))


def drop_unfinished(sentences: Sequence[str]) -> list[str]:
    """Return the sentences up to the last one that ends in a full stop or another such sign."""
    finished = [index for index, sentence in enumerate(sentences) if is_finished(sentence)]
    return [*sentences[: finished[-1] + 1]] if finished else []


def find_words(sentences: Sequence[str]) -> list[str]:
    return re.findall(r"\w+", "".join(sentences))


def omit_commas(sentences: Sequence[str]) -> list[str]:
    """Return the finished sentences that have no comma."""
    return [f"{remove_marks(sentence)} " for sentence in sentences if "," not in sentence and is_finished(sentence)]


def omit_words(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    forbidden = {*arguments["forbidden_words"]}
    draft.body = drop_unfinished(
        [sentence for sentence in draft.body if not forbidden & {word.lower() for word in find_words([sentence])}]
    )


def leave_blanks(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body.insert(0, "\n".join(rng.sample(BLANKS, arguments["num_placeholders"])) + "\n\n")


def add_postscript(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    *draft.body, last = draft.body
    draft.ending += f"\n\n{arguments['postscript_marker']} {remove_marks(last)}"
    draft.body = drop_unfinished(draft.body)


def add_end(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.ending += rng.choice([" ", "\n\n"]) + arguments["end_phrase"]


def emphasise(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body = [sentence.replace("*", "") for sentence in draft.body]
    for index in rng.sample(range(len(draft.body)), min(len(draft.body), arguments["num_highlights"])):
        sentence = draft.body[index]
        if phrases := [match.span() for match in re.finditer(r"\w[\w'-]*(?: \w[\w'-]*){0,2}", sentence)]:
            start, end = rng.choice(phrases)
            draft.body[index] = f"{sentence[:start]}*{sentence[start:end]}*{sentence[end:]}"


def make_list(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body = [f"* {remove_marks(sentence)}\n" for sentence in draft.body[: arguments["num_bullets"]]]


def divide_into_sections(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    count = min(arguments["num_sections"], len(draft.body))
    size = len(draft.body) // max(1, count)
    for section in range(count):
        heading = f"\n\n{arguments['section_spliter']} {section + 1}\n"
        draft.body[section * size] = heading + draft.body[section * size].lstrip()


def add_title(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body.insert(0, f"<<{arguments['topic'].title()}>>\n\n")


def write_small(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body = [sentence.lower() for sentence in draft.body]


def write_capitals(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body = [sentence.upper() for sentence in draft.body]


def quote(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    draft.body = ['"' + draft.write().replace('"', "'") + '"']
    draft.ending = ""


def write_json(draft: Draft, arguments: Arguments, rng: random.Random) -> None:
    plain = [remove_marks(sentence) for sentence in draft.body]
    value = rng.choice([{"answer": " ".join(plain)}, {"text": " ".join(plain)}, {"points": plain}])
    draft.body = [json.dumps(value, ensure_ascii=False, indent=rng.choice([None, 2]))]


EDITS: dict[str, Edit] = {
    "forbidden_words": omit_words,
    "postscript": add_postscript,
    "end_checker": add_end,
    "number_highlighted_sections": emphasise,
    "number_bullet_lists": make_list,
    "multiple_sections": divide_into_sections,
    "number_placeholders": leave_blanks,
    "title": add_title,
    "english_lowercase": write_small,
    "english_capital": write_capitals,
    "quotation": quote,
    "json_format": write_json,
}
"""The edits in the order in which they are made. Commas are omitted before. The three kinds that are left need no edit,
because their arguments are drawn to fit the answer."""


def draw_part(sentences: Sequence[str], least: int, whole_probability: float, rng: random.Random) -> list[str]:
    """Return the first sentences of an answer, or all of them.

    Args:
        least: the smallest number of sentences, before unfinished ones at the end are dropped.
        whole_probability: the probability that all of them are returned.
    """
    if rng.random() < whole_probability:
        return [*sentences]
    return drop_unfinished(sentences[: rng.randint(least, max(least, SENTENCES))])


def fit_arguments(name: str, body: Sequence[str], relation: str, rng: random.Random) -> dict[str, Any]:
    """Return arguments of an instruction that a text follows, or nearly. Returns no arguments for kinds by which the
    text is edited.

    Args:
        relation: of a length, `at least` or `at most`. Ignored for other kinds.
    """
    words = find_words(body)
    match name:
        case "existence":
            longest = sorted({word.lower() for word in words}, key=lambda word: (len(word), word))[-8:]
            return {"keywords": rng.sample(longest, min(len(longest), rng.randint(2, 3)))}
        case "forbidden_words":
            present = [word for word in AVOIDED if word in words]
            others = [word for word in AVOIDED if word not in words]
            used = rng.sample(present, min(len(present), rng.randint(0, 2)))
            return {"forbidden_words": [*used, *rng.sample(others, min(len(others), 3 - len(used)))]}
        case "number_words" if relation == "at least":
            return {"num_words": max(30, rng.randint(6, 10) * len(words) // 100 * 10)}
        case "number_words":
            return {"num_words": max(20, rng.randint(10, 14) * len(words) // 100 * 10 + 10)}
        case "number_sentences":
            low, high = (-2, 0) if relation == "at least" else (0, 1)
            return {"num_sentences": max(2, len(body) + rng.randint(low, high))}
        case _:
            return {}


def build_example(
    names: Sequence[str], topic: str, request: str, sentences: Sequence[str], rng: random.Random
) -> dict[str, Any] | None:
    """Return a row with a prompt that has instructions of these kinds, an answer, and the check that the answer passes.
    Returns None if none was found."""
    for _ in range(ATTEMPTS):
        arguments = {name: KINDS[name].draw(rng) for name in names}
        relation = next((values["relation"] for values in arguments.values() if "relation" in values), "")
        counts = (
            values.get(key, 1)
            for values in arguments.values()
            for key in ("num_bullets", "num_sections", "num_highlights")
        )
        least = max(counts) + ("postscript" in names)
        draft = Draft(draw_part(sentences, least, WHOLE.get(relation, 0.2), rng))
        if "no_comma" in names:
            draft.body = omit_commas(draft.body)
        if len(find_words(draft.body)) < LEAST_WORDS:
            continue
        for name in names:
            arguments[name].update(fit_arguments(name, draft.body, relation, rng))
        for name, edit in EDITS.items():
            if name in names and draft.body:
                edit(draft, {**arguments[name], "topic": topic}, rng)
        instructions = [write_instruction(name, arguments[name], rng) for name in names]
        check = build_check(instructions)
        answer = draft.write()
        if draft.body and build_checker(check, request)(answer).score == 1:
            return {"prompt": write_prompt(request, instructions, rng), "completion": answer, "check": check}
    return None


def iter_answers(requests: Sequence[Mapping[str, Any]], samples: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the topic, the request and the sentences of each answer that has finished ones."""
    topics = {row["prompt"]: row["topic"] for row in requests}
    with samples.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            request = row["prompt"][-1]["content"]
            if sentences := split_answer(row["answer"]):
                yield topics[request], request, sentences


def main(requests: Path, samples: Path, file: Path, seed: int) -> None:
    rng = random.Random(seed)
    with requests.open(encoding="utf-8") as lines:
        answers = [*iter_answers([json.loads(line) for line in lines], samples)]
    examples: list[dict[str, Any]] = []
    for _ in range(TRIES * EXAMPLES if answers else 0):
        example = build_example(draw_names(rng), *rng.choice(answers), rng)
        if example:
            examples.append(example)
        if len(examples) == EXAMPLES:
            break
    else:
        raise SystemExit(
            f"{samples}: only {len(examples)} of {EXAMPLES} examples could be made of its {len(answers)} answers with "
            f"finished sentences. Sample longer answers, or from another model"
        )
    file.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    print(f"{file}: {len(examples)} examples from {len(answers)} answers")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
