"""Write prompts with instructions that a program can check: 16 of IFEval's 25 kinds, with other topics and wordings.

Usage: python recipes/instructions/instruction_prompts.py FOLDER SEED [--compare IFEVAL_FILE]

The files are `examples.jsonl` (prompts whose passing answers are imitated), `practice.jsonl` (prompts of GRPO) and
`held_out.jsonl`. What a prompt is about, such as otters, is in one of them only. `--compare` lists runs of five words
that a prompt shares with IFEval's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"examples": 600, "practice": 2000, "held_out": 200}
SHARES = {"examples": 0.3, "practice": 0.5, "held_out": 0.2}
"""Shares of `THINGS` that the prompts of each file are about."""
LEAST_WORDS = 12
"""Length floor of each answer, in words. It is checked, and no prompt mentions it: a policy that is rewarded for
instructions alone learns to answer in three words."""
SHARED_WORDS = 5
"""Length of the runs of words that no prompt may share with IFEval's."""

REQUESTS = (
    "Tell me about {topic}.",
    "I would like to know more about {topic}.",
    "What should a beginner know about {topic}?",
    "Give me a few thoughts on {topic}.",
    "Can you say something about {topic}?",
    "My niece is curious about {topic}. What would you tell her?",
    "I am preparing a talk on {topic}. Help me with it.",
    "Why do people care about {topic}?",
)
THINGS = [
    thing
    for things in (
        "otters, owls, hedgehogs, seahorses, beavers, ravens, snails, bats, geese, lizards, goldfish, ponies",
        "ferns, sunflowers, moss, bamboo, roses, oak trees, cacti, herbs, tulips, ivy, orchids, clover",
        "sourdough, lentil soup, olive oil, pickles, honey, pancakes, mustard, dumplings, cheese, porridge, chutney",
        "knitting, pottery, bookbinding, origami, weaving, wood carving, quilting, embroidery, calligraphy",
        "hiking, kayaking, birdwatching, camping, ice skating, stargazing, orienteering, surfing, rowing",
        "old furniture, cleaning windows, houseplants, compost, a tidy desk, small kitchens, curtains, a leaking tap",
        "magnets, rainbows, volcanoes, tides, fossils, comets, soap bubbles, static electricity, glaciers, echoes",
        "waking up early, long train rides, letters to friends, neighbours, lost keys, packed lunches, rainy days",
        "the cello, drums, choirs, lullabies, the accordion, folk songs, whistling, record players, church bells",
        "bicycles, lighthouses, clocks, sewing machines, windmills, lifts, typewriters, kites, steam trains, locks",
    )
    for thing in things.split(", ")
]
SIDES = (
    "",
    "in winter",
    "for children",
    "in a big city",
    "on a small budget",
    "a hundred years ago",
    "as a gift",
    "in old stories",
)
"""What is added to a thing, so that there are enough different requests."""
KEYWORDS = [
    "morning",
    "water",
    "friend",
    "simple",
    "learn",
    "garden",
    "quiet",
    "hands",
    "careful",
    "history",
    "letter",
    "weekend",
]
AVOIDED = ["very", "really", "people", "also", "good", "important", "great", "like", "many", "because"]
CLOSINGS = (
    "That is all for now.",
    "I hope this helps.",
    "Enjoy your day.",
    "Take care out there.",
    "Now it is your turn.",
)


class Instruction(NamedTuple):
    """An instruction with its arguments: the constraint of a check, and the sentence that asks for it."""

    constraint: dict[str, Any]
    sentence: str


@dataclass(frozen=True, slots=True)
class InstructionKind:
    """One of IFEval's kinds of instructions, in our words.

    Attributes:
        slot: what the instruction is about. A prompt has at most one instruction of each slot.
        wordings: sentences that ask for it, with the names of arguments in braces.
        draw: returns random arguments.
        excludes: slots that an answer cannot follow at the same time.
    """

    slot: str
    wordings: Sequence[str]
    draw: Callable[[random.Random], dict[str, Any]] = lambda chance: {}
    excludes: frozenset[str] = frozenset()


def draw_number(name: str, low: int, high: int) -> Callable[[random.Random], dict[str, Any]]:
    return lambda chance: {name: chance.randint(low, high)}


def draw_word_limit(chance: random.Random) -> dict[str, Any]:
    if chance.random() < 0.5:
        return {"relation": "at least", "num_words": chance.randrange(40, 121, 10)}
    return {"relation": "at most", "num_words": chance.randrange(30, 91, 10)}


def draw_sentence_limit(chance: random.Random) -> dict[str, Any]:
    return {"relation": chance.choice(["at least", "at most"]), "num_sentences": chance.randint(2, 5)}


KINDS: dict[str, InstructionKind] = {
    "number_words": InstructionKind(
        "length",
        (
            "Use {relation} {num_words} words.",
            "Make it {relation} {num_words} words long.",
            "I need {relation} {num_words} words.",
            "Length: {relation} {num_words} words.",
        ),
        draw_word_limit,
    ),
    "number_sentences": InstructionKind(
        "length",
        (
            "Number of sentences: {relation} {num_sentences}.",
            "Say it in {relation} {num_sentences} sentences, please.",
            "It should be {relation} {num_sentences} sentences long.",
            "Length in sentences: {relation} {num_sentences}.",
        ),
        draw_sentence_limit,
        frozenset(["layout", "ending"]),
    ),
    "number_bullet_lists": InstructionKind(
        "layout",
        (
            "Make it a list with exactly {num_bullets} points, each on a line that starts with *.",
            "I want {num_bullets} bullets, no more and no fewer. Begin every bullet with * and a space.",
            "Write {num_bullets} sentences, each one on its own line with * in front.",
            "Explain {num_bullets} things, each on a line of its own, and put * before each line.",
        ),
        draw_number("num_bullets", 3, 5),
        frozenset(["marks"]),  # the asterisks of both could be counted as the other's
    ),
    "multiple_sections": InstructionKind(
        "layout",
        (
            "Divide it into {num_sections} numbered parts and call them Part 1, Part 2 and so forth.",
            "Use {num_sections} parts under the headings Part 1, Part 2, ….",
            "Structure it in {num_sections} parts. Head each of them with Part and its number in digits.",
            "It needs {num_sections} parts, titled Part 1 and upwards.",
        ),
        lambda chance: {"section_spliter": "Part", "num_sections": chance.randint(2, 4)},
        frozenset(["case"]),
    ),
    "json_format": InstructionKind(
        "layout",
        (
            "Answer with JSON and nothing besides it.",
            "I will parse your reply as JSON, so write only valid JSON.",
            "Put everything into one piece of JSON.",
            "Reply in JSON, without any text around it.",
        ),
        excludes=frozenset(["case", "length", "opening", "ending", "marks", "punctuation"]),
    ),
    "title": InstructionKind(
        "opening",
        (
            "Start with a heading between << and >>, like <<A Day Out>>.",
            "Give it a title that stands in << and >>.",
            "Add a name for the text at the top, written <<like this>>.",
            "Above the text I want a title, with << before it and >> after it.",
        ),
        excludes=frozenset(["wrapping"]),
    ),
    "postscript": InstructionKind(
        "ending",
        (
            'Write a postscript that opens with "{postscript_marker}".',
            'Close with a short remark after "{postscript_marker}".',
            'Under the text, add one more line that begins "{postscript_marker}".',
            'Do not forget a final note; introduce it by "{postscript_marker}".',
        ),
        lambda chance: {"postscript_marker": chance.choice(["P.S.", "P.P.S"])},
        frozenset(["wrapping"]),
    ),
    "end_checker": InstructionKind(
        "ending",
        (
            'Close with exactly these words: "{end_phrase}"',
            'The last thing you write must be "{end_phrase}"',
            'Stop right after the sentence "{end_phrase}"',
            'End on "{end_phrase}" and write nothing behind it.',
        ),
        lambda chance: {"end_phrase": chance.choice(CLOSINGS)},
        frozenset(["wrapping"]),
    ),
    "quotation": InstructionKind(
        "wrapping",
        (
            'Put a " in front of the whole text and another " behind it.',
            'Your text has to begin with " and close with " as well.',
            'Set everything you write in quotation marks: the first and the last character are ".',
            'Quote yourself: open with " and finish with ".',
        ),
        excludes=frozenset(["opening", "ending", "layout"]),
    ),
    "english_lowercase": InstructionKind(
        "case",
        (
            "Use small letters only, even at the start of sentences.",
            "Do not use a single capital. Write English.",
            "Everything in English and in small letters, please.",
            "No uppercase anywhere, and plain English.",
        ),
        excludes=frozenset(["layout", "ending", "marks"]),
    ),
    "english_capital": InstructionKind(
        "case",
        (
            "WRITE IT ALL IN CAPITALS, IN ENGLISH.",
            "Use uppercase for every letter, and plain English.",
            "Shout: English, with capitals from the first letter to the last.",
            "All of it in big letters, please, and in English.",
        ),
        excludes=frozenset(["layout", "ending", "marks"]),
    ),
    "existence": InstructionKind(
        "words",
        (
            "Work in the words {keywords}.",
            "These words must occur: {keywords}.",
            "Use each of these at least once: {keywords}.",
            "Somewhere in it I want to read {keywords}.",
        ),
        lambda chance: {"keywords": chance.sample(KEYWORDS, chance.randint(1, 2))},
    ),
    "forbidden_words": InstructionKind(
        "words",
        (
            "Avoid these words: {forbidden_words}.",
            "Get by without {forbidden_words}.",
            "Never say {forbidden_words}.",
            "These words are taboo: {forbidden_words}.",
        ),
        lambda chance: {"forbidden_words": chance.sample(AVOIDED, chance.randint(1, 3))},
    ),
    "no_comma": InstructionKind(
        "punctuation",
        (
            "Leave out every comma.",
            "Commas are forbidden.",
            "Write without commas.",
            "Not one comma, please.",
        ),
    ),
    "number_highlighted_sections": InstructionKind(
        "marks",
        (
            "Mark {num_highlights} or more phrases *like this*.",
            "Set at least {num_highlights} passages between single asterisks, *so*.",
            "Emphasise {num_highlights} spots or more by *asterisks* around them.",
            "There should be {num_highlights} or more bits in *asterisks*.",
        ),
        draw_number("num_highlights", 2, 4),
    ),
    "number_placeholders": InstructionKind(
        "marks",
        (
            "Leave {num_placeholders} or more blanks for me to fill in, written like [town].",
            "Where my details belong, write [detail]; I want {num_placeholders} or more of these.",
            "Use {num_placeholders} or more gaps such as [your name].",
            "Put in square brackets what I have to fill in, as in [date], {num_placeholders} times or more.",
        ),
        draw_number("num_placeholders", 2, 4),
    ),
}
"""IFEval's name of an instruction → its kind here. Evaluation asks the other nine kinds too."""


def draw_instructions(chance: random.Random) -> list[Instruction]:
    """Return one to three instructions of different slots that one answer can follow."""
    names = chance.sample(sorted(KINDS), len(KINDS))
    count = chance.choices([1, 2, 3], [7, 2, 1])[0]
    combination: list[str] = []
    for name in names:
        if len(combination) < count and all(can_combine(KINDS[name], KINDS[earlier]) for earlier in combination):
            combination.append(name)
    return [draw_instruction(name, chance) for name in combination]


def can_combine(first: InstructionKind, second: InstructionKind) -> bool:
    return first.slot != second.slot and first.slot not in second.excludes and second.slot not in first.excludes


def draw_instruction(name: str, chance: random.Random) -> Instruction:
    arguments = KINDS[name].draw(chance)
    wording = chance.choice(KINDS[name].wordings)
    texts = {
        key: ", ".join(f'"{word}"' for word in value) if isinstance(value, list) else value
        for key, value in arguments.items()
    }
    return Instruction({"name": name, **arguments}, wording.format(**texts))


def build_row(thing: str, number: int, chance: random.Random) -> dict[str, Any]:
    """Return a prompt about a thing with its instructions, which stand behind the request or before it, and with the
    check of its answers."""
    instructions = draw_instructions(chance)
    request = chance.choice(REQUESTS).format(topic=f"{thing} {chance.choice(SIDES)}".strip())
    sentences = " ".join(instruction.sentence for instruction in instructions)
    parts = [request, sentences] if chance.random() < 0.7 else [sentences, request]
    floor = {"name": "number_words", "relation": "at least", "num_words": LEAST_WORDS}
    constraints = [*(instruction.constraint for instruction in instructions), floor]
    return {
        "id": str(number),
        "prompt": chance.choice(["\n", " "]).join(parts),
        "source": thing,
        "check": {"kind": "instructions", "constraints": constraints},
    }


def build_parts(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file."""
    chance = random.Random(seed)
    things = chance.sample(THINGS, len(THINGS))
    parts: dict[str, list[dict[str, Any]]] = {}
    first = 0
    for name, size in SIZES.items():
        share = things[first : first + round(SHARES[name] * len(things))]
        first += len(share)
        parts[name] = [build_row(share[number % len(share)], number, chance) for number in range(size)]
    return parts


def iter_shared_runs(prompts: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """Yield each run of `SHARED_WORDS` words of the prompts that one of the other prompts has too."""
    runs, their_runs = ({run for text in texts for run in iter_runs(text)} for texts in (prompts, others))
    yield from sorted(runs & their_runs)


def iter_runs(text: str) -> Iterator[str]:
    words = "".join(sign if sign.isalnum() else " " for sign in text.lower()).split()
    for first in range(len(words) - SHARED_WORDS + 1):
        yield " ".join(words[first : first + SHARED_WORDS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--compare", type=Path, help="IFEval's prompts, a JSON Lines file with the column `prompt`")
    options = parser.parse_args()
    parts = build_parts(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.folder / name}.jsonl: {len(rows)} prompts, such as {rows[0]['prompt']!r}")
    if options.compare:
        lines = options.compare.read_text(encoding="utf-8").splitlines()
        shared = [
            *iter_shared_runs(
                [row["prompt"] for rows in parts.values() for row in rows],
                [json.loads(line)["prompt"] for line in lines],
            )
        ]
        print(f"runs of {SHARED_WORDS} words that IFEval has too: {', '.join(map(repr, shared)) or 'none'}")


if __name__ == "__main__":
    main()
