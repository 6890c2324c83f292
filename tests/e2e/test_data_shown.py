"""Rows that `stage=data` shows: the shapes that they are read as, and their tokens in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_sets import build_data_set, build_question_row, write_three_sources
from json_lines import write_rows

from align.core.types import Conversation, Message
from align.data.chat.template import set_chat_template
from align.data.chat.training_view import render_tokens
from align.models.base import find_base
from align.models.load import load_tokenizer
from align.report import reading_progress
from align.report.figure_text import NO_BREAK


def test_rows_are_shown_as_the_template_of_the_model_writes_them(tmp_path: Path, tiny_model: Path) -> None:
    sources_folder = write_three_sources(tmp_path)
    table = "{path: %s, columns: {prompt: question, completion: answer}}" % (sources_folder / "table.csv")
    arguments = [
        "stage=data",
        f"stage.sources=[{sources_folder / 'support.jsonl'}, {table}]",
        f"run.root={sources_folder / 'runs'}",
    ]
    folder, data, stdout = build_data_set(
        sources_folder, *arguments, "model=hub", f"model.path={tiny_model}", "run.name=rendered"
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["row"].partition(":")[0] for row in rows] == ["support"] * 3 + ["table"] * 3
    tokenizer = load_tokenizer(find_base(str(tiny_model)))
    set_chat_template(tokenizer, None)
    first_row = json.loads(
        (sources_folder / "support.jsonl").read_text().splitlines()[int(rows[0]["row"].partition(":")[2]) - 1]
    )
    conversation = Conversation(tuple(Message(**turn) for turn in first_row["messages"]))
    assert rows[0] == {"row": rows[0]["row"], **render_tokens(tokenizer, conversation)[0]}
    page = (folder / "report.html").read_text()
    assert f"as the chat template of <code>{tiny_model}</code> writes them" in page
    assert "What the colours mean" in page
    assert "read as" in page
    assert stdout.index("  support: messages (OpenAI), columns messages") < stdout.index("to train on")
    assert "  table: a prompt and its completion, columns prompt, completion" in stdout
    assert {source["name"]: source["read_as"]["shapes"] for source in data["sources"]} == {
        "support": {"messages (OpenAI)": 100},
        "table": {"a prompt and its completion": 50},
    }
    plain_folder, plain_data, _ = build_data_set(sources_folder, *arguments, "run.name=plain")
    assert plain_data["root"] == data["root"]
    page = (plain_folder / "report.html").read_text()
    assert "turn by turn" in page
    assert "model=hub model.path=ORG/NAME" in page
    assert "<mark>" in page


def test_personal_data_is_not_shown_in_rendered_rows(tmp_path: Path, tiny_model: Path) -> None:
    rows = [build_question_row(f"I am someone{i}@example.com", f"Write to other{i}@example.com") for i in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for name, model in (("rendered", ["model=hub", f"model.path={tiny_model}"]), ("plain", [])):
        folder, _, _ = build_data_set(
            tmp_path,
            "stage=data",
            f"stage.sources=[{path}]",
            f"run.root={tmp_path / 'runs'}",
            "stage.clean=[{pii: {action: report}}]",
            f"run.name={name}",
            *model,
        )
        texts = (folder / "rows.jsonl").read_text() + (folder / "report.html").read_text()
        assert "[EMAIL]" in texts
        assert "@example.com" not in texts


def test_progress_of_reading_and_starts_of_long_steps_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading_progress, "OFTEN_S", 0.0)
    monkeypatch.setattr(reading_progress, "MANY", 300)
    update = reading_progress.create_reading_progress("rows", lambda: 0.5)
    update(100, 99)
    printed = capsys.readouterr().out
    assert printed.startswith("rows: 100 rows read, 99 kept, ")
    assert f" rows a second, 50{NO_BREAK}% of its bytes" in printed
    reading_progress.print_start("publishes", 299)
    assert capsys.readouterr().out == ""
    reading_progress.print_start("publishes", 300)
    assert "publishes 300 rows" in capsys.readouterr().out


def test_how_far_a_source_is_read_and_how_long_it_takes() -> None:
    assert (
        reading_progress.describe_share_read(20.0, 0.5, [(10.0, 0.25)])
        == f", 50{NO_BREAK}% of its bytes, about 20 seconds left"
    )
    # The pace is not known yet.
    assert reading_progress.describe_share_read(10.0, 0.25, [(10.0, 0.25)]) == f", 25{NO_BREAK}% of its bytes"
    assert reading_progress.describe_share_read(10.0, None, []) == ""
