"""The command line for new users: bad input beside the same command with a good value, signals, full disks.

Tests that need no process of their own run through `main` in this one: importing torch takes longer than these runs.
"""

from __future__ import annotations

import colorsys
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import FinishedCommand, Forks, wait_for_checkpoint

from align.__main__ import STAGES, main, order_import_path

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = {
    "artifact",
    "config.yaml",
    "log.txt",
    "manifest.json",
    "metrics.json",
    "metrics.jsonl",
    "report.html",
    "steps.jsonl",
    "timing.jsonl",
    "trained_ids.parquet",
    "trained_on.jsonl",
}


def build_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_process(cwd: Path, *arguments: str) -> FinishedCommand:
    """Run `python -m align` in a fresh interpreter."""
    command = [sys.executable, "-m", "align", *arguments]
    completed = subprocess.run(command, cwd=cwd, env=build_env(), capture_output=True, text=True, timeout=300)
    return FinishedCommand(completed.returncode, completed.stdout, completed.stderr)


Align = Callable[..., FinishedCommand]


@pytest.fixture
def align(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Align:
    """A function that runs one command line in this process, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> FinishedCommand:
        capfd.readouterr()
        status = main(arguments)
        return FinishedCommand(status, *capfd.readouterr())

    return run


@pytest.fixture
def sft(tiny_model: Path, chats: Path) -> list[str]:
    """A command that works, in a second or two; later arguments override."""
    return [
        *("stage=sft", "model=hub", f"model.path={tiny_model}", "data=jsonl", f"data.path={chats}", "run.name=x"),
        *("stage.max_steps=2", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2", "data.max_length=128"),
    ]


def check_refused(result: FinishedCommand, *parts: str) -> None:
    """Check that a command exits with status 2 and one message that has every part, without a traceback."""
    assert result.status == 2, result
    (message,) = [line for line in result.err.splitlines() if line.startswith("align: ")]
    assert "Traceback" not in result.err
    assert not [part for part in parts if part not in message], message


def check_done(result: FinishedCommand) -> Path:
    """Check that a command exits with status 0 and prints a run's folder with exactly the promised files."""
    assert result.status == 0, result
    folder = Path(result.folder)
    assert {p.name for p in folder.iterdir()} == RUN_FILES
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    return folder


# --- Without a run


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("stage=sft", "--cfg", "job"), ("--version",)])
def test_listing_help_and_configuration_are_quick_and_without_torch(tmp_path: Path, arguments: tuple[str, ...]):
    code = (
        "import sys, runpy\nsys.argv = ['align', *sys.argv[1:]]\n"
        "try: runpy.run_module('align', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=build_env(), capture_output=True, text=True
    )
    # Processor time, because the machine may be busy.
    seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    assert process.returncode == 0, process.stderr
    assert seconds < 1
    assert list(tmp_path.iterdir()) == []
    if not arguments:
        assert all(any(line.split()[:1] == [stage] for line in process.stdout.splitlines()) for stage in STAGES)
    if "--cfg" in arguments:
        assert "lr: ${method.lr}" in process.stdout


def test_a_wrong_command_line_as_a_process(tmp_path: Path):
    check_refused(run_process(tmp_path, "stage=sft", "foo=1"), "foo=1", "is not a key")
    assert run_process(tmp_path, "stage=sft", "seed=1", "--cfg", "job").status == 0
    assert list(tmp_path.iterdir()) == []


# --- Inputs of a run


def test_rows_that_are_left_out_are_counted(align: Align, sft: list[str], tmp_path: Path, chats: Path):
    path = tmp_path / "rows.jsonl"
    long = {"prompt": "word " * 200, "completion": "ok"}
    path.write_text(chats.read_text() + json.dumps(long) + '\n{"wrong": 1}\n')
    check_refused(align(*sft, f"data.path={path}"), "no row of a supported shape", "data.on_bad_row=skip")
    assert not Path("runs/sft/x").exists()  # a run that never began leaves no folder
    result = align(*sft, f"data.path={path}", "data.on_bad_row=skip")
    assert "left out 1 row of" in result.out
    assert "dropped 1 longer than 128 tokens" in result.out
    folder = check_done(result)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert (metrics["skipped_rows"], metrics["dropped_too_long"]) == (1, 1)
    assert "left out 1 row that could not be kept" in (folder / "report.html").read_text()


def test_what_is_left_out_of_either_side_is_counted(align: Align, sft: list[str], tmp_path: Path, chats: Path):
    long = {"prompt": "word " * 200, "completion": "ok"}
    unanswered = {"messages": [{"role": "user", "content": "Hm?"}]}
    rows = chats.read_text().splitlines()
    eval_path = tmp_path / "measured.jsonl"
    eval_path.write_text("\n".join([*rows[:3], json.dumps(long), json.dumps(unanswered)]))
    result = align(*sft, f"data.path={chats}", f"data.eval_path={eval_path}", "stage.eval_size=9")
    assert "3 of 5 held out, 1 longer than 128 tokens, 1 without an assistant turn\n" in result.out
    metrics = json.loads((check_done(result) / "manifest.json").read_text())["metrics"]
    counts = ("train_rows", "dropped_in_eval", "held_out_rows", "held_out_too_long", "held_out_unanswered")
    assert [metrics[key] for key in counts] == [37, 3, 3, 1, 1]
    assert (
        "37 rows to train on; dropped 3 that data.eval_path asks too"
        in (check_done(result) / "report.html").read_text()
    )


def test_a_missing_artifact_names_the_command_that_makes_it(align: Align):
    for stage, field, maker in (("sample", "init", "sft"), ("ppo", "init", "sft"), ("eval", "artifact", "ppo")):
        check_refused(align(f"stage={stage}"), f"{field}={maker}:latest", f"python -m align stage={maker}")


# --- The run's folder


def test_a_finished_run_is_printed_a_new_one_made_a_conflict_named(align: Align, sft: list[str], tmp_path: Path):
    folder = check_done(align(*sft))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    second = align(*sft)
    assert (second.status, second.folder) == (0, str(folder))
    assert "finished already" in second.out
    check_refused(align(*sft, "stage.lr=0.5"), "stage.lr=0.5", "has 0.0002", "Use another run.name, or resume=never")
    assert check_done(align(*sft, "stage.lr=0.5", "resume=never")).name == "x-2"
    assert align(*sft, "resume=must").status == 0
    check_refused(align(*sft, "run.name=z", "resume=must"), "resume=must", "there is no run to continue")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (folder / "artifact" / "adapter_model.safetensors").unlink()
    check_refused(align(*sft), "adapter_model.safetensors", "is missing", "resume=never")
    assert not (tmp_path / "outputs").exists()


def test_a_fault_of_ours_has_its_traceback_in_the_log(align: Align, sft: list[str], monkeypatch: pytest.MonkeyPatch):
    def raise_fault(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "a file that we forgot to write")

    with monkeypatch.context() as patch:
        patch.setattr("align.evals.held_out.compute_held_out_loss", raise_fault)
        result = align(*sft)
    assert result.status == 1
    assert "Traceback" not in result.err
    assert "runs/sft/x/log.txt" in result.err
    assert "Traceback" in Path("runs/sft/x/log.txt").read_text()
    assert json.loads(Path("runs/sft/x/manifest.json").read_text())["status"] == "failed"
    check_done(align(*sft))


# --- Processes


def test_a_real_limit_on_file_sizes(align: Align, sft: list[str], tmp_path: Path, forks: Forks):
    """The kernel refuses the weights; the libraries that write them report it in different ways."""
    check_refused(forks.run(tmp_path, *sft, file_size=60_000), "run.root=runs", "Free some space")
    check_done(align(*sft, "resume=must"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])  # SIGTERM: `test_batch`
def test_an_interrupted_run_is_continued(
    align: Align, sft: list[str], tmp_path: Path, forks: Forks, how: signal.Signals
):
    steps = ["stage.max_steps=40", "stage.save_every=5", "stage.log_every=1"]
    child = forks.start(tmp_path, *sft, *steps)
    wait_for_checkpoint(child, tmp_path)
    if how is signal.SIGINT:
        check_refused(align(*sft, *steps), "run=runs/sft/x", "another process is working on it")
    child.send_signal(how)
    status, _, err = child.wait()
    manifest = json.loads(Path("runs/sft/x/manifest.json").read_text())
    if how is signal.SIGKILL:
        assert manifest["status"] == "running"
    else:
        assert status == 130
        assert manifest["status"] == "interrupted"
        assert "Traceback" not in err
        assert "run the same command again to continue" in err
        page = Path("runs/sft/x/report.html").read_text()
        assert "Interrupted after step" in page
        assert "Figures so far" in page
        assert "<img" in page
    result = align(*sft, *steps)
    assert "continuing from checkpoint-" in result.out
    rows = [json.loads(line) for line in (check_done(result) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))


def test_a_users_own_reward_module_shadows_nothing(tmp_path: Path):
    """`python -m` puts the working folder first on the path; this stage imports `align.annotate` and `align.reward`."""
    (tmp_path / "reward.py").write_text("raise SystemExit('the wrong reward')\n")
    (tmp_path / "annotate.py").write_text("raise SystemExit('the wrong annotate')\n")
    check_refused(run_process(tmp_path, "stage=annotate", "stage.action=simulate"), "there is no store")


def test_the_working_folder_stays_importable(tmp_path: Path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    code = (
        "import sys; sys.path[0] = sys.argv[1]; import align.__main__ as m; m.order_import_path();"
        "import mine, reward, colorsys; print(reward.__file__, colorsys.__file__)"
    )
    (tmp_path / "reward.py").write_text("")
    (tmp_path / "colorsys.py").write_text("raise SystemExit('a library is shadowed')")
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=build_env(), capture_output=True, text=True
    )
    assert process.stdout.split() == [str(tmp_path / "reward.py"), colorsys.__file__], process.stderr


def test_the_installed_command_finds_modules_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command's own folder is first on the path, and the working folder is not on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/usr/local/bin", *(p for p in sys.path if p not in ("", os.getcwd()))])
    order_import_path()
    assert sys.path[0] == "/usr/local/bin"
    assert os.getcwd() in sys.path[1:]


def test_output_that_nobody_reads(tmp_path: Path):
    process = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m align stage=sft --cfg job | true"],
        cwd=tmp_path,
        env=build_env(),
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")
