"""Evaluations of several systems by command lines, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready

from align.__main__ import main

ROWS: Sequence[Mapping[str, Any]] = (
    {"id": "one", "prompt": "Say hello.", "check": {"kind": "regex", "pattern": "[aeiou]"}, "category": "vowels"},
    {"id": "two", "prompt": "Say yes.", "check": {"kind": "regex", "pattern": "e"}, "category": "vowels"},
    {"id": "three", "prompt": "What is 2 + 2?", "check": {"kind": "exact", "answers": ["4"]}, "source": "sums"},
    {"id": "four", "prompt": "What is 1 + 1?", "check": {"kind": "exact", "answers": ["2"]}, "source": "sums"},
    {"key": 5, "prompt": "Use no comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
)
SYSTEMS = "stage.systems={new: ppo:p, old: sft:s, base: base}"


class Bench:
    """Evaluations in one root, by the rules of `reward=rules`, which nobody was trained by."""

    def __init__(self, ready: Ready, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.ready, self.capsys, self.folder = ready, capsys, folder
        self.judge = ["reward=rules", "reward.rules=[{rule: regex, pattern: e, weight: 1.0}]"]

    def words(self, *more: str) -> list[str]:
        judge = [] if any(word.startswith("reward=") for word in more) else self.judge
        ours = ["stage=eval", *self.ready.data, "rollout.max_new_tokens=12", "stage.prompts=12", *judge]
        return [*ours, f"run.root={self.ready.root}", *more]

    def chats(self) -> list[str]:
        (path,) = (word.removeprefix("data.path=") for word in self.ready.data if word.startswith("data.path="))
        return Path(path).read_text(encoding="utf-8").splitlines()

    def run(self, *more: str) -> Path:
        assert main(self.words(*more)) == 0
        return Path(self.capsys.readouterr().out.strip().splitlines()[-1])

    def refused(self, *more: str) -> str:
        assert main(self.words(*more)) == 2
        return self.capsys.readouterr().err

    def tasks(self, *rows: Mapping[str, Any], name: str = "asked", **more: Any) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        keys = "".join(f", {key}: {value}" for key, value in more.items())
        return f"eval.tasks=[{{name: {name}, path: {path}{keys}}}]"


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifact" / "results.json").read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "artifact" / "answers.jsonl").read_text().splitlines()]
