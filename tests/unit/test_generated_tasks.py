"""Tests of data=reasoning_gym: its prompts, their division, their checks, and which tasks are refused."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from align.config.compose import build_config, compose_tree
from align.core.errors import InputError
from align.data.generated_tasks import COMPOSITE, EVALUATES, REFUSED_TASKS, build_tasks_input, generate_conversations
from align.data.sources import DataSource, read_divided_documents, read_divided_prompts
from align.reward.checkers import Checker, build_checkers, get_check_spec

OFFERED_TASKS = sorted(DATASETS.keys() - {COMPOSITE} - REFUSED_TASKS.keys())
ANSWERS = (
    "",
    "-731",
    "-0.0",
    "1e999999999",
    "9" * 5000,
    "nan",
    "(" * 2000,
    "{}",
    "[[]]",
    '{"a": [1, {"b": null}]}',
    "١٢",
    "<answer></answer>",
    "<answer>-731</answer> or <answer>-732</answer>",
)
"""Answers that parsers of numbers, lists and expressions do not expect."""


def get_checker(conversation: Any) -> Checker:
    spec = get_check_spec(conversation.columns, conversation.id)
    (checker,) = build_checkers(spec, 1, "check")
    assert checker is not None
    return checker


def test_prompts_are_those_of_the_package() -> None:
    settings = {"size": 5, "max_terms": 3}
    conversations = generate_conversations([{"name": "chain_sum", **settings}, {"name": "gcd", "size": 2, "seed": 7}])
    expected = [create_dataset("chain_sum", seed=0, **settings)[i]["question"] for i in range(5)]
    expected += [create_dataset("gcd", seed=7, size=2)[i]["question"] for i in range(2)]
    assert [conversation.messages[0].content for conversation in conversations] == expected
    assert [conversation.id for conversation in conversations][4:6] == ["0-chain_sum-4", "1-gcd-0"]


def test_equal_questions_are_in_one_split() -> None:
    tasks = [{"name": "chain_sum", "size": 400, "max_terms": 2, "max_digits": 1}]
    split = read_divided_prompts(DataSource("reasoning_gym", held_out=0.3, tasks=tasks))
    questions = [{conversation.messages[0].content for conversation in part} for part in split]
    assert sum(map(len, split)) == 400
    assert sum(map(len, questions)) < 400  # some questions occur twice
    assert all(questions)
    assert not questions[0] & questions[1]


def test_supervised_training_gets_the_right_answers() -> None:
    source = DataSource("reasoning_gym", tasks=[{"name": "number_sorting", "size": 20}])
    documents = read_divided_documents(source).train
    assert len(documents) == 20
    for document in documents:
        assert get_checker(document)(document.messages[-1].content).score == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("name", OFFERED_TASKS)
def test_every_task_accepts_its_answer_and_no_other(name: str) -> None:
    for conversation in generate_conversations([{"name": name, "size": 2}]):
        checker = get_checker(conversation)
        index = conversation.columns["check"]["index"]
        right_answer = create_dataset(name, seed=0, size=2)[index]["answer"]
        if right_answer is not None:
            assert checker(right_answer).score == 1
            assert checker(f"I add. <answer>wrong</answer> No:\n<answer> {right_answer} </answer>").score == 1
        for answer in ANSWERS:
            result = checker(answer)
            assert result.score == 0


DIGESTS = """
import sys
from align.data.generated_tasks import build_tasks_input
for name in sys.argv[1:]:
    print(name, build_tasks_input([{"name": name, "size": 3}]).digest)
"""


def test_offered_tasks_are_the_same_in_every_process() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIGESTS, *names],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, names in ((1, OFFERED_TASKS), (2, OFFERED_TASKS[::-1]))
    ]
    digests = [dict(line.split() for line in process.communicate()[0].splitlines()) for process in processes]
    assert digests[0] == digests[1]
    assert digests[0].keys() == {*OFFERED_TASKS}


def test_tasks_that_evaluate_answers_are_refused() -> None:
    """No other task has a module that evaluates a variable called answer."""
    evaluates = re.compile(r"(?:\beval|parse_expr|sympify|\bexec)\((?:\w+_)?answer\b")
    found = {
        name
        for name, (dataset, _) in DATASETS.items()
        if evaluates.search(inspect.getsource(sys.modules[dataset.__module__]))
    }
    assert found == {name for name, reason in REFUSED_TASKS.items() if reason == EVALUATES}


def test_no_offered_task_runs_an_answer(tmp_path: Any) -> None:
    mark = tmp_path / "mark"
    program = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name in OFFERED_TASKS:
        (conversation,) = generate_conversations([{"name": name, "size": 1}])
        for answer in (program, f"[{program}]", f"<answer>{program}</answer>"):
            assert get_checker(conversation)(answer).score == 0
            assert not mark.exists(), name


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([], "none is named"),
        ("gcd", "is no list"),
        ([3], "data.tasks[0]=3: is no task"),
        ([{"size": 3}], "data.tasks[0].name=None: is none of the choices"),
        (["gdc"], "data.tasks[0].name=gdc: is none of the choices. The choices are ab, "),
        (["gcd", "composite"], "data.tasks[1].name=composite: is none of the choices"),
        (["countdown"], "evaluates answers as Python in align's own process"),
        (["coin_flip"], "may take hours to score an answer"),
        (["word_ladder"], "generates other prompts in each process"),
        ([{"name": "gcd", "length": 1}], "data.tasks[0].length=1: is no setting of gcd. Its settings are min_numbers"),
        ([{"name": "gcd", "size": 0}], "data.tasks[0].size=0: is out of bounds"),
        ([{"name": "gcd", "size": "all"}], "data.tasks[0].size=all: is no number"),
        ([{"name": "gcd", "seed": None}], "data.tasks[0].seed=None: is no number"),
        ([{"name": "gcd", "min_value": 9, "max_value": 2}], "is refused by reasoning-gym: max_value"),
        ([{"name": "chain_sum", "min_digits": 1.5}], "is refused by reasoning-gym: "),
    ],
)
def test_wrong_tasks_are_named(tasks: Any, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        generate_conversations(tasks)


def test_a_task_without_a_single_answer_is_not_imitated() -> None:
    with pytest.raises(InputError, match="no single right answer to train on"):
        generate_conversations(["boxnet"], requires_answer=True)


def test_prompts_of_another_version_are_refused() -> None:
    (conversation,) = generate_conversations([{"name": "gcd", "size": 1}])
    row = json.dumps({"check": {**conversation.columns["check"], "version": "0.1.0"}})
    with pytest.raises(InputError, match="generated the prompt, and reasoning-gym"):
        get_checker(type(conversation)(conversation.messages, "p", row=row))


def test_a_run_records_what_was_generated() -> None:
    record = build_tasks_input([{"name": "gcd", "size": 3}])
    assert record.path == "reasoning_gym:gcd"
    assert record.details == {
        "tasks": [{"name": "gcd", "size": 3, "seed": 0}],
        "version": version("reasoning-gym"),
    }
    others = [{"name": "gcd", "size": 3, "seed": 1}], [{"name": "gcd", "size": 4}], [{"name": "lcm", "size": 3}]
    assert len({record.digest, *(build_tasks_input(tasks).digest for tasks in others)}) == 4


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data=reasoning_gym"], "data.tasks=None: data=reasoning_gym generates tasks"),
        (["data=reasoning_gym", "data.tasks=gcd"], "data.tasks=gcd: is no list of tasks"),
        (["data=files", "data.path=a.jsonl", "data.tasks=[gcd]"], "data=files reads no tasks"),
        (["data=reasoning_gym", "data.tasks=[gcd]", "data.path=a.jsonl"], "reads no file"),
        (["data=reasoning_gym", "data.tasks=[gcd]", "data.eval_path=a.jsonl"], "data.eval_path"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        build_config(compose_tree(["stage=ppo", *overrides]))
