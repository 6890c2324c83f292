"""PPO and evaluations by what the rows of their prompts hold: checks, functions, and a function that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready

from align.__main__ import main
from align.data import generated_tasks
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
    ppo_words = [word for word in ready.ppo if not word.startswith(("reward.", "data.path="))]
    return [*ppo_words, f"data.path={rows}", f"run.root={ready.root}", "stage.normalise=off", "stage.save_every=1"]


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
        exit_status = main(words)
        out, err = capfd.readouterr()
        assert exit_status == status, out + err
        assert "Traceback" not in err
        return err if status else out.splitlines()[-1]

    return run


def test_checks_of_rows_as_the_reward(line: list[str], said: Said) -> None:
    folder = Path(said([*line, "reward=check", "stage.eval_every=1", "stage.eval_prompts=3", "stage.shown=3"], 0))
    updates = [row for row in read_rows(folder / "metrics.jsonl") if "raw_score" in row]
    assert len(updates) == 2
    assert all(row["check_errors"] == 0 and 0 <= row["raw_score"] <= 1 for row in updates)
    samples = read_rows(folder / "samples.jsonl")
    assert samples
    assert all(row["score"] == any(vowel in row["answer"] for vowel in "aeiou") for row in samples)
    assert not any("letter" in row for row in samples)  # samples leave out the rows' other fields


def test_a_function_that_fails_loses_nothing(line: list[str], said: Said, ours: Path) -> None:
    """The run ends with status 2 and names the place.

    The same command resumes from the checkpoint, and makes the files of an undisturbed run.
    """
    words = [*line, "reward=fn", "reward.fn=of_rows:fails", "stage.updates=3"]
    uninterrupted = Path(said([*words, "run.name=whole"], 0))
    __import__("of_rows").calls.clear()
    (ours / "down").touch()
    message = said([*words, "run.name=cut"], 2)
    assert "update 2: raised ConnectionError: the checker does not answer for the answer" in message
    assert "to rows.jsonl:" in message
    assert "reward.fn=of_rows:fails" in message
    (ours / "down").unlink()
    resumed = Path(said([*words, "run.name=cut"], 0))
    assert (resumed / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "value/value_head.safetensors"):
        assert (resumed / "artifact" / name).read_bytes() == (uninterrupted / "artifact" / name).read_bytes()


@pytest.mark.parametrize("suite", [False, True])
def test_a_judge_of_rows(line: list[str], said: Said, ours: Path, ready: Ready, rows: Path, suite: bool) -> None:
    """The function judges an artifact's held-out prompts, or a suite's task whose rows have no check."""
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
    answer_rows = read_rows(folder / "artifact" / name)
    assert answer_rows
    for row in answer_rows:
        assert_scored(row, letter, suite)


def assert_scored(row: dict[str, Any], letter: dict[str, str], suite: bool) -> None:
    if suite:
        prompt = row["prompt"][-1]["content"]
        pairs = [(prompt, completion["text"], completion["score"]) for completion in row["answers"].values()]
    else:
        prompt = row["prompt"][-1]["content"]
        pairs = [(prompt, row["ref"], row["score_ref"]), (prompt, row["policy"], row["score_policy"])]
    for prompt, answer, score in pairs:
        assert score == answer.count(letter[prompt])


def test_generated_tasks_are_trained_on_and_traced(
    ready: Ready, said: Said, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'align-rlhf[reasoning]'")
    words = [word for word in ready.ppo if not word.startswith(("reward.", "data"))]
    words += ["data=reasoning_gym", "data.tasks=[{name: gcd, size: 40}]", "reward=check", "stage.normalise=off"]
    folder = Path(said([*words, f"run.root={ready.root}", "run.name=generated"], 0))
    updates = [row for row in read_rows(folder / "metrics.jsonl") if "raw_score" in row]
    assert updates
    assert all(row["check_errors"] == 0 for row in updates)

    def trace_data() -> str:
        words = ["stage=registry", "stage.action=trace", "artifact=ppo:generated", "stage.verify=full"]
        assert main([*words, f"run.root={ready.root}"]) == 0
        return next(line for line in capfd.readouterr().out.splitlines() if "generated reasoning_gym:gcd" in line)

    assert "hashed now: as it was read" in trace_data()
    generate_entries = generated_tasks.iter_entries
    monkeypatch.setattr(generated_tasks, "iter_entries", lambda tasks: [*generate_entries(tasks)][1:])
    assert "differs from what was read" in trace_data()
