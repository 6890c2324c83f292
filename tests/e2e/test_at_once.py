"""Answers that need no tensor come at once: a run that is finished, asked again; a mistake in a row. Without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from refusing import CHATS, readers
from workshop import Ready, Workshop

TIMES = 5
"""How many times the processor time of a composed configuration an answer may take. It takes some 3; with torch and
what needs it, 8 to 12. A limit in seconds would measure the machine."""
TRIES = 3
"""What else runs on a machine may double the time of a process, but hardly thrice in a row."""
ANSWERS = """
import json, sys, time
from align.__main__ import main

ended = 0.0  # when the process began, so that the first answer pays for its imports
for words in json.loads(sys.argv[1]):
    print("@@@", flush=True)
    status = main(words)
    heavy = {"torch", "transformers", "matplotlib", "datasets"} & set(sys.modules)
    began, ended = ended, time.process_time()
    print(json.dumps([status, sorted(heavy), ended - began]), flush=True)
"""


class Answer(NamedTuple):
    """Attributes:
    said: what was printed.
    imported: the modules of the process that take long to import.
    seconds: of the processor.
    """

    status: int
    said: str
    imported: list[str]
    seconds: float


def ask_afresh(*lines: list[str]) -> list[Answer]:
    """The answers of one new process to some command lines, one after the other."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ANSWERS, json.dumps(lines)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=300
    )
    answers = []
    for said in done.stdout.split("@@@\n")[1:]:
        told = json.loads(said.splitlines()[-1])
        answers.append(Answer(told[0], said, told[1], told[2]))
    assert len(answers) == len(lines), done.stdout
    return answers


def ask_within(composed: float, *lines: list[str]) -> list[Answer]:
    """The same; asked again where an answer takes longer than it may, `TRIES` times at most in all."""
    for _ in range(TRIES):
        answers = ask_afresh(*lines)
        if all(answer.seconds < TIMES * composed for answer in answers):
            break
    return answers


@pytest.fixture(scope="module")
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


@pytest.fixture(scope="module")
def composed() -> float:
    """Seconds of a processor in which a new process composes a configuration: the least that any command takes."""
    return min(ask_afresh(["stage=sft", "--cfg", "job"])[0].seconds for _ in range(2))


READING = ("sft", "full", "sample", "reward", "dpo", "kto", "ppo", "eval")
"""Stages that read rows of a file."""


def lines(ready: Ready, model: Path, chats: Path) -> dict[str, list[str]]:
    """Stage → words of a run that takes a second or two."""
    conversations = readers(ready, model, chats)
    pairs = ["init=sft:s", "data.allow_simulated=true", "stage.held_out=0.3", *CHATS[1:3]]
    short = ["stage.prompts=2", "rollout.max_new_tokens=4"]
    return {
        **conversations, "sample": [*conversations["sample"], *short], "eval": [*conversations["eval"], *short],
        "reward": ["stage=reward", *pairs], "dpo": ["stage=dpo", *pairs], "kto": ["stage=kto", *pairs],
        "export": ["stage=export", "artifact=sft:s", "export.vllm=none", "export.base=none"],
        "verify": ["stage=verify", "init=sft:s", "reward.ref=reward:a", "stage.rows=2", "rollout.max_new_tokens=4"],
    }  # fmt: skip


def test_finished_runs_answer_at_once(ready: Ready, tiny_model: Path, chats: Path, shop: Workshop, composed: float):
    commands = {
        stage: [*words, f"run.root={ready.root}", "run.name=at-once", "device=cpu"]
        for stage, words in lines(ready, tiny_model, chats).items()
    }
    for words in commands.values():
        assert shop.ended(*words) == 0, shop.said
    for stage, answer in zip(commands, ask_within(composed, *commands.values()), strict=True):
        assert "This run is finished already" in answer.said, answer.said
        assert (answer.status, answer.imported) == (0, []), stage
        assert answer.seconds < TIMES * composed, stage


def test_mistakes_in_a_row_are_said_at_once(
    ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, composed: float
):
    pairs = [json.dumps({"prompt": f"hello {i}", "chosen": "hi", "rejected": "go"}) for i in range(40)]
    kinds = {"pairs": pairs, "chats": chats.read_text().splitlines()}
    for kind, rows in kinds.items():
        (tmp_path / f"{kind}.jsonl").write_text("\n".join([*rows[:-1], '{"messages": 3']) + "\n")
    kind_of = {stage: "pairs" if stage in ("reward", "dpo", "kto") else "chats" for stage in READING}
    commands = []
    for stage, kind in kind_of.items():
        path = tmp_path / f"{kind}.jsonl"
        words = [*lines(ready, tiny_model, path)[stage], "data=jsonl", f"data.path={path}"]
        commands.append([*words, f"run.root={ready.root}", "run.name=a-mistake", "device=cpu"])
    answers = ask_within(composed, *commands)
    for (stage, kind), answer in zip(kind_of.items(), answers, strict=True):
        assert f"{kind}.jsonl, row {len(kinds[kind])}=" in answer.said, answer.said
        assert (answer.status, answer.imported) == (2, []), stage
        assert answer.seconds < TIMES * composed, stage
