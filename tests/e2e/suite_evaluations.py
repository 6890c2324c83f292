"""Runners of `stage=eval` commands that share a root, and readers of the artifacts that they write."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready

from align.__main__ import main

ROWS: Sequence[Mapping[str, Any]] = (
    {"id": "one", "prompt": "Say hello.", "check": {"kind": "regex", "pattern": "[aeiou]"}, "category": "vowels"},
    {"id": "two", "prompt": "Say yes.", "check": {"kind": "regex", "pattern": "e"}, "category": "vowels"},
    {"id": "three", "prompt": "What is 2 + 2?", "check": {"kind": "exact", "answers": ["4"]}, "source": "sums"},
    {"id": "four", "prompt": "What is 1 + 1?", "check": {"kind": "exact", "answers": ["2"]}, "source": "sums"},
    {"key": 5, "prompt": "Use no comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
)
SYSTEMS = "stage.systems={new: ppo:p, old: sft:s, base: base}"


class Evaluations:
    """Evaluation commands that share one `run.root`.

    Attributes:
        output: standard output of the last command.
    """

    def __init__(self, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.folder = folder
        self.capsys = capsys
        self.output = ""

    def words(self, *more: str) -> list[str]:
        """Return the complete command."""
        return list(more)

    def run(self, *more: str, status: int = 0) -> Path:
        assert main(self.words(*more)) == status, self.capsys.readouterr()
        self.output = self.capsys.readouterr().out
        return Path(self.output.strip().splitlines()[-1])

    def expect_error(self, *more: str) -> str:
        assert main(self.words(*more)) == 2, self.capsys.readouterr()
        error = self.capsys.readouterr().err
        assert "Traceback" not in error
        return error

    def file(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path


class RuleEvaluations(Evaluations):
    """Evaluations in one `run.root`, scored by `reward=rules`, which no training run used."""

    def __init__(self, ready: Ready, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(ready.root, folder, capsys)
        self.ready = ready
        self.judge = ["reward=rules", "reward.rules=[{rule: regex, pattern: e, weight: 1.0}]"]

    def words(self, *more: str) -> list[str]:
        judge = [] if any(word.startswith("reward=") for word in more) else self.judge
        defaults = ["stage=eval", *self.ready.data, "rollout.max_new_tokens=12", "stage.prompts=12", *judge]
        return [*defaults, f"run.root={self.root}", *more]

    def chats(self) -> list[str]:
        (path,) = (word.removeprefix("data.path=") for word in self.ready.data if word.startswith("data.path="))
        return Path(path).read_text(encoding="utf-8").splitlines()

    def tasks(self, *rows: Mapping[str, Any], name: str = "asked", **more: Any) -> str:
        keys = "".join(f", {key}: {value}" for key, value in more.items())
        return f"eval.tasks=[{{name: {name}, path: {self.file(f'{name}.jsonl', rows)}{keys}}}]"


def read_results(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifact" / "results.json").read_text())


def read_artifact_rows(run: Path, name: str = "answers") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "artifact" / f"{name}.jsonl").read_text().splitlines()]


def count_cached_answers(place: Evaluations) -> int:
    """Return the number of answers in the answer cache of its root."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{place.root / 'answers.db'}?mode=ro", uri=True)) as db:
        return db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    return 0
