"""`python -m align -` runs several command lines with the results of separate commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from processes import Child, Forks, wait_for_checkpoint

from align.__main__ import main
from align.cli import batch as batch_module
from align.run import json_digest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = "artifact/receipt.json"


@pytest.fixture
def sft(tiny_model: Path, chats: Path) -> str:
    """A line that works, in a second or two."""
    arguments = [
        *("stage=sft", "model=hub", f"model.path={tiny_model}", "data=jsonl", f"data.path={chats}", "run.name=x"),
        *("stage.max_steps=2", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2", "data.max_length=128"),
    ]
    return shlex.join(arguments)


def start_batch(forks: Forks, cwd: Path, *lines: str, before: str = "") -> Child:
    """Start the command with these lines on its standard input."""
    return forks.start(cwd, "-", stdin="\n".join(lines) + "\n", before=before)


def digest_outputs(folder: Path) -> dict[str, str]:
    """Return the digests of a run's artifacts. Model cards, which name their folder, and the manifests of a receipt,
    which have times, are left out."""
    digests = read_manifest(folder).outputs
    artifact_digests = {
        name: digest for name, digest in digests.items() if name.startswith("artifact/") and "README" not in name
    }
    if RECEIPT in artifact_digests:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        artifact_digests[RECEIPT] = json_digest({key: value for key, value in receipt.items() if key != "manifests"})
    return artifact_digests


def test_lines_leave_what_they_leave_by_themselves(
    tmp_path: Path, sft: str, forks: Forks, monkeypatch: pytest.MonkeyPatch
):
    batch_root = tmp_path / "together (été)"
    single_root = tmp_path / "alone"
    second = "stage=export artifact=sft:x run.name=y"
    roots = [shlex.quote(f"run.root={batch_root}")]
    lines = (f"{sft} {roots[0]}", "", "# what comes out", f"{roots[0]} {second}")
    status, out, err = start_batch(forks, tmp_path, *lines).wait()
    assert status == 0, err
    assert out.index("[1 of 2] stage=sft") < out.index("[2 of 2]") < out.index(str(batch_root / "export" / "y"))
    monkeypatch.chdir(tmp_path)
    for line in (sft, second):
        assert main([*shlex.split(line), f"run.root={single_root}"]) == 0
    for run in ("sft/x", "export/y"):
        assert digest_outputs(batch_root / run) == digest_outputs(single_root / run) != {}


def test_lines_where_forking_is_not_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Each line runs in a fresh interpreter. This stage needs no torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(batch_module, "try_import_for_forks", lambda stages: False)
    (tmp_path / "items.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"]}\n')
    importing = "stage=annotate stage.action=import run.name=x stage.path="
    lines = [f"{importing}items.jsonl", f"{importing}nowhere", f"{importing}items.jsonl run.name=y"]

    def run_here(words: object, opened: object) -> int:
        raise AssertionError("it runs in this process")

    assert batch_module.run_batch(lines, lambda words: ["annotate"], run_here) == 2
    assert read_manifest(tmp_path / "runs/annotate/x").status == "done"
    assert not (tmp_path / "runs/annotate/y").exists()
    assert "stage.path=nowhere" in capfd.readouterr().err


def test_a_cuda_build_is_not_forked(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)  # whichever build is here
    assert batch_module.try_import_for_forks(["export"])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert not batch_module.try_import_for_forks(["export"])


def test_the_first_failure_ends_it(tmp_path: Path, sft: str, forks: Forks):
    status, _, err = start_batch(forks, tmp_path, "stage=export artifact=sft:nobody", sft).wait()
    assert status == 2
    assert "sft:nobody" in err
    assert not (tmp_path / "runs" / "sft").exists()


@pytest.mark.parametrize(
    ("wrong", "said"), [("stage=sftt", "stage=sft?"), ("stage=sft 'data.path=a", "quotation"), ("seed=1", "stage=")]
)
def test_a_wrong_line_is_found_before_any_runs(
    tmp_path: Path, sft: str, wrong: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    import io

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{sft}\n\n{wrong}\n"))
    assert main(["-"]) == 2
    err = capfd.readouterr().err
    assert "line 3" in err
    assert said in err
    assert not (tmp_path / "runs").exists()


def test_no_line_at_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("# nothing\n"))
    assert main(["-"]) == 2
    assert "standard input=(empty)" in capfd.readouterr().err


AFRESH = "import align.cli.batch; align.cli.batch.try_import_for_forks = lambda commands: False"


@pytest.mark.parametrize("how", ["a terminal's Ctrl-C", "SIGTERM, afresh", "the stage alone, killed"])
def test_signals_reach_the_stage(tmp_path: Path, sft: str, forks: Forks, how: str):
    lines = (f"{sft} stage.max_steps=500 stage.save_every=5", "stage=export artifact=sft:x")
    child = start_batch(forks, tmp_path, *lines, before=AFRESH if "afresh" in how else "")
    wait_for_checkpoint(child, tmp_path)
    killed = how.endswith("killed")
    if how.startswith("SIGTERM"):
        child.send_signal(signal.SIGTERM)
    elif killed:
        (stage,) = map(int, Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split())
        os.kill(stage, signal.SIGKILL)
    else:
        os.killpg(child.pid, signal.SIGINT)
    status, _, err = child.wait()
    assert status == (137 if killed else 130), err
    assert read_manifest(tmp_path / "runs/sft/x").status == ("running" if killed else "interrupted")
    assert "Traceback" not in err
    assert not (tmp_path / "runs" / "export").exists()
