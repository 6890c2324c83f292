"""Commands that need no tensor answer without importing torch: a finished run that is started again, and a mistake in a
row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from bad_values import CHATS, build_reading_commands
from stage_commands import Ready, Workshop

LONGEST_S = 3
"""Processor seconds for an answer. It takes about 0.6, and 8 with the imports of a stage that computes."""
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
    """The result of a command.

    Attributes:
        imported: the modules of the process that take long to import.
        seconds: of the processor.
    """

    status: int
    output: str
    imported: list[str]
    seconds: float


def run_afresh(*commands: list[str]) -> list[Answer]:
    """Run command lines one after the other in one new process, and return their results."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ANSWERS, json.dumps(commands)]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=300
    )
    answers = []
    for output in process.stdout.split("@@@\n")[1:]:
        status, imported, seconds = json.loads(output.splitlines()[-1])
        answers.append(Answer(status, output, imported, seconds))
    assert len(answers) == len(commands), process.stdout
    assert max(answer.seconds for answer in answers) < LONGEST_S
    return answers


@pytest.fixture(scope="module")
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


def build_commands(ready: Ready, model: Path, rows: Path) -> dict[str, list[str]]:
    """Return the commands of a short run of each stage that reads rows of a file."""
    pairs = ["init=sft:s", "data=jsonl", f"data.path={rows}", "stage.held_out=0.3", *CHATS[1:3]]
    on_pairs = {stage: [f"stage={stage}", *pairs] for stage in ("reward", "dpo", "kto")}
    return {**build_reading_commands(ready, model, rows), **on_pairs}


def test_finished_runs_answer_without_torch(ready: Ready, tiny_model: Path, chats: Path, shop: Workshop):
    """No stage imports torch before it knows that there is something to compute."""
    common = [f"run.root={ready.root}", "run.name=at-once", "device=cpu"]
    stage_commands = build_commands(ready, tiny_model, chats)
    export = ["stage=export", "artifact=sft:s", "export.vllm=none", "export.base=none"]
    commands = [[*command, *common] for command in (stage_commands["sft"], stage_commands["ppo"], export)]
    for command in commands:
        assert shop.run_command(*command) == 0, shop.output
    for answer in run_afresh(*commands):
        assert "This run is finished already" in answer.output, answer.output
        assert (answer.status, answer.imported) == (0, [])


def test_mistakes_in_a_row_are_told_without_torch(ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path):
    pairs = [json.dumps({"prompt": f"hello {i}", "chosen": "hi", "rejected": "go"}) for i in range(40)]
    kinds = {"chats": chats.read_text().splitlines(), "pairs": pairs}
    for kind, rows in kinds.items():
        (tmp_path / f"{kind}.jsonl").write_text("\n".join([*rows[:-1], '{"messages": 3']) + "\n")
    on_chats, on_pairs = (build_commands(ready, tiny_model, tmp_path / f"{kind}.jsonl") for kind in kinds)
    commands = on_chats | {stage: on_pairs[stage] for stage in ("reward", "dpo", "kto")}
    common = [f"run.root={ready.root}", "run.name=a-mistake", "device=cpu"]
    for stage, answer in zip(
        commands, run_afresh(*([*command, *common] for command in commands.values())), strict=True
    ):
        assert ".jsonl, row 40=" in answer.output, answer.output
        assert (answer.status, answer.imported) == (2, []), stage
