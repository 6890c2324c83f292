"""The prompts of `recipes/instructions`: each can be followed, and the checks refuse answers that do not follow it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from align.reward.checkers import Checker, build_checkers
from align.reward.checkers.ifeval import SHORT

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "instructions"
PROMPTS = runpy.run_path(str(RECIPE / "prompts.py"))
KINDS: Mapping[str, Any] = PROMPTS["KINDS"]
FLOOR = {"name": "number_words", "relation": "at least", "num_words": PROMPTS["LEAST_WORDS"]}
WORDS = ["the", "old", "house", "by", "the", "river", "has", "a", "small", "room", "with", "a", "view", "of", "hills"]


def build_check(constraints: Sequence[Mapping[str, Any]]) -> Checker:
    (checker,) = build_checkers({"kind": "instructions", "constraints": constraints}, 1, "check")
    assert checker is not None
    return checker


def iter_answers(constraints: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield answers of growing length that follow all instructions but, perhaps, those on length."""
    by_name = {constraint["name"]: constraint for constraint in constraints}
    for sentences, words in product(range(1, 6), range(0, 31, 2)):
        sentence = " ".join((WORDS * 3)[:words])
        text = " ".join([f"{sentence} ends here.".strip()] * sentences)
        text = " ".join([text, *by_name.get("existence", {}).get("keywords", [])])
        text += " *well*" * by_name.get("number_highlighted_sections", {}).get("num_highlights", 0)
        text += " [town]" * by_name.get("number_placeholders", {}).get("num_placeholders", 0)
        if "number_bullet_lists" in by_name:
            text = "\n".join([f"* {text}"] + ["* more"] * (by_name["number_bullet_lists"]["num_bullets"] - 1))
        if "multiple_sections" in by_name:
            parts = range(2, by_name["multiple_sections"]["num_sections"] + 1)
            text = "\n".join([f"Part 1\n{text}", *(f"Part {part}" for part in parts)])
        if "json_format" in by_name:
            text = json.dumps({"text": text})
        if "title" in by_name:
            text = f"<<House>>\n{text}"
        if "postscript" in by_name:
            text += f"\n{by_name['postscript']['postscript_marker']} Write soon"
        if "end_checker" in by_name:
            text += f" {by_name['end_checker']['end_phrase']}"
        if "quotation" in by_name:
            text = f'"{text}"'
        if "english_lowercase" in by_name:
            text = text.lower()
        if "english_capital" in by_name:
            text = text.upper()
        yield text


def can_be_followed(constraints: Sequence[Mapping[str, Any]]) -> bool:
    check = build_check([*constraints, FLOOR])
    return any(check(answer).score == 1 for answer in iter_answers(constraints))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_instruction_can_be_followed_and_missed(name: str) -> None:
    chance = Random(0)
    for _ in range(20):
        constraint, sentence = PROMPTS["draw_instruction"](name, chance)
        assert can_be_followed([constraint]), sentence
        for value in constraint.values():
            values = value if isinstance(value, list) else [value]
            assert value == name or all(str(value) in sentence for value in values), sentence
        missed = "Yes, people really like good, great and important THINGS because, also, many, very. " * 40
        missed = "No" if constraint.get("relation") == "at least" else missed
        assert build_check([constraint])(missed).score == 0, sentence


COMBINED = [pair for pair in combinations(sorted(KINDS), 2) if PROMPTS["can_combine"](*(KINDS[name] for name in pair))]


@pytest.mark.parametrize("pair", COMBINED, ids=" and ".join)
def test_two_instructions_of_a_prompt_can_be_followed_together(pair: tuple[str, str]) -> None:
    chance = Random(0)
    for _ in range(5):
        constraints = [PROMPTS["draw_instruction"](name, chance).constraint for name in pair]
        assert can_be_followed(constraints), constraints


def test_all_prompts_of_a_file_can_be_followed() -> None:
    for row in PROMPTS["build_parts"](0)["held_out"]:
        *constraints, floor = row["check"]["constraints"]
        assert floor == FLOOR
        assert can_be_followed(constraints), row["prompt"]


def test_the_files_share_no_subject_and_follow_from_the_seed() -> None:
    parts = PROMPTS["build_parts"](0)
    assert {name: len(rows) for name, rows in parts.items()} == PROMPTS["SIZES"]
    for first, second in combinations(parts.values(), 2):
        assert not {row["source"] for row in first} & {row["source"] for row in second}
    assert PROMPTS["build_parts"](0) == parts
    assert PROMPTS["build_parts"](1) != parts


def test_runs_of_words_that_two_sets_of_prompts_share_are_found() -> None:
    ours = ["Write, in five words or so, about otters.", "Write about otters."]
    theirs = ["Please write in FIVE words or less.", "About otters: write."]
    assert [*PROMPTS["iter_shared_runs"](ours, theirs)] == ["write in five words or"]


def test_the_figures_divide_kinds_as_the_prompts_do() -> None:
    figures = runpy.run_path(str(RECIPE / "figures.py"))
    assert set(KINDS) == figures["TRAINED"]
    assert set(KINDS) < set(SHORT)
    rows = [
        {"key": 1, "instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]},
        {"key": 2, "instruction_id_list": ["combination:two_responses"], "kwargs": [{}]},
    ]
    results = figures["check_answers"](rows, {"1": "a text", "2": "one******two"})
    assert [result.score for result in results] == [0, 1]
    assert figures["measure_kinds"](rows, results) == {"trained": 0.5, "other": 1.0}
    seeds = [
        {"systems": {"base": {"follows": [0, 0, 1]}, "practised": {"follows": follows}}}
        for follows in ([1, 0, 1], [1, 1, 1])
    ]
    change = figures["compare_with_base"](seeds, "practised")
    assert change["value"] == pytest.approx(0.5)
    assert change["n"] == 3


def test_figures_of_more_seeds_are_added_to_a_file(tmp_path: Path) -> None:
    add = runpy.run_path(str(RECIPE / "figures.py"))["add_saved_seeds"]
    file = tmp_path / "figures.json"
    assert add([{"seed": 1, "minutes": 5}], file) == [{"seed": 1, "minutes": 5}]
    file.write_text(json.dumps([{"seed": 1, "minutes": 5}, {"seed": 2, "minutes": 6}]))
    assert add([{"seed": 0, "minutes": 4}, {"seed": 2, "minutes": 7}], file) == [
        {"seed": 0, "minutes": 4},
        {"seed": 1, "minutes": 5},
        {"seed": 2, "minutes": 7},
    ]


def test_a_check_of_ifbench_that_fails_with_an_error_counts_as_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPE)
    ifbench_scores = runpy.run_path(str(RECIPE / "ifbench_scores.py"))
    rows = [{"key": str(key), "instruction_id_list": ["format:emoji"]} for key in range(3)]

    def check(row: Mapping[str, Any], answer: str) -> tuple[bool, bool]:
        if answer == "broken":
            raise LookupError
        return answer == "good", answer in ("good", "loosely good")

    base = ifbench_scores["check_answers"](rows, {"0": "good", "1": "broken", "2": "bad"}, check)
    assert base == {"strict": [1, 0, 0], "loose": [1, 0, 0], "errors": {"1": "format:emoji: LookupError"}}
    practised = ifbench_scores["check_answers"](rows, {"0": "good", "1": "good", "2": "loosely good"}, check)
    seeds = [{"seed": 0, "systems": {"base": base, "imitated": base, "practised": practised}}]
    assert ifbench_scores["compare_with_base"](seeds, "practised", "strict")["value"] == pytest.approx(1 / 3)
    assert ifbench_scores["compare_with_base"](seeds, "practised", "loose")["value"] == pytest.approx(2 / 3)
    assert "| 0 | practised | 0.667 | 1.000 | 0 |" in ifbench_scores["format_table"](seeds)
