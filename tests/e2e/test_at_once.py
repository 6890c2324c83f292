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

LONGEST_S = 3
"""Of a processor's time for an answer, which takes some 0.6; with the imports of a stage that computes, 8."""
ANSWERS = """
import json, sys, time
from align.__main__ import main

for words in json.loads(sys.argv[1]):
    print("@@@", flush=True)
    began = time.process_time()
    status = main(words)
    heavy = {"torch", "transformers", "matplotlib", "datasets"} & set(sys.modules)
    print(json.dumps([status, sorted(heavy), time.process_time() - began]), flush=True)
"""


class Answer(NamedTuple):
    """The answer of a command.

    Attributes:
        imported: the modules of the process that take long to import.
        seconds: of the processor.
    """

    status: int
    said: str
    imported: list[str]
    seconds: float


def ask_afresh(*lines: list[str]) -> list[Answer]:
    """Return the answers of one new process to some command lines, one after the other."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ANSWERS, json.dumps(lines)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=300
    )
    answers = []
    for said in done.stdout.split("@@@\n")[1:]:
        status, imported, seconds = json.loads(said.splitlines()[-1])
        answers.append(Answer(status, said, imported, seconds))
    assert len(answers) == len(lines), done.stdout
    assert max(answer.seconds for answer in answers) < LONGEST_S
    return answers


@pytest.fixture(scope="module")
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


def lines(ready: Ready, model: Path, rows: Path) -> dict[str, list[str]]:
    """Return the words of a run of a second or two of each stage that reads rows of a file."""
    pairs = ["init=sft:s", "data=jsonl", f"data.path={rows}", "stage.held_out=0.3", *CHATS[1:3]]
    on_pairs = {stage: [f"stage={stage}", *pairs] for stage in ("reward", "dpo", "kto")}
    return {**readers(ready, model, rows), **on_pairs}


def test_finished_runs_answer_without_torch(ready: Ready, tiny_model: Path, chats: Path, shop: Workshop):
    """What takes its time is importing: no stage imports torch before it knows that there is something to do."""
    common = [f"run.root={ready.root}", "run.name=at-once", "device=cpu"]
    conversations = lines(ready, tiny_model, chats)
    export = ["stage=export", "artifact=sft:s", "export.vllm=none", "export.base=none"]
    commands = [[*words, *common] for words in (conversations["sft"], conversations["ppo"], export)]
    for words in commands:
        assert shop.ended(*words) == 0, shop.said
    for answer in ask_afresh(*commands):
        assert "This run is finished already" in answer.said, answer.said
        assert (answer.status, answer.imported) == (0, [])


def test_mistakes_in_a_row_are_told_without_torch(ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path):
    pairs = [json.dumps({"prompt": f"hello {i}", "chosen": "hi", "rejected": "go"}) for i in range(40)]
    kinds = {"chats": chats.read_text().splitlines(), "pairs": pairs}
    for kind, rows in kinds.items():
        (tmp_path / f"{kind}.jsonl").write_text("\n".join([*rows[:-1], '{"messages": 3']) + "\n")
    on_chats, on_pairs = (lines(ready, tiny_model, tmp_path / f"{kind}.jsonl") for kind in kinds)
    commands = on_chats | {stage: on_pairs[stage] for stage in ("reward", "dpo", "kto")}
    common = [f"run.root={ready.root}", "run.name=a-mistake", "device=cpu"]
    for stage, answer in zip(commands, ask_afresh(*([*words, *common] for words in commands.values())), strict=True):
        assert ".jsonl, row 40=" in answer.said, answer.said
        assert (answer.status, answer.imported) == (2, []), stage
