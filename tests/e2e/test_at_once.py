"""Answers that need no tensor come at once: a run that is finished, asked again; a mistake in a row. Without torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from refusing import CHATS, readers
from workshop import Ready, Workshop

TIMES = 5
"""How many times the processor time of a composed configuration an answer may take. It takes some 3; with torch and
what needs it, 8 to 12. A limit in seconds would measure the machine."""
TRIES = 3
"""What else runs on a machine may double the time of a process, but hardly thrice in a row."""
ASKED = """
import sys
from align.__main__ import main
status = main(sys.argv[1:])
heavy = {"torch", "transformers", "matplotlib", "datasets"} & set(sys.modules)
print(f"status {status}, imported {sorted(heavy)}")
"""


def asked(words: list[str]) -> tuple[str, float]:
    """What a new process says to a command line, and the seconds of a processor that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, *words], capture_output=True, text=True, env=environment, timeout=300
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout + done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def asked_within(limit: float, words: list[str]) -> tuple[str, float]:
    """The same; asked again where the answer takes longer than a limit, `TRIES` times at most in all."""
    for _ in range(TRIES):
        said, seconds = asked(words)
        if seconds < limit:
            break
    return said, seconds


@pytest.fixture(scope="module")
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


@pytest.fixture(scope="module")
def composed() -> float:
    """Seconds of a processor in which a new process composes a configuration: the least that any command takes."""
    return min(asked(["stage=sft", "--cfg", "job"])[1] for _ in range(2))


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


@pytest.mark.parametrize("stage", ["sft", "full", "sample", "reward", "dpo", "kto", "ppo", "eval", "export", "verify"])
def test_a_finished_run_answers_at_once(
    ready: Ready, tiny_model: Path, chats: Path, shop: Workshop, composed: float, stage: str
):
    words = [*lines(ready, tiny_model, chats)[stage], f"run.root={ready.root}", "run.name=at-once", "device=cpu"]
    assert shop.ended(*words) == 0, shop.said
    said, seconds = asked_within(TIMES * composed, words)
    assert "This run is finished already" in said, said
    assert "status 0, imported []\n" in said, said
    assert seconds < TIMES * composed


@pytest.mark.parametrize("stage", ["sft", "full", "sample", "reward", "dpo", "kto", "ppo", "eval"])
def test_a_mistake_in_a_row_is_said_at_once(
    ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, shop: Workshop, composed: float, stage: str
):
    path = tmp_path / "rows.jsonl"
    pairs = [json.dumps({"prompt": f"hello {i}", "chosen": "hi", "rejected": "go"}) for i in range(40)]
    rows = pairs if stage in ("reward", "dpo", "kto") else chats.read_text().splitlines()
    path.write_text("\n".join([*rows[:-1], '{"messages": 3']) + "\n")
    words = [*lines(ready, tiny_model, path)[stage], "data=jsonl", f"data.path={path}"]
    words += [f"run.root={ready.root}", "run.name=a-mistake", "device=cpu"]
    said, seconds = asked_within(TIMES * composed, words)
    assert f"rows.jsonl, row {len(rows)}=" in said, said
    assert "status 2, imported []\n" in said, said
    assert seconds < TIMES * composed
