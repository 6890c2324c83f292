"""PPO against what the rows of its prompts say: checks and functions, a function that fails on the way, and evaluations
by the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready

from align.__main__ import main
from align.track import read_rows

WORDS = "rain snow wind hail sleet frost cloud storm river ocean island harbour meadow forest"
CHECK = {"kind": "regex", "pattern": "[aeiou]"}
CHECKED = [{"prompt": f"Say something about {word}.", "check": CHECK, "letter": word[0]} for word in WORDS.split()]
OURS = '''
from pathlib import Path

def letters(chats, rows):
    """How often the letter of the row is said."""
    return [float(chat[-1]["content"].count(row["letter"])) for chat, row in zip(chats, rows)]

calls = []

def fails(chats, rows):
    """The same; from the second update on, a file must not be there."""
    calls.append(len(chats))
    if len(calls) > 2 and Path(__file__).with_name("down").exists():
        raise ConnectionError("the checker does not answer")
    return letters(chats, rows)

def missing(chats, rows):
    return [row["answer"] for row in rows]
'''


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHECKED), encoding="utf-8")
    return path


@pytest.fixture
def line(ready: Ready, rows: Path) -> list[str]:
    """PPO on these rows, without a reward."""
    kept = [word for word in ready.ppo if not word.startswith(("reward.", "data.path="))]
    return [*kept, f"data.path={rows}", f"run.root={ready.root}", "stage.normalise=off", "stage.save_every=1"]


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "of_rows.py").write_text(OURS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "of_rows", raising=False)
    return tmp_path


Said = Callable[[list[str], int], str]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    def run(words: list[str], status: int) -> str:
        found = main(words)
        out, err = capfd.readouterr()
        assert found == status, out + err
        assert "Traceback" not in err
        return err if status else out.splitlines()[-1]

    return run


def test_checks_of_rows_as_the_reward(line: list[str], said: Said) -> None:
    folder = Path(said([*line, "reward=check", "stage.eval_every=1", "stage.eval_prompts=3", "stage.shown=3"], 0))
    updates = [row for row in read_rows(folder / "metrics.jsonl") if "raw_score" in row]
    assert len(updates) == 2
    assert all(row["check_errors"] == 0 and 0 <= row["raw_score"] <= 1 for row in updates)
    shown = read_rows(folder / "samples.jsonl")
    assert shown
    assert all(row["score"] == any(vowel in row["answer"] for vowel in "aeiou") for row in shown)
    assert not any("letter" in row for row in shown)  # samples have what was said


def test_a_function_that_fails_loses_nothing(line: list[str], said: Said, ours: Path) -> None:
    """The run ends with status 2 and says where; the same command goes on from the checkpoint, to the bits of a run
    that nothing went wrong in."""
    words = [*line, "reward=fn", "reward.fn=of_rows:fails", "stage.updates=3"]
    whole = Path(said([*words, "run.name=whole"], 0))
    __import__("of_rows").calls.clear()
    (ours / "down").touch()
    told = said([*words, "run.name=cut"], 2)
    assert "update 2: raised ConnectionError: the checker does not answer for the answer" in told
    assert "to rows.jsonl:" in told
    assert "reward.fn=of_rows:fails" in told
    (ours / "down").unlink()
    cut = Path(said([*words, "run.name=cut"], 0))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "value/value_head.safetensors"):
        assert (cut / "artifact" / name).read_bytes() == (whole / "artifact" / name).read_bytes()


@pytest.mark.parametrize("suite", [False, True])
def test_a_judge_of_rows(line: list[str], said: Said, ours: Path, ready: Ready, rows: Path, suite: bool) -> None:
    """As the judge of an artifact's held-out prompts, and of a task of a suite whose rows have no check."""
    words = [
        "stage=eval",
        f"run.root={ready.root}",
        "rollout.max_new_tokens=12",
        "reward=fn",
        "reward.fn=of_rows:letters",
    ]
    if suite:
        task = ours / "task.jsonl"
        task.write_text("".join(json.dumps({**row, "check": None}) + "\n" for row in CHECKED))
        words += ["stage.systems={new: sft:s, old: base}", f"eval.tasks=[{{name: letters, path: {task}}}]"]
    else:
        words += ["artifact=sft:s", "data=jsonl", f"data.path={rows}", "data.held_out=0.5"]
    folder = Path(said(words, 0))
    letter: dict[str, Any] = {row["prompt"]: row["letter"] for row in CHECKED}
    name = "answers.jsonl" if suite else "samples.jsonl"
    found = read_rows(folder / "artifact" / name)
    assert found
    for row in found:
        assert_scored(row, letter, suite)


def assert_scored(row: dict[str, Any], letter: dict[str, str], suite: bool) -> None:
    if suite:
        asked = row["prompt"][-1]["content"]
        pairs = [(asked, said["text"], said["score"]) for said in row["answers"].values()]
    else:
        asked = row["prompt"][-1]["content"]
        pairs = [(asked, row["ref"], row["score_ref"]), (asked, row["policy"], row["score_policy"])]
    for asked, answer, score in pairs:
        assert score == answer.count(letter[asked])
