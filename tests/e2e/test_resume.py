"""PPO that was killed resumes to the bit: the same adapter, critic, optimiser state and metrics as without a kill.

Kills are real: SIGKILL to a process of its own, at a random moment or in the middle of writing a checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from stage_commands import Ready

from align.__main__ import main
from align.run import Run, file_digest, read_manifest
from align.run.checkpoints import SEAL
from align.track import read_rows

UPDATES = 9
KILLS = 6
PPO = [
    *(f"stage.updates={UPDATES}", "stage.save_every=2", "stage.eval_every=2", "stage.eval_prompts=4", "stage.shown=2"),
    *("stage.kl_control=adaptive", "stage.kl_target=0.01", "stage.kl_horizon=50", "stage.normalise=running"),
    *("stage.schedule=cosine", "stage.lr=5e-3", "run.name=x"),
]


def start_fork(work: Callable[[], Any]) -> multiprocessing.Process:
    def exit_with_status() -> NoReturn:
        sys.exit(work())

    child = multiprocessing.get_context("fork").Process(target=exit_with_status)
    child.start()
    return child  # pyright: ignore[reportReturnType]


def copy_runs(ready: Ready, folder: Path) -> tuple[Path, list[str]]:
    """Copy the runs to another folder. Returns their root, and the command of a PPO run there."""
    root = folder / "runs"
    shutil.copytree(ready.root, root, ignore=shutil.ignore_patterns("ppo"))
    return root, [*ready.ppo, *PPO, f"run.root={root}"]


def keep_checkpoints(arguments: list[str]) -> Callable[[], int]:
    """Return a function that runs the command and keeps a copy of the run's checkpoints."""

    def work() -> int:
        publish = Run.publish

        def copy_and_publish(run: Run, *arguments: Any) -> None:
            shutil.copytree(run.folder / "checkpoints", run.folder.parent / "kept", dirs_exist_ok=True)
            publish(run, *arguments)

        Run.publish = copy_and_publish
        return main(arguments)

    return work


def compute_digests(root: Path) -> dict[str, str]:
    """Return the digests of the adapter, critic, metrics and samples, and of the last checkpoint's optimiser state."""
    run = root / "ppo" / "x"
    assert read_manifest(run).status == "done"
    checkpoints = root / "ppo" / "kept"
    files = [*run.glob("artifact/*.safetensors"), *run.glob("artifact/value/*.safetensors"), run / "metrics.jsonl"]
    files += [
        run / "samples.jsonl",
        checkpoints / "checkpoint-8" / "state.safetensors",
        checkpoints / "checkpoint-8" / "state.json",
    ]
    assert len(files) == 7
    return {str(p.relative_to(root)): file_digest(p) for p in files}


@pytest.fixture(scope="module")
def uninterrupted(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root, arguments = copy_runs(ready, tmp_path_factory.mktemp("whole"))
    child = start_fork(keep_checkpoints(arguments))
    child.join()
    assert child.exitcode == 0
    assert sorted(p.name for p in (root / "ppo/kept").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert [row["step"] for row in read_rows(root / "ppo/x/metrics.jsonl")] == [*range(UPDATES + 1)]  # 0 is the start
    return compute_digests(root)


def die_while_writing(arguments: list[str], name: str, nth: int) -> Callable[[], int]:
    """Return a function that runs the command and dies when the `nth` file of that name is half written."""

    def work() -> int:
        import align.ppo.checkpoint as checkpoint
        import align.run.checkpoints as checkpoints

        count = 0

        def die_at_nth_write(write: Callable[..., None]) -> Callable[..., None]:
            def write_or_die(*arguments: Any) -> None:
                nonlocal count
                write(*arguments)
                path = next(a for a in arguments if isinstance(a, Path))
                if path.name == name:
                    count += 1
                    if count == nth:
                        os.truncate(path, path.stat().st_size // 2)
                        os.kill(os.getpid(), signal.SIGKILL)

            return write_or_die

        checkpoint.save_file = die_at_nth_write(checkpoint.save_file)
        checkpoint.write_json = die_at_nth_write(checkpoint.write_json)
        checkpoints.write_json = die_at_nth_write(checkpoints.write_json)
        return main(arguments)

    return work


@pytest.mark.parametrize(("name", "nth"), [("state.safetensors", 1), (SEAL, 3)])
def test_killed_inside_a_checkpoint(ready: Ready, uninterrupted: dict[str, str], tmp_path: Path, name: str, nth: int):
    root, arguments = copy_runs(ready, tmp_path)
    child = start_fork(die_while_writing(arguments, name, nth))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list((root / "ppo/x/checkpoints").glob("checkpoint-*"))) == min(nth - 1, 2)
    child = start_fork(keep_checkpoints(arguments))
    child.join()
    assert child.exitcode == 0
    assert compute_digests(root) == uninterrupted


@pytest.mark.slow
def test_killed_at_random_moments(
    ready: Ready, uninterrupted: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Each kill falls one or two updates after the last logged one, plus a random time. A finished run begins again."""
    root, arguments = copy_runs(ready, tmp_path)
    run = root / "ppo/x"
    rng = random.Random(0)
    kills = 0
    resumed = 0
    began = time.monotonic()
    finished = False
    while kills < KILLS or not finished:
        newest = max((p.name for p in run.glob("checkpoints/checkpoint-*")), default="")  # complete, as it has its name
        further = len(read_rows(run / "metrics.jsonl")) + rng.randint(1, 2)
        child = start_fork(keep_checkpoints(arguments))
        while child.is_alive() and (kills == KILLS or len(read_rows(run / "metrics.jsonl")) < further):
            assert time.monotonic() - began < 300
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        messages = [line for line in capfd.readouterr().out.splitlines() if line.startswith("continuing from")]
        assert messages == ([f"continuing from {newest}"] if newest else [])
        kills = kills + (child.exitcode != 0)
        resumed = resumed + bool(newest)
        if finished := read_manifest(run).status == "done":
            assert compute_digests(root) == uninterrupted
            shutil.rmtree(root / "ppo")
    assert resumed >= KILLS / 2


@pytest.mark.parametrize("damage", ["a bit", "a missing file"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    ready: Ready,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: str,
):
    root, arguments = copy_runs(ready, tmp_path)
    child = start_fork(die_while_writing(arguments, "state.json", 3))  # after two complete checkpoints
    child.join()
    newest = root / "ppo/x/checkpoints/checkpoint-4"
    if damage == "a bit":
        content = bytearray((newest / "state.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    else:
        (newest / "state.json").unlink()
    capfd.readouterr()
    child = start_fork(keep_checkpoints(arguments))
    child.join()
    assert child.exitcode == 0
    stdout = capfd.readouterr().out
    assert "checkpoint-4 cannot be resumed from and is removed" in stdout
    assert "continuing from checkpoint-2" in stdout
    assert compute_digests(root) == uninterrupted
