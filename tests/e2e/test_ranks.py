"""Commands on several ranks: their result is that of one process, and they end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Forks
from rank_processes import build_rank_environments, run_on_ranks, start_ranks
from stage_commands import Ready
from waiting import becomes_true

from align.run import read_manifest
from align.track import read_rows

ROOT = Path(__file__).resolve().parents[2]
JUDGE = """
import os, signal, time
from pathlib import Path

RANK = os.environ.get("RANK", "0")

def length(chats):
    return [float(len(chat[-1]["content"])) for chat in chats]

def counted(chats):
    with open("asked", "a") as file:
        file.write(f"{RANK} {len(chats)}\\n")
    return length(chats)

def ends_well(chats):
    return [float(len(chat[-1]["content"]) % 3 == 0) for chat in chats]

def refuses(chats):
    if RANK == "1":
        raise ValueError("no judgement")
    return length(chats)

def hangs(chats):
    if RANK == "1":
        time.sleep(600)
    return length(chats)

def breaks(chats):
    import align.ppo.loop
    if RANK == "1":
        align.ppo.loop.assemble_experience = None
    return length(chats)

calls = 0

def dies(chats):
    global calls
    calls += 1
    here = Path(f"died-{RANK}")
    if RANK == os.environ.get("DIES") and calls == int(os.environ["CALL"]) and not here.exists():
        here.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return length(chats)
"""
FILES = (
    "metrics.jsonl",
    "samples.jsonl",
    "artifact/adapter_model.safetensors",
    "artifact/value/adapter_model.safetensors",
    "artifact/value/value_head.safetensors",
)


@pytest.fixture(scope="module")
def desk(ready: Ready) -> Path:
    """Return the folder that commands run in, with a user's module and the runs."""
    folder = ready.root.parent
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="module")
def line(ready: Ready) -> list[str]:
    """PPO in which each rank has one micro-batch and one chunk of each rollout."""
    ppo_words = [w for w in ready.ppo if not w.startswith("reward.")]
    return [
        *ppo_words,
        "run.root=runs",
        "stage.updates=3",
        "stage.micro_batch=2",
        "rollout.batch_size=4",
        "stage.normalise_on=8",
        "stage.save_every=1",
        "stage.eval_every=1",
        "stage.eval_prompts=8",
        "stage.shown=2",
    ]


def assert_same_files(first_run: Path, second_run: Path) -> None:
    for name in FILES:
        assert (first_run / name).read_bytes() == (second_run / name).read_bytes(), name


def test_ranks_name_a_mistake_once(desk: Path, line: list[str], forks: Forks):
    results = run_on_ranks(forks, desk, *line, "reward=sentiment", "stage.nonsense=1")
    assert [result.status for result in results] == [2, 2], results[0].err + results[1].err
    messages = [text for result in results for text in result.err.splitlines() if text.startswith("align: ")]
    assert len(messages) == 1
    assert "stage.nonsense" in messages[0]


def test_groups_that_are_drawn_again_on_two_ranks_have_the_bits_of_one_process(
    desk: Path, line: list[str], forks: Forks
):
    """Groups without a learning signal decide how often all ranks draw."""
    grpo = [
        *line,
        "stage.advantage=grpo",
        "stage.group_size=2",
        "stage.max_draws=3",
        "stage.kl_coef=0",
        "reward=fn",
        "reward.fn=judge:ends_well",
        "stage.normalise=off",
        "stage.missing_eos_penalty=0",
        "stage.kl_control=fixed",
    ]
    single = forks.run(desk, *grpo, "run.name=groups-alone")
    assert single.status == 0, single.err
    results = run_on_ranks(forks, desk, *grpo, "run.name=groups-both")
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    weights = [
        (desk / result.folder / "artifact/adapter_model.safetensors").read_bytes() for result in (single, results[0])
    ]
    assert weights[0] == weights[1]
    rows, two_rank_rows = (read_rows(desk / result.folder / "metrics.jsonl") for result in (single, results[0]))
    for row in (*rows, *two_rank_rows):  # rounding of the sampler, whose batches are smaller if few rows are missing
        assert row.pop("sampler_kl", 0.0) < 1e-9
    assert rows == two_rank_rows
    assert max(row.get("draws", 0) for row in rows) > 1


def test_ppo_on_two_ranks_has_the_bits_of_one_process(ready: Ready, desk: Path, line: list[str], forks: Forks):
    learned = [*line, "reward.ref=reward:a", "dtype=bfloat16"]
    single = forks.run(desk, *learned, "run.name=alone")
    assert single.status == 0, single.err
    results = run_on_ranks(forks, desk, *learned, "run.name=both")
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    assert_same_files(desk / single.folder, desk / results[0].folder)
    assert results[1].out == results[1].err == ""  # one rank prints
    manifests = [read_manifest(desk / result.folder) for result in (single, results[0])]
    assert [manifest.hardware["world_size"] for manifest in manifests] == [1, 2]
    assert manifests[0].identity == manifests[1].identity
    # The run is finished, for any number of ranks: two ranks say so and end.
    repeated = run_on_ranks(forks, desk, *learned, "run.name=alone")
    assert [result.status for result in repeated] == [0, 0]
    assert "finished already" in repeated[0].out


def test_a_rank_that_is_killed_ends_the_run_which_any_number_of_ranks_continues(
    desk: Path, line: list[str], forks: Forks
):
    command = [*line, "reward=fn", "reward.fn=judge:dies"]
    uninterrupted = forks.run(desk, *command, "run.name=whole")
    assert uninterrupted.status == 0, uninterrupted.err
    # Calls of the judge: the reference's answers, the start on held-out prompts, then two an update: the fifth and the
    # sixth are in the second.
    for rank, call, n_ranks in ((1, 5, 1), (0, 6, 2)):
        name = f"run.name=killed-{rank}-{call}"
        kill = f"os.environ |= {{'DIES': '{rank}', 'CALL': '{call}'}}"
        killed = run_on_ranks(forks, desk, *command, name, more={0: kill, 1: kill})
        assert killed[rank].status == -signal.SIGKILL
        assert killed[1 - rank].status == 1, killed[1 - rank].err
        (desk / f"died-{rank}").unlink()
        if rank == 1:  # rank 0 holds the store that all ranks share
            assert "a rank ended without reporting an error" in killed[0].err
            assert "rank 1: update 2, scores" in killed[0].err
        resumed = run_on_ranks(forks, desk, *command, name) if n_ranks == 2 else [forks.run(desk, *command, name)]
        assert {result.status for result in resumed} == {0}, resumed[0].err
        assert "continuing from checkpoint" in resumed[0].out
        assert_same_files(desk / uninterrupted.folder, desk / resumed[0].folder)


def test_each_rank_asks_a_function_for_its_share(desk: Path, line: list[str], forks: Forks):
    command = [*line, "reward=fn", "reward.fn=judge:counted", "stage.updates=1", "stage.eval_every=null"]
    results = run_on_ranks(forks, desk, *command, "run.name=counted", world=2)
    assert results[0].status == 0, results[0].err
    calls = sorted((desk / "asked").read_text().split("\n")[:-1])
    assert calls == ["0 4", "0 4", "1 4", "1 4"]  # 8 reference answers, then 8 of the update
    (desk / "asked").unlink()
    (environment,) = build_rank_environments(1)  # a launcher may start one rank
    single = forks.start(
        desk, *command, "run.name=counted-1", before=f"import os\nos.environ |= {environment!r}"
    ).wait()
    assert single.status == 0, single.err
    assert sorted((desk / "asked").read_text().split("\n")[:-1]) == ["0 8", "0 8"]


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("refuses", 2, "align: reward.fn=judge:refuses: raised ValueError: no judgement"),
        ("hangs", 1, "align: a rank did not answer in time (ddp_timeout). rank 0: update 0, reference answers"),
        ("breaks", 1, "align: rank 1: internal error: TypeError"),
    ],
)
def test_one_message_whichever_rank_fails(desk: Path, line: list[str], forks: Forks, name: str, status: int, said: str):
    words = [
        *line,
        "reward=fn",
        f"reward.fn=judge:{name}",
        f"run.name={name}",
        "ddp_timeout=4",
        "stage.eval_every=null",
    ]
    children = start_ranks(forks, desk, *words)
    waited_ranks = [0] if name == "hangs" else [0, 1]
    results = [children[i].wait(60) for i in waited_ranks]
    if name == "hangs":
        children[1].send_signal(signal.SIGTERM)  # as its launcher does
        results.append(children[1].wait(15))
        assert "rank 1: update 0, reference answers (since " in results[0].err
    assert results[0].status == status
    assert results[1].status == (130 if name == "hangs" else status)  # it was interrupted, after all others had ended
    reporting = results[:1] if name == "hangs" else results
    messages = [text for result in reporting for text in result.err.splitlines() if text.startswith("align: ")]
    assert messages[0].startswith(said)
    assert len(messages) == (2 if name == "breaks" else 1)  # the other says where the traceback is
    run = desk / "runs/ppo" / name
    manifest = read_manifest(run)
    assert manifest.status == "failed"
    if name == "breaks":
        assert "experience(" in (run / "log.txt").read_text()
    if name == "refuses":
        assert manifest.error.startswith("RankFailed: rank 1: reward.fn=judge:refuses")


# The launcher itself, and what is started as if on two machines.


def test_devices_starts_the_ranks_and_ends_them(desk: Path, line: list[str], tmp_path: Path):
    words = [*line, "reward=fn", "reward.fn=judge:length", "run.name=launched", "devices=2", "stage.eval_every=null"]
    words.append("stage.updates=400")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with (tmp_path / "err").open("w+") as err:
        command = [sys.executable, "-m", "align", *words]
        launcher = subprocess.Popen(command, cwd=desk, env=environment, stdout=subprocess.DEVNULL, stderr=err)
        checkpoints = desk / "runs/ppo/launched/checkpoints"
        assert becomes_true(lambda: [*checkpoints.glob("checkpoint-*")] or launcher.poll() is not None)
        assert launcher.poll() is None, Path(err.name).read_text()
        began = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == 130
        assert time.monotonic() - began < 15
        err.seek(0)
        messages = [text for text in err.read().splitlines() if not text.startswith("ppo ")]
    assert messages == ["align: interrupted; run the same command again to continue"]
    assert read_manifest(desk / "runs/ppo/launched").status == "interrupted"
    assert list(checkpoints.glob("checkpoint-*"))
    assert not list(tmp_path.glob("align-*"))  # nothing of the ranks is left


def test_two_machines_of_which_the_second_cannot_write(desk: Path, line: list[str], forks: Forks, tmp_path: Path):
    if (bwrap := shutil.which("bwrap")) is None:
        pytest.skip("bubblewrap is not installed (Debian's package `bubblewrap`)")
    contained = [bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--bind", str(tmp_path), str(tmp_path)]
    if subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user make namespaces")
    words = [*line, "reward=fn", "reward.fn=judge:length"]
    rank_environments = build_rank_environments(2, local=1)
    first = forks.start(desk, *words, "run.name=far", before=f"import os\nos.environ |= {rank_environments[0]!r}")
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    second = subprocess.run(
        [*contained, sys.executable, "-m", "align", *words, "run.name=far"],
        cwd=desk,
        timeout=200,
        env={**os.environ, **rank_environments[1], **common},
        capture_output=True,
        text=True,
    )
    assert second.returncode == 0, second.stderr
    first_result = first.wait()
    assert first_result.status == 0, first_result.err
    single = forks.run(desk, *words, "run.name=near")
    assert_same_files(desk / single.folder, desk / first_result.folder)
    assert json.loads((desk / first_result.folder / "manifest.json").read_text())["hardware"]["world_size"] == 2
