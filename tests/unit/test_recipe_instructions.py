"""`recipes/instructions`: each prompt can be followed and missed, and figures belong to the right seed and system."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from align.config.root import Config, to_plain_dict
from align.config.sft import SftConfig
from align.reward.checkers import Checker, build_checkers
from align.reward.checkers.ifeval import SHORT
from align.run import Manifest
from align.run.manifest import write_manifest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "instructions"
PROMPTS = runpy.run_path(str(RECIPE / "instruction_prompts.py"))
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
            heading = by_name["multiple_sections"]["section_spliter"]
            parts = range(2, by_name["multiple_sections"]["num_sections"] + 1)
            text = "\n".join([f"{heading} 1\n{text}", *(f"{heading} {part}" for part in parts)])
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


@pytest.fixture
def edited_answers(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    monkeypatch.syspath_prepend(RECIPE)
    return runpy.run_path(str(RECIPE / "edited_answers.py"))


ANSWER = """Otters, which live near rivers, eat fish.

1. **They dive well.** Few animals swim so fast!
2. They sleep on water. Some hold hands, so they stay together.
They also play: a stone is enough. What else could an otter want?"""
LOOKS: Mapping[str, Callable[[str], bool]] = {
    "end_checker": lambda text: text.rstrip('"').endswith(PROMPTS["CLOSINGS"]),
    "english_capital": lambda text: text.isupper(),
    "english_lowercase": lambda text: text.islower(),
    "existence": lambda text: len(text) > 20,
    "forbidden_words": lambda text: "very" not in text,
    "json_format": lambda text: isinstance(json.loads(text), dict),
    "multiple_sections": lambda text: re.match(r"(\w+) 1\n.+\n\n\1 2\n", text, re.DOTALL) is not None,
    "no_comma": lambda text: "," not in text,
    "number_bullet_lists": lambda text: all(line.startswith("* ") for line in text.splitlines()),
    "number_highlighted_sections": lambda text: text.count("*") in (4, 6, 8) and "**" not in text,
    "number_placeholders": lambda text: text.count("[") in (2, 3, 4),
    "number_sentences": lambda text: len(text) > 20,
    "number_words": lambda text: len(text) > 20,
    "postscript": lambda text: re.search(r".{20}\n\nP\.(P\.)?S\.? .{5}", text) is not None,
    "quotation": lambda text: text[0] + text[-1] == '""' and '"' not in text[1:-1],
    "title": lambda text: text.startswith("<<Otters In Winter>>\n\n"),
}
"""How an answer with an instruction of each kind looks, read without the checks."""


def test_an_answer_ends_before_the_first_repeated_or_unfinished_sentence(edited_answers: Mapping[str, Any]) -> None:
    split = edited_answers["split_answer"]
    sentences = split(ANSWER)
    assert "".join(sentences) == ANSWER
    assert [sentence[:9] for sentence in sentences[:3]] == ["Otters, w", "\n\n1. **Th", " Few anim"]
    assert split(f"{ANSWER} They sleep on water. New.") == sentences
    assert split(f"{ANSWER} The end is") == sentences
    assert split("Here is a list:\n\n1. Fish\n2. Stones") == split("") == []


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_edited_answer_follows_its_instruction(name: str, edited_answers: Mapping[str, Any]) -> None:
    sentences = edited_answers["split_answer"](ANSWER)
    for seed in range(10):
        example = edited_answers["build_example"]([name], "otters in winter", "Hi.", sentences, Random(seed))
        assert "Hi." in example["prompt"]
        assert len(example["prompt"]) > len("Hi.") + 10
        assert LOOKS[name](example["completion"]), example
    assert sentences == edited_answers["split_answer"](ANSWER)


@pytest.mark.parametrize("pair", COMBINED, ids=" and ".join)
def test_an_answer_can_be_edited_to_follow_two_instructions(
    pair: tuple[str, str], edited_answers: Mapping[str, Any]
) -> None:
    sentences = edited_answers["split_answer"](f"{ANSWER} Yes! They play every day of the year. Nobody knows why.")
    build = edited_answers["build_example"]
    examples = [*filter(None, (build(pair, "otters in winter", "Hi.", sentences, Random(seed)) for seed in range(10)))]
    assert examples
    for example in examples:
        assert [constraint["name"] for constraint in example["check"]["constraints"][:-1]] == [*pair]
        assert build_check(example["check"]["constraints"])(example["completion"]).score == 1, example


def test_an_answer_that_cannot_follow_an_instruction_gives_no_example(edited_answers: Mapping[str, Any]) -> None:
    sentences = ["Yes, of course, whatever you and all the others may want, it is to be done today."]
    build = edited_answers["build_example"]
    assert build(["no_comma"], "otters", "Hi.", sentences, Random(0)) is None
    assert build(["quotation"], "otters", "Hi.", sentences, Random(0)) is not None


def test_examples_are_made_of_the_answers_to_the_requests(edited_answers: Mapping[str, Any], tmp_path: Path) -> None:
    requests = [{"prompt": "Say it.", "topic": "owls"}, {"prompt": "Do tell.", "topic": "otters"}]
    write_lines(tmp_path / "requests.jsonl", requests)
    samples = [{"prompt": [{"role": "user", "content": "Do tell."}], "answer": text} for text in (ANSWER, "Cut off")]
    write_lines(tmp_path / "samples.jsonl", samples)
    files = [tmp_path / name for name in ("requests.jsonl", "samples.jsonl", "edited.jsonl")]
    edited_answers["main"](*files, 0)
    examples = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    assert len(examples) == edited_answers["EXAMPLES"]
    assert all("Do tell." in example["prompt"] for example in examples)
    assert len({example["completion"] for example in examples}) > 200


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    monkeypatch.syspath_prepend(RECIPE)
    return runpy.run_path(str(RECIPE / "figures.py"))


@pytest.fixture
def ifbench_scores(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    monkeypatch.syspath_prepend(RECIPE)
    return runpy.run_path(str(RECIPE / "ifbench_scores.py"))


HARDWARE = {"processor": "a CPU", "onednn_max_cpu_isa": "avx512", "instructions": "", "machine": "x86_64"}
CONFIG = to_plain_dict(Config(stage=SftConfig()))
ROWS = [
    {
        "key": 1,
        "prompt": "Hi",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    },
    {"key": 2, "prompt": "Hello", "instruction_id_list": ["combination:two_responses"], "kwargs": [{}]},
]


@pytest.mark.parametrize("text", ["Yes.", "Ha " * 13 + "ha.", "no end", ""])
def test_answers_of_which_no_example_can_be_made_are_refused(
    text: str, edited_answers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in edited_answers["KINDS"]:
        edited_answers["build_example"]([name], "owls", "Hi.", [text], Random(0))
    write_lines(tmp_path / "requests.jsonl", [{"prompt": "Do tell.", "topic": "otters"}])
    write_lines(tmp_path / "samples.jsonl", [{"prompt": [{"role": "user", "content": "Do tell."}], "answer": text}])
    files = [tmp_path / name for name in ("requests.jsonl", "samples.jsonl", "edited.jsonl")]
    namespace = edited_answers["main"].__globals__
    monkeypatch.setitem(namespace, "EXAMPLES", 20)
    monkeypatch.setitem(namespace, "draw_names", lambda rng: ["number_bullet_lists"])
    with pytest.raises(SystemExit, match="only 0 of 20 examples could be made"):
        edited_answers["main"](*files, 0)
    assert not files[-1].exists()


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def write_evaluation(root: Path, answers: Mapping[str, Sequence[str]], name: str) -> None:
    """Write the files of an evaluation that the figures read."""
    folder = root / "eval" / name / "artifact"
    folder.mkdir(parents=True)
    lines = [
        json.dumps(
            {"id": str(row["key"]), "answers": {system: {"text": texts[index]} for system, texts in answers.items()}}
        )
        for index, row in enumerate(ROWS)
    ]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_kinds_are_those_of_ifeval(figures: Mapping[str, Any]) -> None:
    assert set(KINDS) < set(SHORT)
    results = [figures["check_answer"](row, text) for row, text in zip(ROWS, ["a text", "one******two"], strict=True)]
    assert [result.score for result in results] == [0, 1]
    assert figures["measure_kinds"](ROWS, results) == {"trained_kinds": 0.5, "other_kinds": 1.0}


def test_each_seed_has_the_figures_of_its_own_systems(figures: Mapping[str, Any], tmp_path: Path) -> None:
    good = ['"no comma"', "one******two"]
    systems = {
        "base": ["a, b", "no"],
        "imitated-0": ["a, b", "one******two"],
        "practised-0": good,
        "imitated-3": good,
        "practised-3": ["a, b", "one******two"],
    }
    write_evaluation(tmp_path, systems, "ifeval-0-3")
    scores = {
        probe: {"systems": {system: {"score": {"value": value}} for value, system in enumerate(systems)}}
        for probe in ("texts", "sums", "refusals")
    }
    write_json(tmp_path / "eval" / "forgetting-0-3" / "artifact" / "results.json", {"tasks": scores})
    for seed, stop in ((0, "10"), (3, "20")):
        for stage, name in figures["TRAINING"]:
            times = {"started": "2026-01-01T00:00:00+00:00", "finished": f"2026-01-01T00:{stop}:00+00:00"}
            if (seed, stage) == (3, "ppo"):
                times["first_started"] = times["started"]
            folder = tmp_path / stage / f"{name}-{seed}"
            folder.mkdir(parents=True)
            write_manifest(
                folder, Manifest(stage, f"{name}-{seed}", seed, CONFIG, {}, None, times=times, hardware=HARDWARE)
            )
    seeds = figures["read_seeds"](tmp_path, ROWS, [0, 3])
    strict = [[[*row["systems"][name]["strict"].values()] for name in figures["SYSTEMS"]] for row in seeds]
    assert strict == [[[0, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [0, 1]]]
    assert [row["systems"]["practised"]["forgetting"]["sums"]["value"] for row in seeds] == [2, 4]
    assert [row["minutes"] for row in seeds] == [30, None]
    change = figures["compare_systems"](seeds, "practised", "base", "strict")
    assert (change["value"], change["n"]) == (0.75, 2)
    assert figures["compare_systems"](seeds, "practised", "imitated", "strict")["value"] == 0


def test_figures_of_more_seeds_are_added_to_a_file(figures: Mapping[str, Any], tmp_path: Path) -> None:
    def build_row(seed: int, minutes: int, key: str = "1") -> dict[str, Any]:
        return {"seed": seed, "minutes": minutes, "systems": {"base": {"strict": {key: 1}}}}

    add = figures["add_to_file"]
    file = tmp_path / "figures.json"
    assert add([build_row(1, 5)], file) == [build_row(1, 5)]
    assert json.loads(file.read_text(encoding="utf-8")) == [build_row(1, 5)]
    write_json(file, [build_row(1, 5), build_row(2, 6)])
    assert add([build_row(0, 4), build_row(2, 7)], file) == [build_row(0, 4), build_row(1, 5), build_row(2, 7)]
    with pytest.raises(ValueError, match="other prompts"):
        add([build_row(0, 4, "another prompt")], file)


def test_a_check_of_ifbench_that_fails_with_an_error_counts_as_not_followed(ifbench_scores: Mapping[str, Any]) -> None:
    rows = [{"key": str(key), "instruction_id_list": ["format:emoji"]} for key in range(3)]

    def check(row: Mapping[str, Any], answer: str, reading: str) -> bool:
        if answer == "broken" and reading == "loose":
            raise LookupError
        return answer in ("good", "broken") or (reading == "loose" and answer == "loosely good")

    base = ifbench_scores["check_answers"](rows, {"0": "good", "1": "broken", "2": "bad"}, check)
    assert base == {
        "strict": {"0": 1, "1": 1, "2": 0},
        "loose": {"0": 1, "1": 0, "2": 0},
        "errors": {"1": "format:emoji: LookupError"},
    }
    practised = ifbench_scores["check_answers"](rows, {"0": "good", "1": "good", "2": "loosely good"}, check)
    table = ifbench_scores["format_table"](
        [{"seed": 0, "systems": {"base": base, "imitated": base, "practised": practised}}]
    )
    assert "|  | base | 3 | 0.667 | 0.333 | 1 |" in table
    assert "| 0 | practised | 3 | 0.667 | 1.000 | 0 |" in table
    assert "practised minus base, prompts, loose, mean of 1 seeds and 95 % interval over prompts: +0.667" in table
    with pytest.raises(KeyError):
        ifbench_scores["check_answers"](rows, {"0": "good"}, check)
