"""Probes of a suite: reading of their rows, figures of log-likelihoods, and rows that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.core.types import Conversation, Message, ToolCall
from align.data.chat.continuations import encode_answer
from align.evals.suite.gates import parse_gates
from align.evals.suite.likelihoods import encode_item
from align.evals.suite.probes import (
    CHOICE,
    LOSS,
    ChoiceQuestion,
    Probe,
    compute_bits_per_byte,
    compute_probe_figures,
    count_scored_bytes,
    score_choices,
)
from align.evals.suite.tasks import EvalItem, EvalTask, load_task_items, parse_tasks
from align.models.base import find_base
from align.models.load import load_tokenizer

ROW = {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}


def load_rows_as_items(
    tmp_path: Path, *rows: dict[str, Any], probe: Probe | None = None, name: str = "t.jsonl"
) -> list[EvalItem]:
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [*load_task_items(EvalTask("t", str(path), probe=probe or Probe(CHOICE)), None, False)]


@pytest.mark.parametrize(("answer", "place"), [(1, 1), ("B", 1), ("b", 1), ("A", 0)])
def test_the_right_choice_is_named_by_its_place_or_letter(tmp_path: Path, answer: Any, place: int) -> None:
    (item,) = load_rows_as_items(tmp_path, {**ROW, "answer": answer, "category": "geo"})
    assert item.probe == ChoiceQuestion(("Paris", "Rome"), place)
    assert (item.category, item.check, item.prompt.messages[0].content) == ("geo", None, "The capital of France is")


def test_a_table_has_choices_as_json(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('prompt,choices,answer\nIt is,"[""a"", ""b""]",1\n,"[""a"", ""b""]",A\n', encoding="utf-8")
    items = load_task_items(EvalTask("t", str(path), probe=Probe(CHOICE)), None, False)
    assert [item.probe for item in items] == [ChoiceQuestion(("a", "b"), 1), ChoiceQuestion(("a", "b"), 0)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**ROW, "answer": 2}, "names none of 2 choices"),
        ({**ROW, "answer": -1}, "names none of 2 choices"),
        ({**ROW, "answer": "C"}, "names none of 2 choices"),
        ({**ROW, "answer": [0]}, "names none of 2 choices"),
        ({**ROW, "answer": True}, "is true or false, but the position of a choice is a whole number"),
        ({**ROW, "answer": "Paris"}, "is a text, but the position of a choice is a whole number"),
        ({**ROW, "answer": "1"}, "is a text, but the position of a choice is a whole number"),
        ({**ROW, "answer": 1.0}, "is a number with a decimal point, but the position of a choice is a whole number"),
        ({**ROW, "answer": None}, "is missing"),
        ({"prompt": "a", "choices": ["b", "c"]}, "is missing"),
        ({**ROW, "choices": ["Rome", "Paris", "Rome"]}, "has Rome twice"),
        ({**ROW, "choices": ["1", 1]}, "has 1 twice"),
        ({**ROW, "choices": ["Paris"]}, "at least two texts"),
        ({**ROW, "choices": "Paris"}, "at least two texts"),
        ({**ROW, "choices": ["Paris", " "]}, "is blank"),
        ({**ROW, "choices": ["Paris", None]}, "is no text"),
        ({**ROW, "context": "x"}, "needs either prompt or context"),
        ({"choices": ["a", "b"], "answer": 0}, "needs either prompt or context"),
        ({**ROW, "prompt": None}, "is no text"),
        ({**ROW, "prompt": [{"role": "user", "content": "x"}]}, "template: true"),
        ({**ROW, "check": {"kind": "regex", "pattern": "e"}}, "this task is a probe"),
    ],
)
def test_rows_of_choices_that_are_none(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_rows_as_items(tmp_path, row)


def test_a_chat_is_a_prompt_of_choices_with_a_template(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    (item,) = load_rows_as_items(tmp_path, {**ROW, "prompt": turns}, probe=Probe(CHOICE, template=True))
    assert [turn.role for turn in item.prompt.messages] == ["system", "user"]


def test_choices_with_a_template_are_scored_as_answers_to_the_chat(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "The capital of France?"}]
    task = EvalTask("t", probe=Probe(CHOICE, template=True))
    (item,) = load_rows_as_items(tmp_path, {**ROW, "prompt": turns}, probe=task.probe)
    tokenizer = load_tokenizer(find_base("pocket"))
    rows = encode_item(tokenizer, task, item, 1024, 1024)
    assert rows == [encode_answer(tokenizer, item.prompt, text) for text in ("Paris", "Rome")]


def test_rows_of_texts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé"}]
    items = load_rows_as_items(tmp_path, {"text": "Grüße"}, {"messages": turns}, probe=Probe(LOSS))
    assert items[0].probe == "Grüße"
    assert isinstance(items[1].probe, Conversation)
    empty_answer = [turns[0], {"role": "assistant", "content": ""}]
    for row in (
        {"text": ""},
        {"messages": turns[:1]},
        {"messages": turns[1:]},
        {"prompt": "x"},
        {"messages": empty_answer},
    ):
        with pytest.raises(InputError):
            load_rows_as_items(tmp_path, row, probe=Probe(LOSS))


def test_conversations_have_the_system_turn_of_the_data(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé"}]
    for probe, row in (
        (Probe(LOSS), {"messages": turns}),
        (Probe(CHOICE, template=True), ROW),
        (Probe(CHOICE), ROW),
        (Probe(LOSS), {"text": "Hi"}),
    ):
        path = tmp_path / "t.jsonl"
        path.write_text(json.dumps(row), encoding="utf-8")
        (item,) = load_task_items(EvalTask("t", str(path), probe=probe), "Be kind.", False)
        chat = probe.template or "messages" in row
        assert (item.prompt.messages[0].role == "system") == chat
        if isinstance(item.probe, Conversation):
            assert item.probe == item.prompt


def test_items_without_a_context_share_nothing_and_those_of_one_do(tmp_path: Path) -> None:
    rows = [{**ROW, "prompt": prompt, "id": id} for id, prompt in (("a", ""), ("b", ""), ("c", "x"), ("d", "x"))]
    assert len({item.cluster for item in load_rows_as_items(tmp_path, *rows)}) == 3


def test_bytes_are_those_of_what_is_scored() -> None:
    assert count_scored_bytes("Grüße 🙂") == 12
    call = ToolCall.from_arguments("find", {"a": 1})
    turns = (
        Message("user", "long question"),
        Message("assistant", "é"),
        Message("assistant", "read only", trained=False),
        Message("assistant", "", tool_calls=(call,)),
    )
    assert count_scored_bytes(Conversation(turns)) == 2 + len("find") + len(call.arguments)


def test_what_is_chosen_by_each_norm() -> None:
    """Choices by hand: -6/1, -8/4, -9/4 by character; é has two bytes."""
    question = ChoiceQuestion(("é", "four", "ëëëë"), 1)
    scores = score_choices(question, [-6.0, -8.0, -9.0])
    assert [scores[f"{name}_choice"] for name in ("acc", "acc_norm", "acc_bytes")] == [0, 1, 2]
    assert [scores[name] for name in ("acc", "acc_norm", "acc_bytes")] == [0.0, 1.0, 0.0]
    assert score_choices(ChoiceQuestion(("a", "b"), 1), [-1.0, -1.0])["acc_choice"] == 0, "of equal ones the first"


def test_figures_by_hand() -> None:
    figures = compute_probe_figures([{"nats": 2.0, "tokens": 2, "bytes": 1}, {"nats": 4.0, "tokens": 1, "bytes": 3}])
    assert figures["nats_per_token"] == 2.0
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["bits_per_byte"] == pytest.approx(6 / math.log(2) / 4) == compute_bits_per_byte(6.0, 4)
    choice_rows = [{"logprobs": [], "acc": a, "acc_norm": 1.0, "acc_bytes": 0.0} for a in (1.0, 0.0, 0.0, 0.0)]
    assert compute_probe_figures(choice_rows) == {"acc": 0.25, "acc_norm": 1.0, "acc_bytes": 0.0}


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"probe": "choices"}, "is none of the choices"),
        ({"probe": "choice", "path": None}, "is needed for a probe"),
        ({"probe": "choice", "norm": "tokens"}, "is none of the choices"),
        ({"probe": "choice", "template": "yes"}, "neither true nor false"),
        ({"probe": "choice", "check": {"kind": "regex", "pattern": "e"}}, "generates none"),
        ({"probe": "loss", "norm": "bytes"}, "probe: choice only"),
        ({"template": True}, "probe: choice only"),
    ],
)
def test_tasks_that_are_no_probe(task: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_tasks([{"name": "t", "path": "t.jsonl", **task}], False)


def test_a_loss_has_gates_against_another_system_alone() -> None:
    tasks = parse_tasks([{"name": "t", "path": "t.jsonl", "probe": "loss"}], False)
    gate = {"name": "g", "task": "t", "is": "not_worse", "margin": 0.02, "against": "b"}
    assert parse_gates([gate], tasks, ("a", "b"))[0].rule.margin == 0.02
    with pytest.raises(InputError, match="which have no absolute scale"):
        parse_gates([{"name": "g", "task": "t", "is": "superior", "margin": 0.5}], tasks, ("a", "b"))


def test_a_margin_in_bits_per_byte_may_be_above_1_and_one_of_shares_may_not() -> None:
    gate = {"name": "g", "task": "t", "is": "not_worse", "margin": 1.5, "against": "b"}
    loss, choice = ([EvalTask("t", "t.jsonl", probe=Probe(kind))] for kind in (LOSS, CHOICE))
    assert parse_gates([gate], loss, ("a", "b"))[0].rule.margin == 1.5
    with pytest.raises(InputError, match="is larger than any possible difference of shares"):
        parse_gates([gate], choice, ("a", "b"))


@pytest.mark.parametrize("kind", [LOSS, CHOICE])
def test_a_probe_has_no_agreement(kind: str) -> None:
    gate = {"name": "g", "task": "t", "is": "superior", "against": "b", "min_agreement": 0.7}
    with pytest.raises(InputError, match="applies to tasks with a judge, and task t is a probe") as error:
        parse_gates([gate], [EvalTask("t", "t.jsonl", probe=Probe(kind))], ("a", "b"))
    assert error.value.field == "eval.gates[0].min_agreement"
