"""The check `instructions`: the instructions of IFEval that a program can verify (Zhou et al., "Instruction-following
evaluation for large language models", 2023), on its prompts and on any other.

Names, arguments and results are those of the published checkers. The exceptions, listed in `docs/checkers.md`, are
results that are drawn at random there, need a download, or take quadratic time. Every function here takes linear time.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from align.core.errors import InputError, require
from align.core.spec import get_choice, get_integer, get_text, get_texts, join_quoted, parse_text, require_keys
from align.reward.checkers.checked import Checker, Part, make_part
from align.reward.checkers.languages import LANGUAGES, is_in_language
from align.reward.checkers.sentences import count_sentences

COMPARED = {
    "less than": operator.lt,
    "at least": operator.ge,
    "at most": operator.le,
    "more than": operator.gt,
    "exactly": operator.eq,
}
"""Relation between a count and a number → function that tests it. IFEval has the first two."""
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
WORD = re.compile(r"[^\W_]+(?:[-./][^\W_]+)*")
"""Words joined by a hyphen, a point or a slash are one word; CAN'T is two, as in the Treebank's tokenizer."""
HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
STRONG = re.compile(r"\*\*[^\n*]*\*\*")
BULLET = re.compile(r"^[^\S\n]*(?:\*[^*]|-).*$", re.MULTILINE)


def count_starred_paragraphs(text: str) -> int:
    """Return the number of paragraphs divided by `***` that are not blank, or -1 if one between two others is blank."""
    pieces = re.split(r"\s?\*\*\*\s?", text)
    if any(not piece.strip() for piece in pieces[1:-1]):
        return -1
    return sum(bool(piece.strip()) for piece in pieces)


def nth_paragraph_begins_with(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Return whether a text has `num_paragraphs` paragraphs and paragraph `nth_paragraph` begins with `first_word`.

    Paragraphs are divided by empty lines. Blank paragraphs are numbered, but do not count. Case is ignored.
    """
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    if not words:
        return False
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"').lower(), maxsplit=1)[0]
    return first == first_word.lower()


def has_postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), text.lower()) is not None


def count_highlights(text: str) -> int:
    """Return the number of highlights in a text: `*…*` or `**…**` on one line with text inside.

    Text in double asterisks counts once, because `**` alone is an empty highlight.
    """
    single = sum(bool(highlight.strip("*").strip()) for highlight in HIGHLIGHT.findall(text))
    return single + sum(bool(highlight[2:-2].strip()) for highlight in STRONG.findall(text))


def is_json(text: str) -> bool:
    """Return whether a text is valid JSON, with or without a Markdown fence around it."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    """Return whether a line of a text has a title, `<<…>>` with text inside."""
    for line in text.split("\n"):
        start = line.find("<<")
        end = line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def has_two_responses(text: str) -> bool:
    """Return whether a text is two different responses divided by `******`, which may also stand at both ends."""
    pieces = [piece.strip() for piece in text.split("******")]
    if not all(pieces[1:-1]):
        return False
    responses = [piece for piece in pieces if piece]
    return len(responses) == 2 and responses[0] != responses[1]


KIND = "instructions"


@dataclass(frozen=True, slots=True)
class Instruction:
    """A kind of IFEval instruction: how it is described, and how an answer is tested for it.

    Attributes:
        describe: returns the instruction in words; its parameters are the instruction's arguments.
        holds: returns whether a text follows it; takes the same arguments after the text, which is not blank.
    """

    describe: Callable[..., str]
    holds: Callable[..., bool]


def count_noun(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


INSTRUCTIONS: dict[str, Instruction] = {
    "keywords:existence": Instruction(
        lambda keywords: f"has {join_quoted(keywords, 'and')}",
        lambda text, keywords: all(re.search(re.escape(word.strip()), text, re.IGNORECASE) for word in keywords),
    ),
    "keywords:frequency": Instruction(
        lambda relation, keyword, frequency: f'has "{keyword}" {relation} {count_noun(frequency, "time")}',
        lambda text, relation, keyword, frequency: COMPARED[relation](
            len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), frequency
        ),
    ),
    "keywords:forbidden_words": Instruction(
        lambda forbidden_words: f"has no word {join_quoted(forbidden_words)}",
        lambda text, forbidden_words: (
            not any(
                re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE) for word in forbidden_words
            )
        ),
    ),
    "keywords:letter_frequency": Instruction(
        lambda let_relation, letter, let_frequency: (
            f'has "{letter}" {let_relation} {count_noun(let_frequency, "time")}'
        ),
        lambda text, let_relation, letter, let_frequency: COMPARED[let_relation](
            text.lower().count(letter.lower()), let_frequency
        ),
    ),
    "language:response_language": Instruction(
        lambda language: f"is in {LANGUAGES[language]} throughout",
        lambda text, language: is_in_language(text, language),
    ),
    "length_constraints:number_sentences": Instruction(
        lambda relation, num_sentences: f"{relation} {count_noun(num_sentences, 'sentence')}",
        lambda text, relation, num_sentences: COMPARED[relation](count_sentences(text), num_sentences),
    ),
    "length_constraints:number_words": Instruction(
        lambda relation, num_words: f"{relation} {count_noun(num_words, 'word')}",
        lambda text, relation, num_words: COMPARED[relation](len(re.findall(r"\w+", text)), num_words),
    ),
    "length_constraints:number_paragraphs": Instruction(
        lambda num_paragraphs: f"{count_noun(num_paragraphs, 'paragraph')}, divided by ***",
        lambda text, num_paragraphs: count_starred_paragraphs(text) == num_paragraphs,
    ),
    "length_constraints:nth_paragraph_first_word": Instruction(
        lambda num_paragraphs, nth_paragraph, first_word: (
            f"{count_noun(num_paragraphs, 'paragraph')}, divided by empty lines; paragraph {nth_paragraph} begins with "
            f'"{first_word}"'
        ),
        nth_paragraph_begins_with,
    ),
    "detectable_content:number_placeholders": Instruction(
        lambda num_placeholders: f"at least {count_noun(num_placeholders, 'placeholder')} in square brackets",
        # On one line: a piece that a closing bracket ends, with an opening one in it.
        lambda text, num_placeholders: (
            sum("[" in piece for line in text.split("\n") for piece in line.split("]")[:-1]) >= num_placeholders
        ),
    ),
    "detectable_content:postscript": Instruction(
        lambda postscript_marker: f"has a postscript that begins with {postscript_marker}",
        has_postscript,
    ),
    "detectable_format:number_bullet_lists": Instruction(
        lambda num_bullets: f"exactly {count_noun(num_bullets, 'bullet point')}",
        lambda text, num_bullets: len(BULLET.findall(text)) == num_bullets,
    ),
    "detectable_format:constrained_response": Instruction(
        lambda: f"has one of {join_quoted(CONSTRAINED)}",
        lambda text: any(option in text for option in CONSTRAINED),
    ),
    "detectable_format:number_highlighted_sections": Instruction(
        lambda num_highlights: f"at least {count_noun(num_highlights, 'section')} highlighted by *asterisks*",
        lambda text, num_highlights: count_highlights(text) >= num_highlights,
    ),
    "detectable_format:multiple_sections": Instruction(
        lambda section_spliter, num_sections: (
            f"at least {count_noun(num_sections, 'section')}, marked {section_spliter} 1, {section_spliter} 2 and so on"
        ),
        lambda text, section_spliter, num_sections: (
            len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections
        ),
    ),
    "detectable_format:json_format": Instruction(lambda: "is JSON, alone or in a fenced block", is_json),
    "detectable_format:title": Instruction(lambda: "has a title in <<double angular brackets>>", has_title),
    "combination:two_responses": Instruction(lambda: "two different responses, divided by ******", has_two_responses),
    "combination:repeat_prompt": Instruction(
        lambda prompt_to_repeat: "begins by repeating the request word for word",
        lambda text, prompt_to_repeat: text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    ),
    "startend:end_checker": Instruction(
        lambda end_phrase: f'ends with "{end_phrase.strip()}"',
        lambda text, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    ),
    "startend:quotation": Instruction(
        lambda: "stands in double quotation marks",
        lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    ),
    "change_case:capital_word_frequency": Instruction(
        lambda capital_relation, capital_frequency: (
            f"{capital_relation} {count_noun(capital_frequency, 'word')} in capitals"
        ),
        lambda text, capital_relation, capital_frequency: COMPARED[capital_relation](
            sum(word.isupper() for word in WORD.findall(text)), capital_frequency
        ),
    ),
    "change_case:english_capital": Instruction(
        lambda: "is in English, all in capital letters", lambda text: text.isupper() and is_in_language(text, "en")
    ),
    "change_case:english_lowercase": Instruction(
        lambda: "is in English, all in lowercase letters", lambda text: text.islower() and is_in_language(text, "en")
    ),
    "punctuation:no_comma": Instruction(lambda: "has no comma", lambda text: "," not in text),
}
"""IFEval's id of an instruction → its description and test."""
SHORT = {name.partition(":")[2]: name for name in INSTRUCTIONS}
"""Name of an instruction after the colon → its whole id. No two names are the same."""


def build(spec: Any, field: str) -> Checker:
    """Build the checker that tests whether an answer follows IFEval instructions, such as to use no comma.

    The check is `{kind: instructions, constraints: [no_comma, {name: number_words, relation: at least, num_words:
    300}]}`.

    Raises:
        InputError: a constraint is wrong.
    """
    specs = require_keys(spec, field, ("kind", "constraints"))["constraints"]
    is_filled = isinstance(specs, list | tuple) and len(specs) > 0
    require(is_filled, f"{field}.constraints", specs, "is no list of constraints", "Write constraints: [no_comma].")
    constraints = [parse_instruction(spec, f"{field}.constraints[{i}]") for i, spec in enumerate(specs)]

    def check_answer(answer: str) -> Iterator[Part]:
        for constraint in constraints:
            is_met = bool(answer.strip()) and constraint.is_met(answer)
            is_loosely_met = is_met or any(map(constraint.is_met, iter_loose_readings(answer)))
            yield make_part(constraint.description, is_met, loosely=is_loosely_met)

    return Checker(KIND, tuple(constraint.description for constraint in constraints), check_answer)


class BoundInstruction(NamedTuple):
    """An IFEval instruction with its arguments: a description and a test of an answer.

    Attributes:
        description: the requirement in words, such as "at least 3 sentences".
        is_met: returns whether a text meets it.
    """

    description: str
    is_met: Callable[[str], bool]


def parse_instruction(spec: Any, field: str) -> BoundInstruction:
    """Parse an IFEval instruction, given as its name or as a mapping with `name` and arguments, or raise InputError.

    A name alone is an instruction without arguments.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    require(isinstance(spec, Mapping), field, spec, "is neither a name nor a mapping", "Write {name: number_words, …}.")
    name = str(spec.get("name"))
    name = SHORT.get(name, name)
    require(name in INSTRUCTIONS, f"{field}.name", name, "is no instruction", f"They are {', '.join(SHORT)}.")
    instruction = INSTRUCTIONS[name]
    parameters = tuple(signature(instruction.describe).parameters)
    spec = require_keys({key: value for key, value in spec.items() if value is not None}, field, ("name", *parameters))
    arguments = {key: parse_argument(spec, field, key) for key in parameters}
    if "nth_paragraph" in arguments:
        nth = arguments["nth_paragraph"]
        paragraphs = arguments["num_paragraphs"]
        problem = f"is above the number of paragraphs, {paragraphs}"
        require(nth <= paragraphs, f"{field}.nth_paragraph", nth, problem, "Write a smaller number.")
    return BoundInstruction(instruction.describe(**arguments), partial(instruction.holds, **arguments))


def parse_argument(spec: Mapping[str, Any], field: str, name: str) -> Any:
    """Return an IFEval instruction's argument called `name`, or raise InputError if its value is of a wrong type.

    The name determines the type.
    """
    if name.endswith("relation"):
        return get_choice(spec, field, name, tuple(COMPARED))
    if name in ("keywords", "forbidden_words"):
        return get_texts(spec, field, name)
    if name.startswith("num_") or name.endswith("frequency"):
        return get_integer(spec, field, name)
    if name == "nth_paragraph":
        return get_integer(spec, field, name, minimum=1)
    if name == "language":
        return get_choice(spec, field, name, tuple(LANGUAGES))
    if name == "letter":
        letter = parse_text(spec[name], f"{field}.{name}").strip()
        require(len(letter) == 1, f"{field}.{name}", letter, "is not one character", "Write one, or use `frequency`.")
        return letter
    return get_text(spec, field, name)


def iter_loose_readings(answer: str) -> Iterator[str]:
    """Yield IFEval's loose variants of an answer: without its first line, its last line or its asterisks, and combined.

    The answer itself and blank variants are left out.
    """
    lines = answer.split("\n")
    shorter = [answer, *("\n".join(cut).strip() for cut in (lines[1:], lines[:-1], lines[1:-1]))]
    readings = dict.fromkeys([*shorter, *(text.replace("*", "") for text in shorter)])
    return (reading for reading in readings if reading != answer and reading.strip())


def parse_ifeval_row(row: Mapping[str, Any], where: str = "row") -> dict[str, Any]:
    """Convert a row of IFEval's data, its `instruction_id_list` and `kwargs`, to a check `{kind: instructions, …}`.

    Args:
        where: the name of the row, for errors.

    Raises:
        InputError: a column is no list, or they differ in length.
    """
    names = row.get("instruction_id_list")
    kwargs = row.get("kwargs")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = 'Write ["punctuation:no_comma"].'
        raise InputError(f"{where}, instruction_id_list", names, "is no list of names", remedy)
    is_list = isinstance(kwargs, list) and all(
        arguments is None or isinstance(arguments, Mapping) for arguments in kwargs
    )
    if not isinstance(kwargs, list) or not is_list or len(kwargs) != len(names):
        remedy = "Write one mapping for each instruction, {} where it has no arguments."
        raise InputError(f"{where}, kwargs", kwargs, "is no list of as many mappings as instructions", remedy)
    constraints = [{**(arguments or {}), "name": name} for name, arguments in zip(names, kwargs, strict=True)]
    return {"kind": KIND, "constraints": constraints}
