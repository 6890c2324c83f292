"""PPO that was killed goes on to the bit: the same adapter, critic, optimiser state and metrics as if nothing had been.

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
from workshop import Ready

from align.__main__ import main
from align.run import Run, file_digest, read_manifest
from align.run.checkpoints import SEAL
from align.track import read_rows

UPDATES, KILLS = 9, 6
PPO = [
    *(f"stage.updates={UPDATES}", "stage.save_every=2", "stage.eval_every=2", "stage.eval_prompts=4", "stage.shown=2"),
    *("stage.kl_control=adaptive", "stage.kl_target=0.01", "stage.kl_horizon=50", "stage.normalise=running"),
    *("stage.schedule=cosine", "stage.lr=5e-3", "run.name=x"),
]


def in_a_fork(work: Callable[[], Any]) -> multiprocessing.Process:
    def exits() -> NoReturn:
        sys.exit(work())

    child = multiprocessing.get_context("fork").Process(target=exits)
    child.start()
    return child  # pyright: ignore[reportReturnType]


def copied(ready: Ready, folder: Path) -> tuple[Path, list[str]]:
    """The same runs elsewhere, and the command there."""
    root = folder / "runs"
    shutil.copytree(ready.root, root, ignore=shutil.ignore_patterns("ppo"))
    return root, [*ready.ppo, *PPO, f"run.root={root}"]


def traced(arguments: list[str]) -> Callable[[], int]:
    """The command, its checkpoints kept for a look when it is done."""

    def work() -> int:
        publish = Run.publish

        def keeping(run: Run, *arguments: Any) -> None:
            shutil.copytree(run.folder / "checkpoints", run.folder.parent / "kept", dirs_exist_ok=True)
            publish(run, *arguments)

        Run.publish = keeping
        return main(arguments)

    return work


def state(root: Path) -> dict[str, str]:
    """Digests of all that must be the same: adapter, critic, metrics, and the last checkpoint's optimiser state."""
    run = root / "ppo" / "x"
    assert read_manifest(run).status == "done"
    kept = root / "ppo" / "kept"
    files = [*run.glob("artifact/*.safetensors"), *run.glob("artifact/value/*.safetensors"), run / "metrics.jsonl"]
    files += [run / "samples.jsonl", kept / "checkpoint-8" / "state.safetensors", kept / "checkpoint-8" / "state.json"]
    assert len(files) == 7
    return {str(p.relative_to(root)): file_digest(p) for p in files}


@pytest.fixture(scope="module")
def uninterrupted(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root, arguments = copied(ready, tmp_path_factory.mktemp("whole"))
    child = in_a_fork(traced(arguments))
    child.join()
    assert child.exitcode == 0
    assert sorted(p.name for p in (root / "ppo/kept").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert [row["step"] for row in read_rows(root / "ppo/x/metrics.jsonl")] == [*range(UPDATES + 1)]  # 0 is the start
    return state(root)


def killed_while_writing(arguments: list[str], name: str, nth: int) -> Callable[[], int]:
    """The command; it dies when the `nth` file of that name has been half written."""

    def work() -> int:
        import align.ppo.checkpoint as checkpoint
        import align.run.checkpoints as checkpoints

        count = 0

        def half(write: Callable[..., None]) -> Callable[..., None]:
            def torn(*arguments: Any) -> None:
                nonlocal count
                write(*arguments)
                path = next(a for a in arguments if isinstance(a, Path))
                if path.name == name:
                    count += 1
                    if count == nth:
                        os.truncate(path, path.stat().st_size // 2)
                        os.kill(os.getpid(), signal.SIGKILL)

            return torn

        checkpoint.save_file, checkpoint.write_json = half(checkpoint.save_file), half(checkpoint.write_json)
        checkpoints.write_json = half(checkpoints.write_json)
        return main(arguments)

    return work


@pytest.mark.parametrize(("name", "nth"), [("state.safetensors", 1), (SEAL, 3)])
def test_killed_inside_a_checkpoint(ready: Ready, uninterrupted: dict[str, str], tmp_path: Path, name: str, nth: int):
    root, arguments = copied(ready, tmp_path)
    child = in_a_fork(killed_while_writing(arguments, name, nth))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list((root / "ppo/x/checkpoints").glob("checkpoint-*"))) == min(nth - 1, 2)
    child = in_a_fork(traced(arguments))
    child.join()
    assert child.exitcode == 0
    assert state(root) == uninterrupted


@pytest.mark.slow
def test_killed_at_random_moments(
    ready: Ready, uninterrupted: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Each kill falls one or two updates beyond where the run had ever been, and a random moment into what follows. A
    run that has come to its end begins again."""
    root, arguments = copied(ready, tmp_path)
    run, rng, kills, continued, began = root / "ppo/x", random.Random(0), 0, 0, time.monotonic()
    finished = False
    while kills < KILLS or not finished:
        newest = max((p.name for p in run.glob("checkpoints/checkpoint-*")), default="")  # whole, as it has its name
        further = len(read_rows(run / "metrics.jsonl")) + rng.randint(1, 2)
        child = in_a_fork(traced(arguments))
        while child.is_alive() and (kills == KILLS or len(read_rows(run / "metrics.jsonl")) < further):
            assert time.monotonic() - began < 300
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("continuing from")]
        assert said == ([f"continuing from {newest}"] if newest else [])
        kills, continued = kills + (child.exitcode != 0), continued + bool(newest)
        if finished := read_manifest(run).status == "done":
            assert state(root) == uninterrupted
            shutil.rmtree(root / "ppo")
    assert continued >= KILLS / 2


@pytest.mark.parametrize("damage", ["a bit", "a missing file"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    ready: Ready,
    uninterrupted: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: str,
):
    root, arguments = copied(ready, tmp_path)
    child = in_a_fork(killed_while_writing(arguments, "state.json", 3))  # after two whole ones
    child.join()
    newest = root / "ppo/x/checkpoints/checkpoint-4"
    if damage == "a bit":
        content = bytearray((newest / "state.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    else:
        (newest / "state.json").unlink()
    capfd.readouterr()
    child = in_a_fork(traced(arguments))
    child.join()
    assert child.exitcode == 0
    said = capfd.readouterr().out
    assert "checkpoint-4 is torn or altered" in said
    assert "continuing from checkpoint-2" in said
    assert state(root) == uninterrupted
