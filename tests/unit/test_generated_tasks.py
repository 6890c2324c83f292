"""Tests of data=reasoning_gym: its prompts, their division, their checks, and the tasks that it offers."""

from __future__ import annotations

import decimal
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from align.config.compose import build_config, compose_tree
from align.core import distribution
from align.core.errors import InputError
from align.core.types import Conversation
from align.data import generated_tasks
from align.data.generated_tasks import (
    NUMBER_TASKS,
    READS,
    SEED_DISTANCE,
    TEXT_TASKS,
    build_tasks_input,
    generate_conversations,
    generate_entries,
    parse_task,
)
from align.data.sources import DataSource, add_rankers, read_divided_documents, read_divided_prompts
from align.evals.suite.tasks import EvalTask
from align.reward.checkers import Checker, build_checkers, exact, get_check_spec
from align.stages.eval.suite import read_items

reasoning_gym = pytest.importorskip(
    "reasoning_gym", reason="reasoning-gym is not installed: pip install 'align-rlhf[reasoning]'"
)

OFFERED_TASKS = sorted(NUMBER_TASKS | TEXT_TASKS)


def get_checker(conversation: Conversation) -> Checker:
    (checker,) = build_checkers(get_check_spec(conversation.columns, conversation.id), 1, "check")
    assert checker is not None
    return checker


def test_prompts_and_answers_are_those_of_the_package() -> None:
    settings = {"size": 5, "max_terms": 3}
    tasks = [{"name": "chain_sum", **settings}, {"name": "gcd", "size": 2, "seed": 7}]
    conversations = [*generate_conversations(tasks)]
    sums, divisors = (
        reasoning_gym.create_dataset("chain_sum", seed=0, **settings),
        reasoning_gym.create_dataset("gcd", seed=7 * SEED_DISTANCE),
    )
    expected = [sums[i] for i in range(5)] + [divisors[i] for i in range(2)]
    turns = [[message.content for message in conversation.messages] for conversation in conversations]
    assert turns == [[entry["question"], entry["answer"]] for entry in expected]
    assert [conversation.id for conversation in conversations][4:6] == ["0-chain_sum-4", "1-gcd-0"]


def test_neighbouring_seeds_share_no_prompt() -> None:
    task = {"name": "gcd", "size": 100, "max_value": 10**6}
    questions = [
        {conversation.messages[0].content for conversation in generate_conversations([{**task, "seed": seed}])}
        for seed in (0, 1)
    ]
    assert not questions[0] & questions[1]


def test_equal_questions_are_in_one_split() -> None:
    tasks = [{"name": "chain_sum", "size": 400, "max_terms": 2, "max_digits": 1}]
    split = read_divided_prompts(DataSource("reasoning_gym", held_out=0.3, tasks=tasks))
    questions = [{conversation.messages[0].content for conversation in part} for part in split]
    assert sum(map(len, split)) == 400
    assert sum(map(len, questions)) < 400  # some questions occur twice
    assert all(questions)
    assert not questions[0] & questions[1]


def test_supervised_training_gets_the_right_answers() -> None:
    documents = read_divided_documents(
        DataSource("reasoning_gym", tasks=[{"name": "number_sorting", "size": 20}])
    ).train
    assert len(documents) == 20
    for document in documents:
        assert isinstance(document, Conversation)
        assert get_checker(document)(document.messages[-1].content).score == 1


@pytest.mark.parametrize("name", OFFERED_TASKS)
def test_every_task_accepts_its_answer_and_no_other(name: str) -> None:
    for conversation in generate_conversations([{"name": name, "size": 3}]):
        checker = get_checker(conversation)
        right_answer = conversation.messages[-1].content
        for answer in (
            right_answer,
            f" {right_answer.upper()}\n",
            f"I <answer>add</answer>. <answer>{right_answer}</answer>!",
        ):
            assert checker(answer).score == 1
        others = ("", "nan", "1e999999999", "9" * 5000, f"{right_answer} or 7", f"<answer>{right_answer}x</answer>")
        for answer in (*others, f"<answer>{right_answer}</answer><answer>so</answer>", right_answer[:-1] + "#"):
            result = checker(answer)
            assert (result.score, result.error) == (0, "")


def test_numbers_may_be_written_in_any_format_and_other_answers_may_not() -> None:
    (conversation,) = generate_conversations([{"name": "products", "size": 1, "min_digits": 3, "max_digits": 3}])
    number = int(conversation.messages[-1].content)
    assert get_checker(conversation)(f"{number:,}.0").score == 1
    (conversation,) = generate_conversations([{"name": "base_conversion", "size": 1}])
    assert get_checker(conversation)(f"{conversation.messages[-1].content}.0").score == 0


def test_the_last_number_can_be_read() -> None:
    (conversation,) = generate_conversations([{"name": "gcd", "size": 1, "read": "last_number"}])
    checker = get_checker(conversation)
    assert checker(f"The GCD of 4 and 6 is {conversation.messages[-1].content}.").score == 1
    assert checker(f"It is {conversation.messages[-1].content}, not 5000.").score == 0


DIGESTS = """
import sys
from align.data.generated_tasks import build_tasks_input
for name in sys.argv[1:]:
    print(name, build_tasks_input([{"name": name, "size": 5}]).digest)
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


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([], "none is named"),
        ("gcd", "is no list"),
        ([3], "data.tasks[0]=3: is no task"),
        ([{"size": 3}], "data.tasks[0].name=None: is none of the choices"),
        (["gdc"], "data.tasks[0].name=gdc: is none of the choices. The choices are acre, "),
        (["gcd", "countdown"], "data.tasks[1].name=countdown: is none of the choices"),
        (
            [{"name": "gcd", "length": 1}],
            "data.tasks[0].length=1: is no setting of gcd. Its settings are read, min_numbers",
        ),
        ([{"name": "gcd", "size": 0}], "data.tasks[0].size=0: is out of bounds"),
        ([{"name": "gcd", "size": 1.5}], "data.tasks[0].size=1.5: is no whole number"),
        ([{"name": "gcd", "size": "all"}], "data.tasks[0].size=all: is no number"),
        ([{"name": "gcd", "seed": None}], "data.tasks[0].seed=None: is no number"),
        ([{"name": "gcd", "read": "lastnumber"}], "data.tasks[0].read=lastnumber: is none of the choices"),
        ([{"name": "dice", "read": "last_number"}], "data.tasks[0].read=last_number: reads numbers"),
        ([{"name": "gcd", "min_value": 9, "max_value": 2}], "is refused by reasoning-gym: max_value"),
        ([{"name": "chain_sum", "min_digits": 1.5}], "is refused by reasoning-gym: "),
        ([{"name": "spell_backward", "data_file": "/etc/hostname"}], "is refused by reasoning-gym: "),
    ],
)
def test_wrong_tasks_are_named(tasks: Any, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        list(generate_conversations(tasks))


def test_whole_numbers_may_be_written_as_decimals() -> None:
    assert len([*generate_conversations([{"name": "gcd", "size": 1e1, "seed": 2.0}])]) == 10


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'align-rlhf[reasoning]'")):
        list(generate_conversations(["gcd"]))


def test_a_run_records_what_was_generated() -> None:
    record = build_tasks_input([{"name": "gcd", "size": 3}])
    assert record.path == "reasoning_gym:gcd"
    assert record.details == {
        "tasks": [{"name": "gcd", "size": 3, "seed": 0, "read": "answer_tag"}],
        "tasks_version": version("reasoning-gym"),
    }
    others = [{"name": "gcd", "size": 3, "seed": 1}], [{"name": "gcd", "size": 4}], [{"name": "lcm", "size": 3}]
    assert len({record.digest, *(build_tasks_input(tasks).digest for tasks in others)}) == 4


def test_all_tasks_can_be_mixed(tmp_path: Path) -> None:
    inputs = {"data": build_tasks_input([{"name": name, "size": 1} for name in OFFERED_TASKS])}
    assert add_rankers(inputs, tmp_path) == inputs


def test_what_a_task_prints_is_suppressed(capfd: pytest.CaptureFixture[str]) -> None:
    generate_entries(parse_task({"name": "bf", "size": 3}, "task"), 0)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data=reasoning_gym"], "data.tasks=None: data=reasoning_gym generates tasks"),
        (["data=reasoning_gym", "data.tasks=gcd"], "data.tasks=gcd: is no list of tasks"),
        (["data=files", "data.path=a.jsonl", "data.tasks=[gcd]"], "data=files reads no tasks"),
        (["data=reasoning_gym", "data.tasks=[gcd]", "data.path=a.jsonl"], "reads no file"),
        (["data=reasoning_gym", "data.tasks=[gcd]", "data.eval_path=a.jsonl"], "data.eval_path"),
        (["data=reasoning_gym", "data.tasks=[gcd]", "init=base"], "no base model is named to train on it"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        build_config(compose_tree(["stage=ppo", *overrides]))


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_an_empty_split_names_the_settings_that_help(held_out: float) -> None:
    source = DataSource("reasoning_gym", held_out=held_out, tasks=[{"name": "gcd", "size": 5}])
    with pytest.raises(InputError, match=re.escape("Raise size in data.tasks, or set another data.held_out.")):
        read_divided_prompts(source)


def test_what_can_be_read_is_what_the_check_reads() -> None:
    assert (*exact.READS,) == READS


def test_tasks_change_no_decimal_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's task decimal_arithmetic sets the precision of the thread, by which others compute their answers."""
    monkeypatch.setattr(generated_tasks, "NUMBER_TASKS", NUMBER_TASKS | {"decimal_arithmetic"})
    task = {"name": "decimal_chain_sum", "size": 50}
    alone = [entry.answer for entry in generate_entries(parse_task(task, "task"), 0)]
    generate_entries(parse_task({"name": "decimal_arithmetic", "precision": 6, "size": 5}, "task"), 0)
    assert [entry.answer for entry in generate_entries(parse_task(task, "task"), 0)] == alone
    assert decimal.getcontext().prec == 28


def test_an_evaluation_scores_answers_by_the_checks_of_the_tasks() -> None:
    systems = "stage.systems={new: sft:latest, old: base}"
    data = ["data=reasoning_gym", "data.tasks=[{name: gcd, size: 40}]", "data.held_out=0.5"]
    config = build_config(compose_tree(["stage=eval", systems, "model=pocket", *data]))
    items = read_items(config, EvalTask("gcd", check={"kind": "regex", "pattern": "x"}))
    right_answers = {
        conversation.id: get_answer(conversation) for conversation in generate_conversations(config.data.tasks)
    }
    assert len(items) > 10
    for item in items:
        (checker,) = build_checkers(item.check, 1, item.id)
        assert checker is not None
        assert checker(right_answers[item.id]).score == 1
        assert checker(right_answers[item.id] + "0").score == 0
    assert all(item.check is None for item in read_items(config, EvalTask("gcd", asks="Is it right?")))


def get_answer(conversation: Conversation) -> str:
    return conversation.messages[-1].content
