"""Columns beside a prompt: which are kept, which code reads them, and the ids and digests that ignore them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from json_lines import write_rows
from record_reads import read_records

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.read.content import DOCUMENTS, encode_content_row
from align.data.read.drops import BadRows
from align.data.sets.ids import compute_content_id
from align.data.sets.record_columns import columns_to_records, records_to_columns
from align.data.sources import DataSource, read_divided_documents, read_divided_prompts, read_source_prompts
from align.data.split import compute_question_key
from align.evals.suite.tasks import load_task_items, parse_task
from align.reward.check import CheckReward
from align.reward.inputs import require_row_checks

CHECK = {"kind": "exact", "answer": "4"}
SUM: dict[str, Any] = {"prompt": "2 + 2?", "answer": "4", "check": CHECK, "level": 1}
BESIDE = {"answer": "4", "check": CHECK, "level": 1}


def read_train_prompts(path: Path, **settings: Any) -> list[Conversation]:
    return read_source_prompts(DataSource("jsonl", str(path), **settings), "train")


def test_a_prompt_is_asked_whatever_became_of_its_answer(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "labels.jsonl", [{"prompt": "Hi", "completion": "Go away.", "label": False}])
    (prompt,) = read_train_prompts(path)
    assert (prompt.messages[0].content, prompt.columns) == ("Hi", {"completion": "Go away.", "label": False})
    with pytest.raises(InputError, match="label=False"):  # an unwanted answer is not trained on
        read_divided_documents(DataSource("jsonl", str(path)), 0)


def test_a_number_in_place_of_a_text_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'answer=4: is a number, .* Write "4"'):
        read_train_prompts(write_rows(tmp_path / "p.jsonl", [{"question": "2 + 2?", "answer": 4}]))


@pytest.mark.parametrize(
    ("row", "beside"),
    [
        (SUM, BESIDE),
        ({"prompt": "Hi"}, {}),
        ({"prompt": "Hi", "answer": None, "note": ""}, {"note": ""}),
        ({"question": "2 + 2?", "answer": "#### 4"}, {"answer": "#### 4"}),  # as GSM8K has it
        ({"prompt": "Hi", "completion": "Hello", "system": "Be brief.", "tools": []}, {"completion": "Hello"}),
        ({"instruction": "Add.", "input": "2 2", "history": [], "output": "4"}, {"output": "4"}),
        ({"input": "x", "prompt": "Hi"}, {"input": "x"}),
        (
            {"messages": [{"role": "user", "content": "é?"}], "prompt": "é?", "tests": ["assert f(2) == 4"]},
            {"prompt": "é?", "tests": ["assert f(2) == 4"]},
        ),
    ],
)
def test_a_prompt_keeps_the_columns_that_it_is_not_made_of(
    tmp_path: Path, row: dict[str, Any], beside: dict[str, Any]
) -> None:
    (prompt,) = read_train_prompts(write_rows(tmp_path / "p.jsonl", [row]))
    assert prompt.columns == beside
    assert bool(prompt.row) == bool(beside)
    hash(prompt)


def test_the_columns_stay_with_the_prompt(tmp_path: Path) -> None:
    """Columns survive a default system turn, hidden reasoning, an answer, and a separate evaluation file."""
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>a</think>b"},
            {"role": "user", "content": "2 + 2?"},
        ],
        "answer": "4",
    }
    path = write_rows(tmp_path / "p.jsonl", [row])
    (prompt,) = read_train_prompts(path, system="Add.", hide_reasoning=True)
    assert [turn.content for turn in prompt.messages] == ["Add.", "Hi", "b", "2 + 2?"]
    assert prompt.with_answer("4").turns(1).columns == {"answer": "4"}
    eval_path = write_rows(tmp_path / "q.jsonl", [{"prompt": "3 + 3?", "answer": "6"}])
    splits = read_divided_prompts(DataSource("jsonl", str(path), eval_path=str(eval_path)))
    assert [[document.columns for document in side] for side in splits] == [[{"answer": "4"}], [{"answer": "6"}]]


def test_tables_and_parquet(tmp_path: Path) -> None:
    """Cells of a CSV file are texts. A check in such a cell is parsed as JSON."""
    (tmp_path / "t.csv").write_text('prompt,check,empty\n2 + 2?,"{""kind"": ""exact"", ""answer"": ""4""}",\n')
    (prompt,) = read_train_prompts(tmp_path / "t.csv")
    assert prompt.columns == {"check": json.dumps(CHECK)}
    assert CheckReward().score([prompt.with_answer("4"), prompt.with_answer("5")]).tolist() == [1, 0]
    table = pa.table({"prompt": ["2 + 2?"], "x": [float("nan")], "raw": [b"\xff"], "check": [CHECK]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    (prompt,) = read_train_prompts(tmp_path / "t.parquet")
    assert prompt.columns["check"] == CHECK
    assert prompt.columns["raw"] is None  # JSON has no bytes
    assert prompt.columns["x"] != prompt.columns["x"]


def test_rows_that_differ_are_two_prompts_that_ask_the_same(tmp_path: Path) -> None:
    first, second = read_train_prompts(
        write_rows(tmp_path / "p.jsonl", [{**SUM, "answer": "4"}, {**SUM, "answer": "four"}])
    )
    assert first != replace(second, id=first.id)
    assert len({first, second}) == 2
    assert compute_question_key(first) == compute_question_key(second)  # so that both land on one side of the split


def test_what_is_imitated_keeps_none(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi", "completion": "Hello", "answer": "x"}])
    train, _ = read_divided_documents(DataSource("jsonl", str(path)))
    assert [document.row for document in train if isinstance(document, Conversation)] == [""]


def test_no_record_digest_data_set_or_store_has_them(tmp_path: Path) -> None:
    bare = Conversation((Message("user", "2 + 2?"),), "p:1")
    rich = replace(bare, row=json.dumps(BESIDE))
    assert encode_content_row(bare) == encode_content_row(rich) == b'{"messages":[{"content":"2 + 2?","role":"user"}]}'
    assert compute_content_id(encode_content_row(bare)) == compute_content_id(encode_content_row(rich))
    assert bare.as_dicts() == rich.as_dicts()  # what the store keeps, and samples.jsonl
    columns = records_to_columns(DOCUMENTS, [rich])
    assert columns_to_records(DOCUMENTS, pa.table(columns), ["p:1"]) == [bare]
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "2 + 2?", "check": CHECK, "level": 1}])
    bad_rows = BadRows()
    (read_back,) = read_records(str(path), bad_rows=bad_rows)
    assert read_back.record == replace(bare, id="p.jsonl:1")


def test_an_item_of_a_suite_has_its_whole_row(tmp_path: Path) -> None:
    """The row includes `category` and `source`, which a function as judge reads too."""
    path = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "2 + 2?", "answer": "4", "category": "sums"}])
    (item,) = load_task_items(parse_task({"name": "sums", "path": str(path)}, "eval.tasks[0]", False), None, False)
    assert item.prompt.columns == {"id": "a", "answer": "4", "category": "sums"}


def test_the_rows_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    reward = {
        "name": "sum",
        "parts": [{"weight": 1.0, "name": "check", "check": None, "allow_code": False, "unsafe_code": False}],
    }
    require_row_checks(reward, read_train_prompts(write_rows(tmp_path / "p.jsonl", [SUM])))
    require_row_checks({"name": "sentiment"}, read_train_prompts(write_rows(tmp_path / "q.jsonl", [{"prompt": "Hi"}])))
    for row, message in (
        ({"prompt": "Hi"}, r"q\.jsonl:1, check=\(missing\): the row has no check"),
        ({**SUM, "check": {"kind": "exact"}}, r"q\.jsonl:1, check\.answers=\(missing\): either"),
        ({**SUM, "check": {"kind": "code", "tests": ["assert f(2) == 4"]}}, r"q\.jsonl:1, check\.kind=code: runs"),
        ({**SUM, "check": [CHECK, CHECK]}, r"q\.jsonl:1, check=.*2 checks for 1 turns"),
    ):
        with pytest.raises(Exception, match=message) as error:
            require_row_checks(reward, read_train_prompts(write_rows(tmp_path / "q.jsonl", [row])))
        assert getattr(error.value, "exit_status", None) == 2
