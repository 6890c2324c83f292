"""Replays of runs from their manifests, in every stage that trains: the same bits, or the first figure that differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_values import CHATS
from stage_commands import Ready, Workshop

from align.registry.index import INDEX
from align.registry.replay import STREAMS, Difference, find_first_difference
from align.run import read_manifest

SHORT = ["stage.batch_size=8", "stage.log_every=1"]
LINES = {
    "sft": ["stage=sft", *SHORT, "stage.max_steps=3"],
    "full": ["stage=full", *SHORT, "stage.max_steps=3"],
    "reward": ["stage=reward", "init=sft:s", *SHORT, "stage.micro_batch=8", "stage.epochs=1"],
    "dpo": ["stage=dpo", "init=sft:s", *SHORT, "stage.epochs=1"],
    "kto": ["stage=kto", "init=sft:s", *SHORT, "stage.epochs=1"],
    "ppo": ["stage=ppo", "init=sft:s", "reward.ref=reward:a", "stage.updates=3"],
}
VOTES = ["data.allow_simulated=true", "stage.held_out=0.3"]


@pytest.fixture(scope="module")
def home(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy real runs into a folder."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ready.root, home / "runs")
    (home / "runs" / INDEX).unlink(missing_ok=True)
    return home


def run_training_stage(home: Path, stage: str, name: str, model: Path, data: list[str], *more: str) -> Path:
    """Run a stage on chats, or on the votes of the store."""
    shop = Workshop(home / "runs", home)
    votes = stage in ("reward", "dpo", "kto")
    data_words = [*VOTES, *CHATS[1:3]] if votes else data
    base = ["model=hub", f"model.path={model}"] if stage in ("sft", "full") else []
    ppo = ["stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16", "rollout.max_new_tokens=8"]
    line = [*LINES[stage], *base, *data_words, *(ppo if stage == "ppo" else []), *more]
    assert shop.run_command(*line, "device=cpu", f"run.root={home / 'runs'}", f"run.name={name}") == 0, shop.output
    return home / "runs" / stage / name


def run_replay(home: Path, run: str, *words: str, status: int = 0) -> str:
    shop = Workshop(home / "runs", home)
    line = ["stage=registry", "stage.action=replay", f"stage.run={run}", f"run.root={home / 'runs'}"]
    assert shop.run_command(*line, *words) == status, shop.output
    return shop.output


def replay_as_json(home: Path, run: str, *words: str, status: int = 0) -> dict[str, Any]:
    return json.loads(run_replay(home, run, "stage.format=json", *words, status=status))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*LINES])
def test_every_stage_that_trains_gives_the_same_bits(home: Path, ready: Ready, tiny_model: Path, stage: str) -> None:
    folder = run_training_stage(home, stage, "again", tiny_model, ready.data)
    before = {path: path.read_bytes() for path in (home / "runs").rglob("*") if path.is_file() and path.name != INDEX}
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    answer = replay_as_json(home, f"{stage}:again")
    assert answer["same"], answer
    assert (answer["rows"], answer["unlike"]) == (len(rows), {})
    assert answer["figures"] == sum(len(json.loads(row)) - 1 for row in rows) > 0
    after = {path: path.read_bytes() for path in (home / "runs").rglob("*") if path.is_file() and path.name != INDEX}
    assert after == before


@pytest.mark.slow
def test_the_first_figure_that_differs_is_named(home: Path, ready: Ready, tiny_model: Path) -> None:
    """One bit of the second step's loss differs. The inputs are compared, but not where the run lies."""
    folder = run_training_stage(home, "sft", "altered", tiny_model, ready.data, "stage.lr=0.003")
    stream = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in stream.read_text().splitlines()]
    real = rows[1]["loss"]
    rows[1]["loss"] = float.fromhex(f"{real.hex().partition('p')[0][:-1]}0p{real.hex().partition('p')[2]}") + 1e-9
    stream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stdout = run_replay(home, "sft:altered", status=3)
    assert "1 row with 4 figures the same to the bit" in stdout
    assert f"sft:altered: step 2, loss: {rows[1]['loss']!r} then, {real!r} now" in stdout
    assert "Code, packages, hardware, threads and inputs are the same." in stdout


def test_a_step_that_was_not_logged_is_compared(home: Path, ready: Ready, tiny_model: Path) -> None:
    """Two of six steps were logged. The fourth step differs, and so does the processor's capability."""
    folder = run_training_stage(
        home, "sft", "unlogged", tiny_model, ready.data, "stage.log_every=10", "stage.max_steps=6"
    )
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    answer = replay_as_json(home, "sft:unlogged")
    assert (answer["same"], answer["rows"], answer["steps"]) == (True, 6, 6)
    stream = folder / "steps.jsonl"
    rows = [json.loads(line) for line in stream.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    rows[3]["loss"] += 1e-6
    stream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((folder / "manifest.json").read_text())
    hardware = manifest["hardware"]
    changed = {key: f"not {hardware[key]}" for key in ("cpu_capability", "onednn_max_cpu_isa", "instructions")}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"hardware": hardware | changed}))
    answer = replay_as_json(home, "sft:unlogged", status=3)
    assert (answer["first_difference"]["step"], answer["first_difference"]["figure"]) == (4, "loss")
    assert answer["unlike"]["hardware"] == {key: [value, hardware[key]] for key, value in changed.items()}


def test_what_cannot_be_made_again(home: Path, ready: Ready, tmp_path: Path) -> None:
    assert "which logs no steps" in run_replay(home, next((home / "runs" / "sample").iterdir()).as_posix(), status=2)
    copy = tmp_path / "copy"
    shutil.copytree(home / "runs", copy / "runs")
    shutil.rmtree(copy / "runs" / "sft")
    assert "stage.run=sft:s: which it read as init, is gone" in run_replay(copy, "reward:a", status=2)
    streams = [copy / "runs/reward/a" / stream for stream in STREAMS]
    assert all(json.loads(path.read_text().splitlines()[0])["step"] == 1 for path in streams)
    for path in streams:
        path.write_text('{"step": 2, "loss": 1.0}\n')
    assert "logged no step up to 1" in run_replay(copy, "reward:a", "stage.steps=1", status=2)
    for path in streams:
        path.unlink()
    assert "logged no step" in run_replay(copy, "reward:a", status=2)
    assert read_manifest(copy / "runs" / "reward" / "a").done


def test_differences_between_rows() -> None:
    rows = [{"step": 1, "loss": 2.0, "kl": None}, {"step": 2, "loss": 1.0}]
    assert find_first_difference(rows, rows) is None
    assert find_first_difference(rows, rows[:1], allow_missing_rows=True) is None
    assert find_first_difference(rows, rows[:1]) == Difference(2, "step", 2, None)
    assert find_first_difference(rows, [{**rows[0], "kl": 0.0}]) == Difference(1, "kl", None, 0.0)
    assert find_first_difference(rows, [{"step": 1, "loss": 2.0}]) == Difference(1, "kl", None, None)
    assert find_first_difference(rows, [{**rows[0], "new": 1}]) == Difference(1, "new", None, 1)
    assert find_first_difference(rows, [rows[0], {"step": 3, "loss": 1.0}]) == Difference(2, "step", 2, 3)


@pytest.mark.slow
def test_what_is_different_about_it(home: Path, ready: Ready, tiny_model: Path, chats: Path) -> None:
    """The file of data, the code and the packages changed after the run."""
    data_path = home / "own.jsonl"
    shutil.copy(chats, data_path)
    data = [f"data.path={data_path}" if word.startswith("data.path=") else word for word in ready.data]
    folder = run_training_stage(home, "sft", "other", tiny_model, data)
    rows = data_path.read_text().splitlines()
    data_path.write_text("\n".join([*rows[1:], rows[0].replace("garden", "meadow"), rows[0]]) + "\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"code": "c" * 64, "packages": {**manifest["packages"], "torch": "2.0.0"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = replay_as_json(home, "sft:other", "stage.steps=1", status=3)
    assert not answer["same"]
    assert answer["unlike"]["packages"]["torch"][0] == "2.0.0"
    assert answer["unlike"]["code"]["code"][0] == "c" * 64
    assert [source.rpartition(" (")[0] for source in answer["unlike"]["made from"]["data"]] == [str(data_path)] * 2
    data_path.unlink()
    assert "cannot be made again: data.path=" in run_replay(home, "sft:other", status=2)
