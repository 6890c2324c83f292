"""Preference files: the pairs of every accepted shape, the place that each error names, and splits without leaks."""

import gzip
import json
from collections import Counter

import pytest
from record_reads import read_records

from align.core.errors import InputError, StorageError
from align.core.types import Message, Preference
from align.data.read.drops import BadRows, Drop, collect_drop_counts
from align.data.read.preferences import write_preferences
from align.data.read.records import read_preferences
from align.data.split import split_by_group


def user_message(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant_message(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def to_lines(pref: Preference) -> tuple:
    """Return (prompt, chosen, rejected), each as "role: text" lines."""
    return tuple(
        tuple(f"{m.role}: {m.content}" for m in getattr(pref, name)) for name in ("prompt", "chosen", "rejected")
    )


def read_with_drops(path: str) -> tuple[list[Preference], Counter[Drop]]:
    """Return the pairs of a file and the counts of dropped rows."""
    drops = Counter[Drop]()
    list(read_records(path, BadRows(), drops))
    return read_preferences(path), drops


HH = "\n\nHuman: Hi \n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
MULTI = ("user: Hi", "assistant: Hello", "user: Why?")
ONE = (("user: Q",), ("assistant: A",), ("assistant: B",))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"prompt": [user_message("Q")], "chosen": [assistant_message("A")], "rejected": [assistant_message("B")]},
            ONE,
            id="trl",
        ),
        pytest.param({"prompt": "Q", "chosen": "A", "rejected": "B"}, ONE, id="strings"),
        pytest.param(
            {
                "chosen": [user_message("Q"), assistant_message("A")],
                "rejected": [user_message("Q"), assistant_message("B")],
            },
            ONE,
            id="implicit",
        ),
        pytest.param(
            {
                "prompt": [user_message("Q")],
                "chosen": [user_message("Q"), assistant_message("A")],
                "rejected": [user_message("Q"), assistant_message("B")],
            },
            ONE,
            id="whole conversations and their prompt",
        ),
        pytest.param(
            # They differ from a user turn on: the compared answers begin at the assistant turn before it.
            {
                "chosen": [user_message("Q"), assistant_message("same"), user_message("x"), assistant_message("A")],
                "rejected": [user_message("Q"), assistant_message("same"), user_message("y"), assistant_message("B")],
            },
            (
                ("user: Q",),
                ("assistant: same", "user: x", "assistant: A"),
                ("assistant: same", "user: y", "assistant: B"),
            ),
            id="implicit, parted at a user turn",
        ),
        pytest.param(
            # The shorter conversation begins the longer one and must keep an answer.
            {
                "chosen": [user_message("Q"), assistant_message("A")],
                "rejected": [user_message("Q"), assistant_message("A"), user_message("x"), assistant_message("B")],
            },
            (("user: Q",), ("assistant: A",), ("assistant: A", "user: x", "assistant: B")),
            id="implicit, one continues the other",
        ),
        pytest.param(
            {"chosen": f"{HH} Because.\n\nReally.", "rejected": f"{HH} No."},
            (MULTI, ("assistant: Because.\n\nReally.",), ("assistant: No.",)),
            id="hh",
        ),
        pytest.param(
            {"prompt": HH, "chosen": "A", "rejected": "B"},
            (MULTI, ("assistant: A",), ("assistant: B",)),
            id="hh prompt in its own column",
        ),
    ],
)
def test_one_pair_a_row(tmp_path, row, expected):
    (pref,) = read_preferences(write_lines(tmp_path / "d.jsonl", row))
    assert to_lines(pref) == expected
    assert (pref.id, pref.group_id, pref.margin, pref.source) == ("d:1", "", None, "d")


def test_ultrafeedback_binarised(tmp_path):
    row = {
        "prompt": "Q",
        "prompt_id": "abc",
        "chosen": [user_message("Q"), assistant_message("A")],
        "rejected": [user_message("Q"), assistant_message("B")],
        "messages": [user_message("Q"), assistant_message("A")],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }
    (pref,) = read_preferences(write_lines(tmp_path / "uf.jsonl", row))
    assert (to_lines(pref), pref.margin, pref.id) == (ONE, 2.5, "abc")


def test_helpsteer_pairs_neighbours_with_one_prompt(tmp_path):
    def make_rated_row(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 1}

    turns = "Hi<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?"
    path = write_lines(
        tmp_path / "hs.jsonl",
        make_rated_row("Q", "low", 1),
        make_rated_row("Q", "high", 4),
        make_rated_row("Q", "also low", 1),
        make_rated_row("alone", "x", 2),
        make_rated_row(turns, "A", 3),
        make_rated_row(turns, "B", 2),
    )
    prefs, drops = read_with_drops(path)
    assert [to_lines(p) for p in prefs] == [
        (("user: Q",), ("assistant: high",), ("assistant: low",)),
        (("user: Q",), ("assistant: high",), ("assistant: also low",)),
        (MULTI, ("assistant: A",), ("assistant: B",)),
    ]
    assert [p.margin for p in prefs] == [3, 3, 1]
    assert [p.group_id for p in prefs] == ["hs:1", "hs:1", "hs:5"]
    assert drops == {Drop.TIE: 1, Drop.UNPAIRED: 1}


def test_helpsteer3_counts_from_response1_to_response2(tmp_path):
    def make_row(verdict):
        return {"context": [user_message("Q")], "response1": "A", "response2": "B", "overall_preference": verdict}

    prefs, drops = read_with_drops(write_lines(tmp_path / "hs3.jsonl", make_row(-3), make_row(1), make_row(0)))
    assert [(p.chosen[0].content, p.margin) for p in prefs] == [("A", 3), ("B", 1)]
    assert drops == {Drop.TIE: 1}


def test_nectar_makes_every_pair_of_one_group(tmp_path):
    answers = [
        {"answer": "second", "model": "m", "rank": 2.0},
        {"answer": "first", "model": "m", "rank": 1.0},
        {"answer": "also second", "model": "m", "rank": 2.0},
        {"answer": "first", "model": "m", "rank": 4.0},
    ]
    row = {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": answers}
    prefs, drops = read_with_drops(write_lines(tmp_path / "n.jsonl", row))
    assert [(p.chosen[0].content, p.rejected[0].content) for p in prefs] == [
        ("first", "second"),
        ("second", "first"),
        ("first", "also second"),
        ("also second", "first"),
    ]
    assert {(p.group_id, p.margin, p.prompt) for p in prefs} == {("n:1", None, (Message("user", "Q"),))}
    assert len({p.id for p in prefs}) == 4
    assert drops == {Drop.IDENTICAL: 1, Drop.TIE: 1}


def test_each_right_answer_makes_a_pair_with_each_wrong_one(tmp_path):
    """Rows of RewardBench 2 have lists of answers. `chosen` may also be a text."""
    row = {"id": 7, "prompt": "Q", "chosen": ["A"], "rejected": ["B", "A", "C"], "subset": "Math", "models": ["m"]}
    several = {"prompt": "R", "chosen": ["A", "B"], "rejected": ["C"], "source": "mine", "subset": "Ties"}
    alone = {"prompt": "S", "chosen": "A", "rejected": ["B"]}
    prefs, drops = read_with_drops(write_lines(tmp_path / "rb.jsonl", row, several, alone))
    assert [(p.id, p.group_id, p.chosen[0].content, p.rejected[0].content) for p in prefs] == [
        ("7/0>0", "7", "A", "B"),
        ("7/0>2", "7", "A", "C"),
        ("rb:2/0>0", "rb:2", "A", "C"),
        ("rb:2/1>0", "rb:2", "B", "C"),
        ("rb:3/0>0", "rb:3", "A", "B"),
    ]
    assert [p.source for p in prefs] == ["Math", "Math", "mine", "mine", "rb"]
    assert drops == {Drop.IDENTICAL: 1}


def test_identical_answers_are_dropped_and_counted(tmp_path, capsys):
    same = {"prompt": "Q", "chosen": "A", "rejected": "A"}
    prefs, drops = read_with_drops(path := write_lines(tmp_path / "d.jsonl", same, {**same, "rejected": "B"}, "", same))
    assert [p.id for p in prefs] == ["d:2"]
    assert drops == {Drop.IDENTICAL: 2}
    with collect_drop_counts() as counts:
        assert read_preferences(path) == prefs
    assert counts == {"dropped_undecided": 2}
    assert "2 pairs of" in capsys.readouterr().out


GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        ({"prompt": "Q", "chosen": "A"}, "rejected", "missing"),
        ({"text": "A"}, "chosen", "missing"),
        ({"chosen": "A", "rejected": "B"}, "prompt", "missing"),
        ({"chosen": [assistant_message("A")], "rejected": [assistant_message("B")]}, "prompt", "missing"),
        ({**GOOD, "prompt": " "}, "prompt", "no question"),
        ({**GOOD, "prompt": [user_message("Q"), assistant_message("A")]}, "prompt", "no question"),
        ({**GOOD, "rejected": None}, "rejected", "missing"),
        ({**GOOD, "chosen": [], "rejected": ["B"]}, "chosen", "neither a text nor a list of texts"),
        (
            {**GOOD, "chosen": [assistant_message("A")], "rejected": ["B"]},
            "chosen",
            "neither a text nor a list of texts",
        ),
        ({"chosen": ["A"], "rejected": ["B"]}, "prompt", "neither a text nor a list"),
        ({**GOOD, "chosen": 1, "rejected": 2}, "chosen", "neither a text nor a list"),
        ({**GOOD, "chosen": [], "rejected": []}, "chosen", "neither a text nor a list"),
        ({**GOOD, "chosen": [{"role": "gpt", "content": "A"}], "rejected": []}, "chosen[0].role", "none of"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "prompt[0].content", "is missing"),
        (
            {**GOOD, "chosen": [user_message("A")], "rejected": [assistant_message("B")]},
            "chosen",
            "ends with a user turn",
        ),
        (
            {
                "chosen": [user_message("Q"), assistant_message("A")],
                "rejected": [user_message("R"), assistant_message("B")],
            },
            "chosen",
            "no common beginning",
        ),
        (
            {
                "prompt": [user_message("R")],
                "chosen": [user_message("Q"), assistant_message("A")],
                "rejected": [user_message("Q"), assistant_message("B")],
            },
            "prompt",
            "not the common beginning of chosen and rejected",
        ),
        ({**GOOD, "margin": "big"}, "margin", "not a finite number"),
        ({**GOOD, "margin": float("nan")}, "margin", "not a finite number"),
        ({**GOOD, "margin": 10**400}, "margin", "not a finite number"),
        ({"prompt": "Q", "response": "A", "helpfulness": -(10**400)}, "helpfulness", "not a finite number"),
        ({**GOOD, "strength": 1.5}, "strength", "whole number"),
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": 1}]}, "answers", "two or more"),
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": 1}, {"answer": "B"}]}, "answers[1].rank", "missing"),
        ({"prompt": "Q", "response": None, "helpfulness": 3}, "response", "missing"),
        ({"prompt": "Q", "response": "A", "helpfulness": True}, "helpfulness", "not a finite number"),
        (
            {"context": [user_message("Q")], "response1": "A", "response2": "B", "overall_preference": 4},
            "overall_preference",
            "outside -3",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path, row, column, problem):
    path = write_lines(tmp_path / "d.jsonl", GOOD, "", row)
    with pytest.raises(InputError, match=problem) as caught:
        read_preferences(path)
    assert caught.value.field == f"{path}, row 3, {column}"
    assert caught.value.remedy.endswith(".")


def test_files_without_a_preference(tmp_path):
    for name, rows, problem in (
        ("empty.jsonl", [], "is empty"),
        ("blank.jsonl", ["", " "], "is empty"),
        ("same.jsonl", [{**GOOD, "rejected": "A"}], "none of its 1 rows"),
    ):
        with pytest.raises(InputError, match=problem):
            read_preferences(write_lines(tmp_path / name, *rows))
    (tmp_path / "folder").mkdir()
    for name, problem in (("missing.jsonl", "no such file"), ("folder", "is a folder without")):
        with pytest.raises(InputError, match=problem) as caught:
            read_preferences(tmp_path / name)
        assert caught.value.field == "data.path"


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_what_is_written_is_read_back(tmp_path, name):
    turn = Message("user", "Grüße \U0001f600"), Message("assistant", "line\u2028sep"), Message("assistant", "")
    prefs = [
        Preference(turn[:1], turn[1:2], turn[2:], "i", "g", 0.5, "a1", "human", 2, "v1", "2026-01-01T00:00:00+00:00"),
        Preference(turn[:1], turn[2:], turn[1:2], "j"),
    ]
    path = tmp_path / "new" / name
    write_preferences(path, prefs)
    first = path.read_bytes()
    write_preferences(path, prefs)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [name]
    assert read_preferences(path) == prefs
    text = gzip.decompress(first) if name.endswith("gz") else first
    rows = [json.loads(line) for line in text.split(b"\n")[:-1]]
    assert rows[0]["chosen"] == [assistant_message("line\u2028sep")]
    assert [row.get("margin", "absent") for row in rows] == [0.5, "absent"]  # TRL uses a margin column if there is one


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_preferences(tmp_path / "file" / "d.jsonl", [])


# Splits


def make_pair(prompt: str, group: str = "", chosen: str = "A", rejected: str = "B") -> Preference:
    turns = (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),)
    return Preference(*turns, group_id=group)


def collect_prompts(prefs) -> set[str]:
    return {p.prompt[0].content for p in prefs}


def test_split_holds_out_the_share_asked_for_and_keeps_all_pairs_in_order():
    prefs = [make_pair(f"q{i % 50}", f"g{i % 50}") for i in range(150)]
    train, test = split_by_group(prefs, 0.2, seed=0)
    assert (len(train), len(test)) == (120, 30)
    assert [p for p in prefs if p in test] == test
    assert collect_prompts(train) | collect_prompts(test) == collect_prompts(prefs)


def test_groups_and_prompts_never_straddle():
    # Each group has two prompts and shares one with the next group of its block of four: only whole blocks can move.
    prefs = [
        make_pair(f"q{4 * block + i + j}" if i + j < 4 else f"q{4 * block}", f"g{block}.{i}")
        for block in range(30)
        for i in range(4)
        for j in range(2)
    ]
    # Pairs without a group go to the side of their prompt.
    prefs += [make_pair(f"q{i}") for i in range(120)]
    train, test = split_by_group(prefs, 0.3, seed=1)
    assert not collect_prompts(train) & collect_prompts(test)
    assert not {p.group_id for p in train} & {p.group_id for p in test} - {""}
    assert len(collect_prompts(test)) == 9 * 4
    assert len(test) == 9 * 12


def test_sides_follow_the_seed_and_not_the_order():
    prefs = [make_pair(f"q{i}") for i in range(60)]
    _, test = split_by_group(prefs, 0.25, seed=0)
    _, test_of_reversed = split_by_group(prefs[::-1], 0.25, seed=0)
    _, test_of_other_seed = split_by_group(prefs, 0.25, seed=1)
    assert collect_prompts(test) == collect_prompts(test_of_reversed) != collect_prompts(test_of_other_seed)
    # Two more prompts change the side of at most two others.
    _, test_of_more = split_by_group([*prefs, make_pair("new"), make_pair("newer")], 0.25, seed=0)
    assert len(collect_prompts(test) - collect_prompts(test_of_more)) <= 2


def test_a_small_set_still_has_two_sides_and_a_single_group_is_refused():
    train, test = split_by_group([make_pair("q0"), make_pair("q1"), make_pair("q2")], 0.01, seed=0)
    assert (len(train), len(test)) == (2, 1)
    train, test = split_by_group([make_pair("q0"), make_pair("q1")], 0.99, seed=0)
    assert (len(train), len(test)) == (1, 1)
    with pytest.raises(InputError, match="too few groups"):
        split_by_group([make_pair("q", "g"), make_pair("q", "h")], 0.5, seed=0)
    for share in (0, 1, -0.1):
        with pytest.raises(InputError, match="between 0 and 1"):
            split_by_group([make_pair("q0"), make_pair("q1")], share, seed=0)
