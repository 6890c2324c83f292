"""The jobs of a sweep (`-m`): run one after another, with a table at the end; interrupted and resumed."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from processes import Forks
from waiting import becomes_true

from align.__main__ import main
from align.run import read_manifest

ROOT = Path(__file__).resolve().parents[2]
Align = Callable[..., tuple[int, str, str]]


@pytest.fixture
def align(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Align:
    """Return a function that runs a command line in this process, and returns its status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(words)
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def sft(tiny_model: Path, chats: Path) -> list[str]:
    """A command that succeeds in a second or two."""
    return [
        *(
            "stage=sft",
            "model=hub",
            f"model.path={tiny_model}",
            "data=jsonl",
            f"data.path={chats}",
            "data.max_length=128",
        ),
        *("stage.max_steps=2", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2"),
    ]


def parse_table(out: str) -> list[list[str]]:
    """Parse the table at the end into cells."""
    out = out.partition("\ncurves and figures side by side: ")[0].rstrip()
    lines = out[out.rindex("\n\n") :].strip().splitlines()
    header = next(i for i, line in enumerate(lines) if "status" in line and line.endswith("folder"))
    return [line.split() for line in lines[header:]]


def test_a_sweep_runs_every_job_and_ends_with_a_table(align: Align, sft: list[str], tmp_path: Path):
    (tmp_path / "broken.jsonl").write_text('{"wrong": 1}\n')
    good = next(w for w in sft if w.startswith("data.path=")).partition("=")[2]
    words = [w for w in sft if not w.startswith("data.path=")]
    sweep = ["-m", *words, "seed=0,1", f"data.path='{tmp_path}/broken.jsonl','{good}'"]
    status, out, err = align(*sweep)
    assert status == 2
    assert err.count("row 1") == 2
    assert [f"[{n} of 4]" in out for n in range(1, 5)] == [True] * 4
    header, *jobs = parse_table(out)
    assert header[:3] == ["seed", "data.path", "status"]
    assert "loss_after" in header
    assert "trained_weights" not in header  # the same for both
    assert [job[0] for job in jobs] == ["0", "0", "1", "1"]
    assert [" ".join(job[2:4]) for job in jobs[::2]] == ["failed (2)"] * 2
    for job in jobs[1::2]:
        assert job[2] == "done"
        manifest = read_manifest(tmp_path / job[-1])
        assert manifest.done
        assert manifest.seed == int(job[0])
        assert job[header.index("loss_after")] == f"{manifest.metrics['loss_after']:.4g}"

    # With the file repaired, the same command finds the finished jobs and runs the failed ones.
    (tmp_path / "broken.jsonl").write_text(Path(good).read_text().replace("garden", "meadow"))
    status, out, _ = align(*sweep)
    assert status == 0
    assert out.count("This run is finished already") == 2
    assert [job[2] for job in parse_table(out)[1:]] == ["done"] * 4
    page = tmp_path / out.rpartition("curves and figures side by side: ")[2].splitlines()[0]
    assert "4 runs side by side" in page.read_text()


@pytest.mark.skipif(torch.version.cuda is not None, reason="jobs are new processes under a CUDA build of torch")
def test_a_fault_of_ours_does_not_stop_the_others(align: Align, sft: list[str], monkeypatch: pytest.MonkeyPatch):
    from align.evals import held_out

    measure = held_out.compute_held_out_loss

    def fail_in_first_job(model: object, *args: object) -> object:
        if (Path("runs/sft/x-seed=1")).exists() and not Path("runs/sft/x-seed=2").exists():
            raise RuntimeError("something that nobody thought of")
        return measure(model, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(held_out, "compute_held_out_loss", fail_in_first_job)
    status, out, err = align("-m", *sft, "run.name=x", "seed=1,2")
    assert status == 1
    assert "something that nobody thought of" in err
    assert parse_table(out)[1][1:3] == ["failed", "(1)"]
    assert [job[-1] for job in parse_table(out)[1:]] == ["runs/sft/x-seed=1", "runs/sft/x-seed=2"]
    assert [read_manifest(Path(f"runs/sft/x-seed={n}")).status for n in (1, 2)] == ["failed", "done"]


def test_a_wrong_job_is_found_before_any_runs(align: Align, sft: list[str]):
    status, out, err = align("-m", *sft, "seed=0,-1")
    assert (status, out) == (2, "")
    assert "seed=-1: is not from 0 to 4294967295 (job 2 of 2; nothing was run)" in err
    status, _, err = align("-m", *sft[1:], "seed=0,1")
    assert status == 2
    assert "stage=(missing)" in err
    assert not Path("runs").exists()


def test_printed_configurations(align: Align, sft: list[str]):
    status, out, _ = align("-m", *sft, "seed=3,4", "run.name=x", "--cfg", "job")
    assert status == 0
    configurations = list(yaml.safe_load_all(out))
    assert [(configuration["seed"], configuration["run"]["name"]) for configuration in configurations] == [
        (3, "x-seed=3"),
        (4, "x-seed=4"),
    ]
    assert configurations[0]["stage"]["lr"] == "${method.lr}"
    assert "# [2 of 2] seed=4 run.name='x-seed=4'" in out
    _, out, _ = align("-m", *sft, "seed=3,4", "--cfg", "job", "--resolve")
    assert [(configuration["seed"], configuration["stage"]["lr"]) for configuration in yaml.safe_load_all(out)] == [
        (3, None),
        (4, None),
    ]
    urls = ",".join(f"'postgresql://u:hunter2@{host}/x'" for host in "ab")
    assert "hunter2" not in "".join(map(str, align("-m", *sft, f"store.url={urls}", "--cfg", "job")))
    assert align("-m", *sft, "seed=3,-4", "--cfg", "job")[0] == 2
    assert align("stage=sft", "-m", "--help")[1] == align("stage=sft", "--help")[1] != ""
    assert not Path("runs").exists()


def test_resolved_is_what_a_run_writes_down_and_holds_no_secret(align: Align, sft: list[str]):
    words = [*sft, "run.name=x", "store.url=postgresql://u:hunter2@h/x?passfile=hunter2"]
    _, out, _ = align(*words, "--cfg", "job", "--resolve")
    assert "hunter2" not in out
    assert align(*words)[0] == 0
    written_config = yaml.safe_load(Path("runs/sft/x/config.yaml").read_text())
    resolved = yaml.safe_load(out)
    assert (resolved["stage"]["lr"], written_config["stage"]["lr"]) == (None, 2e-4)  # the rate follows from the base
    resolved["stage"]["lr"] = 2e-4
    assert written_config == resolved | {"method": {**written_config["method"]}}  # `auto` is settled as a run opens
    assert written_config["method"]["name"] == "qlora"


def test_lines_of_a_batch_may_sweep(align: Align, sft: list[str], monkeypatch: pytest.MonkeyPatch):
    lines = f"-m {shlex.join(sft)} run.name=x seed=1,2\nstage=export artifact=sft:x-seed=1 run.name=y\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = align("-")
    assert status == 0, err
    assert out.index("[1 of 2] -m stage=sft") < out.index("runs/sft/x-seed=2") < out.index("[2 of 2] stage=export")
    assert read_manifest(Path("runs/export/y")).done
    monkeypatch.setattr(sys, "stdin", io.StringIO("stage=sft\n-m stage=sft seed=1,-2\n"))
    status, out, err = align("-")
    assert (status, out, "line 2" in err) == (2, "", True)


def test_a_sweep_that_is_cut_goes_on(align: Align, forks: Forks, sft: list[str], tmp_path: Path):
    words = ["-m", *sft, "run.name=x", "stage.max_steps=30", "stage.save_every=5", "seed=1,2,3"]
    child = forks.start(tmp_path, *words)
    sealed = "runs/sft/x-seed=2/checkpoints/*/align_seal.json"
    assert becomes_true(lambda: [*tmp_path.glob(sealed)] or child.poll() is not None)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    status, out, err = child.wait()
    assert status == 130, err
    assert "Traceback" not in err
    assert "run the same command again to continue" in err
    assert [" ".join(job[1:3]).removesuffix(job[-1]).split()[0] for job in parse_table(out)[1:]] == [
        "done",
        "interrupted",
        "not",
    ]
    statuses = [read_manifest(tmp_path / f"runs/sft/x-seed={n}").status for n in (1, 2)]
    assert statuses == ["done", "interrupted"]
    assert not (tmp_path / "runs/sft/x-seed=3").exists()

    status, out, _ = align(*words)
    assert status == 0
    assert out.count("This run is finished already") == 1
    assert out.count("continuing from checkpoint-") == 1
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "runs/sft/x-seed=2/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted({*steps})
    assert [job[1] for job in parse_table(out)[1:]] == ["done"] * 3


def test_own_group_files_reach_every_job(align: Align, sft: list[str], tmp_path: Path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    for name, rank in (("low", 2), ("high", 4)):
        (tmp_path / f"mine/experiment/{name}.yaml").write_text(f"# @package _global_\nmethod:\n  r: {rank}\n")
    assert align("-m", *sft, "+experiment=low,high")[0] == 2
    status, out, err = align("-m", "--config-dir", "mine", *sft, "+experiment=low,high")
    assert status == 0, err
    assert "[1 of 2] --config-dir mine stage=sft" in out
    ranks = [read_manifest(Path(job[-1])).config["method"]["r"] for job in parse_table(out)[1:]]
    assert ranks == [2, 4]
