"""Write prompts with instructions that a program can check: 16 of IFEval's 25 kinds, with other topics and wordings.

Usage: python recipes/instructions/instruction_prompts.py FOLDER SEED [--compare IFEVAL_FILE]

The files are `requests.jsonl` (without instructions: `edited_answers.py` adds them to the answers), `practice.jsonl`
(prompts of GRPO) and `held_out.jsonl`. What a prompt is about, such as otters, is in one of them only. `--compare`
lists runs of five words that a prompt shares with IFEval's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"requests": 400, "practice": 640, "held_out": 200}
SHARES = {"requests": 0.3, "practice": 0.5, "held_out": 0.2}
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
    "Write a story that has to do with {topic}.",
    "Compose an email to a colleague about {topic}.",
    "Make up a little poem on {topic}.",
    "Draft an advertisement on the subject of {topic}.",
    "Describe {topic} to somebody who has never heard of it.",
    "List what is good and what is bad about {topic}.",
    "Write the opening of a blog entry on {topic}.",
    "Help a person who wants to learn about {topic}.",
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
    "See you soon.",
    "Try it yourself.",
    "More about this tomorrow.",
    "Thank you for asking.",
    "And so it goes on.",
    "Good luck with it.",
)
HEADINGS = ("Part", "Section", "Chapter", "Day", "Step")


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
    draw: Callable[[random.Random], dict[str, Any]] = lambda rng: {}
    excludes: frozenset[str] = frozenset()


def draw_number(name: str, low: int, high: int) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {name: rng.randint(low, high)}


def draw_word_limit(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"relation": "at least", "num_words": rng.randrange(40, 121, 10)}
    return {"relation": "at most", "num_words": rng.randrange(30, 91, 10)}


def draw_sentence_limit(rng: random.Random) -> dict[str, Any]:
    return {"relation": rng.choice(["at least", "at most"]), "num_sentences": rng.randint(2, 5)}


KINDS: dict[str, InstructionKind] = {
    "number_words": InstructionKind(
        "length",
        (
            "Use {relation} {num_words} words.",
            "Make it {relation} {num_words} words long.",
            "I need {relation} {num_words} words.",
            "Length: {relation} {num_words} words.",
            "The words should number {relation} {num_words}.",
            "Word count: {relation} {num_words}, please.",
            "Word limit: {relation} {num_words}.",
            "Let the number of words be {relation} {num_words}.",
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
            "Limit for the sentences: {relation} {num_sentences}.",
            "Let there be {relation} {num_sentences} sentences in it.",
            "Sentences needed for this: {relation} {num_sentences}.",
            "How many sentences? Please {relation} {num_sentences}.",
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
            "Reply with {num_bullets} markdown bullets, like:\n* One thing\n* Another",
            "Use bullet points (lines with * at the start), {num_bullets} of them exactly.",
            "It has to consist of {num_bullets} markdown bullets.",
            "Give exactly {num_bullets} bullet points.\n* They look like this",
        ),
        draw_number("num_bullets", 3, 5),
        frozenset(["marks"]),  # the asterisks of both could be counted as the other's
    ),
    "multiple_sections": InstructionKind(
        "layout",
        (
            "Divide it into {num_sections} numbered sections: {section_spliter} 1, {section_spliter} 2 and so forth.",
            "Use {num_sections} headings, {section_spliter} 1, {section_spliter} 2, …, with text under each.",
            "Structure it in {num_sections} pieces. Head each of them with {section_spliter} and its number in digits.",
            "It needs {num_sections} pieces, titled {section_spliter} 1 and upwards.",
            "Please write {num_sections} sections. Mark their beginnings: {section_spliter} 1, {section_spliter} 2, ….",
            "Break it into {num_sections} sections, each under a line such as {section_spliter} 1.",
            "Have {num_sections} sections; label them {section_spliter} 1, {section_spliter} 2, and onwards.",
            "Separate the text into {num_sections} pieces headed {section_spliter} 1, {section_spliter} 2 etc.",
        ),
        lambda rng: {"section_spliter": rng.choice(HEADINGS), "num_sections": rng.randint(2, 4)},
        frozenset(["case"]),
    ),
    "json_format": InstructionKind(
        "layout",
        (
            "Answer with JSON and nothing besides it.",
            "I will parse your reply as JSON, so write only valid JSON.",
            "Put everything into one piece of JSON.",
            "Reply in JSON, without any text around it.",
            "Give the whole text in JSON format.",
            "Use the JSON format for your output.",
            "Wrap all of it as JSON, please.",
            "Format: JSON, nothing else.",
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
            "Provide a title between double angle brackets, for example <<My Garden>>.",
            "The text needs a title, which is set <<like this>>.",
            "Put a title on top, between << and >>, say <<New Shoes>>.",
            "Include a heading wrapped as <<heading>>.",
        ),
        excludes=frozenset(["wrapping"]),
    ),
    "postscript": InstructionKind(
        "ending",
        (
            'Write a postscript, introduced by "{postscript_marker}".',
            'Close with a short remark after "{postscript_marker}".',
            'Under the text, add one more line that begins "{postscript_marker}".',
            'Do not forget a final note behind "{postscript_marker}".',
            'At the very end there should be a postscript after "{postscript_marker}".',
            'Finish by adding a postscript. Its first letters are "{postscript_marker}".',
            'Have a postscript too, marked "{postscript_marker}".',
            'Please attach a postscript; put "{postscript_marker}" before it.',
        ),
        lambda rng: {"postscript_marker": rng.choice(["P.S.", "P.P.S"])},
        frozenset(["wrapping"]),
    ),
    "end_checker": InstructionKind(
        "ending",
        (
            'Close with exactly these words: "{end_phrase}"',
            'The last thing you write must be "{end_phrase}"',
            'Stop right after the sentence "{end_phrase}"',
            'End on "{end_phrase}" and write nothing after it.',
            'Let the text finish with the phrase "{end_phrase}" and add no words behind it.',
            'Your final words should be: "{end_phrase}" Nothing follows them.',
            'The closing phrase is "{end_phrase}", exactly so.',
            'Make "{end_phrase}" the last sentence, with nothing after.',
        ),
        lambda rng: {"end_phrase": rng.choice(CLOSINGS)},
        frozenset(["wrapping"]),
    ),
    "quotation": InstructionKind(
        "wrapping",
        (
            'Put a " in front of the whole text and another " behind it.',
            'Your text has to begin with " and close with " as well.',
            'Set everything you write in quotation marks: the first and the last character are ".',
            'Quote yourself: open with " and finish with ".',
            "Enclose the whole of it in double quotes.",
            "Double quotation marks should surround your full text.",
            "Place double quotes around everything you say.",
            'Surround the complete answer with " signs.',
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
            "Write in lowercase letters throughout, in English.",
            "Only lowercase, in the English language.",
            "Please use English without any capitals: all lowercase.",
            "Capital letters must be avoided entirely. Answer in English.",
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
            "Capitalize every single letter of your English text.",
            "English, but only with capital letters.",
            "Every letter must be a capital, and the language English.",
            "Use capital letters only and write English.",
        ),
        excludes=frozenset(["layout", "ending", "marks"]),
    ),
    "existence": InstructionKind(
        "words",
        (
            "Work in all of these: {keywords}.",
            "These words must occur: {keywords}.",
            "Use each of these at least once: {keywords}.",
            "Somewhere in it I want to read {keywords}.",
            "Make sure that {keywords} can be found in it.",
            "Do include {keywords}.",
            "Please add the following: {keywords}.",
            "Keywords that have to appear: {keywords}.",
        ),
        lambda rng: {"keywords": rng.sample(KEYWORDS, rng.randint(2, 3))},
    ),
    "forbidden_words": InstructionKind(
        "words",
        (
            "Avoid these words: {forbidden_words}.",
            "Get by without {forbidden_words}.",
            "Never say {forbidden_words}.",
            "These words are taboo: {forbidden_words}.",
            "None of these may be used: {forbidden_words}.",
            "Please exclude {forbidden_words} from it.",
            "It must not contain {forbidden_words}.",
            "Without the keywords {forbidden_words}, please.",
        ),
        lambda rng: {"forbidden_words": rng.sample(AVOIDED, 3)},
    ),
    "no_comma": InstructionKind(
        "punctuation",
        (
            "Leave out every comma.",
            "Commas are forbidden.",
            "Write without commas.",
            "Not one comma, please.",
            "Please refrain from commas.",
            "The use of commas is not permitted here.",
            "Do not put commas anywhere.",
            "There should be no comma in it.",
        ),
    ),
    "number_highlighted_sections": InstructionKind(
        "marks",
        (
            "Mark {num_highlights} or more phrases *like this*.",
            "Set at least {num_highlights} passages between single asterisks, *like these*.",
            "Emphasise {num_highlights} spots or more by *asterisks* around them.",
            "There should be {num_highlights} or more bits in *asterisks*.",
            "Use markdown to highlight {num_highlights} parts or more, like *these words*.",
            "Highlight {num_highlights} or more pieces of the text in markdown, as *here*.",
            "Please have {num_highlights} highlighted phrases or more; write them *this way*.",
            "Let {num_highlights} or more parts stand out in markdown: *part*.",
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
            "Include {num_placeholders} or more placeholders in square brackets, say [street].",
            "Put in {num_placeholders} placeholders or more. They look like [color].",
            "There must be {num_placeholders} or more placeholders, such as [size].",
            "Use square brackets for {num_placeholders} or more placeholders: [day].",
        ),
        draw_number("num_placeholders", 2, 4),
    ),
}
"""IFEval's name of an instruction → its kind here. Evaluation asks the other nine kinds too."""


def draw_names(rng: random.Random) -> list[str]:
    """Return the names of one to three instructions of different slots that one answer can follow."""
    names = rng.sample(sorted(KINDS), len(KINDS))
    count = rng.choices([1, 2, 3], [7, 2, 1])[0]
    combination: list[str] = []
    for name in names:
        if len(combination) < count and all(can_combine(KINDS[name], KINDS[earlier]) for earlier in combination):
            combination.append(name)
    return combination


def can_combine(first: InstructionKind, second: InstructionKind) -> bool:
    return first.slot != second.slot and first.slot not in second.excludes and second.slot not in first.excludes


def draw_instruction(name: str, rng: random.Random) -> Instruction:
    return write_instruction(name, KINDS[name].draw(rng), rng)


def write_instruction(name: str, arguments: Mapping[str, Any], rng: random.Random) -> Instruction:
    """Return an instruction in one of its kind's wordings."""
    texts = {
        key: ", ".join(f'"{word}"' for word in value) if isinstance(value, list) else value
        for key, value in arguments.items()
    }
    return Instruction({"name": name, **arguments}, rng.choice(KINDS[name].wordings).format(**texts))


def draw_topic(thing: str, rng: random.Random) -> str:
    return f"{thing} {rng.choice(SIDES)}".strip()


def write_prompt(request: str, instructions: Sequence[Instruction], rng: random.Random) -> str:
    """Return a request with instructions, which stand behind it or before it."""
    sentences = " ".join(instruction.sentence for instruction in instructions)
    parts = [request, sentences] if rng.random() < 0.7 else [sentences, request]
    has_lines = any("\n" in part for part in parts)
    return ("\n" if has_lines else rng.choice(["\n", " "])).join(parts)


def build_check(instructions: Sequence[Instruction]) -> dict[str, Any]:
    """Return the check of answers, with the length floor."""
    floor = {"name": "number_words", "relation": "at least", "num_words": LEAST_WORDS}
    return {"kind": "instructions", "constraints": [*(instruction.constraint for instruction in instructions), floor]}


def build_request_row(thing: str, number: int, rng: random.Random) -> dict[str, Any]:
    """Return a request without instructions."""
    topic = draw_topic(thing, rng)
    return {"id": str(number), "prompt": rng.choice(REQUESTS).format(topic=topic), "source": thing, "topic": topic}


def build_row(thing: str, number: int, rng: random.Random) -> dict[str, Any]:
    """Return a prompt about a thing with its instructions, and the check of its answers."""
    instructions = [draw_instruction(name, rng) for name in draw_names(rng)]
    request = rng.choice(REQUESTS).format(topic=draw_topic(thing, rng))
    return {
        "id": str(number),
        "prompt": write_prompt(request, instructions, rng),
        "source": thing,
        "check": build_check(instructions),
    }


def build_parts(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file."""
    rng = random.Random(seed)
    things = rng.sample(THINGS, len(THINGS))
    parts: dict[str, list[dict[str, Any]]] = {}
    first = 0
    for name, size in SIZES.items():
        share = things[first : first + round(SHARES[name] * len(things))]
        first += len(share)
        build = build_request_row if name == "requests" else build_row
        parts[name] = [build(share[number % len(share)], number, rng) for number in range(size)]
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
