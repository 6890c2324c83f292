"""Rollouts by a stand-in for vLLM (`rollout=vllm`): training on them, and faults with the update that notices them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_search import read_all_text
from free_ports import pick_free_port
from processes import Forks
from rank_processes import run_on_ranks
from stage_commands import Ready
from vllm_stand_in import stand_in_python

from align.__main__ import main
from align.rollout.vllm_server import ENVIRONMENT, build_serve_arguments
from align.track import read_rows

STATE = (
    "stage.eval_every=2",
    "stage.eval_prompts=2",
    "stage.shown=1",
    "stage.updates=3",
    "stage.lr=0.01",
    "rollout.temperature=0.8",
)
KEY = "pl4nted-key-of-the-servers"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_in_python(tmp_path_factory.mktemp("venv"))


@pytest.fixture
def words(ready: Ready, python: str) -> list[str]:
    return build_words(ready, python)


def build_words(ready: Ready, python: str) -> list[str]:
    """Return the words of a run, without its name."""
    return [*ready.ppo, *STATE, f"run.root={ready.root}", "rollout=vllm", f"rollout.python={python}"]


def last_folder(capfd: pytest.CaptureFixture[str]) -> Path:
    return Path(capfd.readouterr().out.splitlines()[-1])


def read_updates(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "rollout_gap" in row]


@pytest.fixture(scope="module")
def lives(ready: Ready, python: str) -> Path:
    """Run PPO on two servers that work, and return the run's folder."""
    assert main([*build_words(ready, python), "run.name=lives", "rollout.replicas=2"]) == 0
    return ready.root / "ppo" / "lives"


def test_it_learns_from_what_a_server_draws(lives: Path):
    rows = read_updates(lives)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["rollout_gap"] < 1e-4  # the bar, in fp32 and at a temperature
        assert row["rollout_ratio"] == pytest.approx(1, abs=1e-4)
        assert row["staleness"] == 0
        assert row["first_log_ratio"] < 1e-5
    assert abs(rows[-1]["kl"]) > 0.01, "the policy moved, or this shows nothing"
    assert (lives / "vllm-1.log").read_text(), "there was a second one"
    assert not (lives / "vllm").exists()


def test_a_run_that_samples_ahead_and_is_continued_learns_the_same(
    ready: Ready, words: list[str], forks: Forks, capfd: pytest.CaptureFixture[str]
):
    words = [*words, "stage.max_staleness=1", "stage.save_every=1", "stage.checkpoints=9"]
    assert main([*words, "run.name=whole"]) == 0, capfd.readouterr().err
    uninterrupted = last_folder(capfd)
    rows = read_updates(uninterrupted)
    assert [row["staleness"] for row in rows] == [0, 1, 1]
    assert all(row["rollout_gap"] < 1e-4 for row in rows)
    assert all(row["sampler_kl"] > 1e-3 for row in rows[1:]), "the learner stands elsewhere by then"

    resumed = ready.root / "ppo" / "cut"
    run = forks.start(ready.root, *words, "run.name=cut")
    while not (resumed / "checkpoints" / "checkpoint-1").exists():
        assert run.poll() is None, run.wait()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (resumed / "artifact" / "adapter_model.safetensors").exists()
    assert main([*words, "run.name=cut"]) == 0, capfd.readouterr().err
    assert read_rows(resumed / "metrics.jsonl") == read_rows(uninterrupted / "metrics.jsonl")
    weights = "artifact/adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (uninterrupted / weights).read_bytes()


BROKEN = {
    "another": (2, "of the adapter's effect is in the engine's logprobs"),
    "no-logprobs": (0, "gives no logprobs"),
    "forgets": (3, "no longer has an adapter"),
    "dies-always": (0, "times in a row"),
}
"""Fault → the update that notices it (0 if it is before the second), and the message."""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_server_is_noticed_in_that_update(
    words: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("STAND_IN", fault)
    update, message = BROKEN[fault]
    words = [*words, f"run.name={fault}", "stage.eval_every=null"]
    assert main(words) == 2
    output = capfd.readouterr()
    assert message in output.err, output
    if update:
        assert f"update {update}" in output.err
    if fault == "forgets":  # the run resumes on a server that works
        monkeypatch.delenv("STAND_IN")
        assert main(words) == 0


def test_a_server_that_dies_is_started_again(
    words: list[str], lives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("STAND_IN", "dies-once")
    monkeypatch.setenv("STAND_IN_MARK", str(tmp_path / "mark"))
    assert main([*words, "run.name=dies", "rollout.replicas=2"]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert re.search(r"starting it or connecting again: \S+/python \(vllm(-1)?\.log\)", out)
    dies = Path(out.splitlines()[-1])
    assert read_rows(dies / "metrics.jsonl") == read_rows(lives / "metrics.jsonl")


@pytest.fixture
def url(python: str, tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    """Start a server of the tiny model before any run."""
    words = build_serve_arguments(
        "0" * 64,
        "float32",
        layers=["q_proj"],
        rank=16,
        adapters=4,
        slots=8,
        context=256,
        prefixes=False,
        logprobs="processed_logprobs",
    )
    words += ["--api-key", KEY]
    port = pick_free_port()
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_model), "--port", str(port), *words]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def test_servers_that_run_already(
    ready: Ready, url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    ppo_words = [word for word in ready.ppo if not word.startswith(("reward.", "init="))]
    rule = "reward.rules=[{rule: length, low: 2, high: 9}]"
    words = [
        *ppo_words,
        *STATE,
        f"run.root={ready.root}",
        "init=base",
        "model=hub",
        f"model.path={tiny_model}",
        "reward=rules",
        rule,
        "rollout=vllm",
        "stage.updates=2",
        "stage.eval_every=null",
    ]
    urls = f"rollout.urls=['{url}']"
    assert main([*words, "method=lora", urls, "run.name=by-url"]) == 0, capfd.readouterr().err
    folder = last_folder(capfd)
    assert all(row["rollout_gap"] < 1e-4 for row in read_updates(folder))
    assert not [path for path, text in read_all_text(folder).items() if KEY in text]
    # The server has the published weights, not the NF4 weights that this policy is trained on.
    assert main([*words, "method=qlora", urls, "run.name=other-base"]) == 2
    output = capfd.readouterr().err
    assert "nats from those that were trained" in output
    assert "Serve the base of this run" in output
    unreachable = [f"rollout.urls=['http://127.0.0.1:{pick_free_port()}']", "rollout.start_s=0.5", "run.name=nobody"]
    assert main([*words, "method=lora", *unreachable]) == 2
    assert "does not answer within 0.5 seconds" in capfd.readouterr().err
    for key, message in (("", "asks for a key, and VLLM_API_KEY is not set"), (KEY[1:], "does not take the key")):
        monkeypatch.setenv("VLLM_API_KEY", key)
        assert main([*words, "method=lora", urls, "run.name=locked", "resume=never"]) == 2
        output = "".join(capfd.readouterr())
        assert f"rollout.urls={url}: {message}" in output
        assert KEY[1:] not in output + "".join(read_all_text(ready.root / "ppo" / "locked").values())


def test_the_first_of_two_ranks_asks_for_both(ready: Ready, words: list[str], forks: Forks):
    words = [*words, "stage.max_staleness=1", "stage.micro_batch=2", "stage.updates=2", "stage.eval_every=null"]
    single = forks.run(ready.root, *words, "run.name=alone")
    assert single.status == 0, single.err
    results = run_on_ranks(forks, ready.root, *words, "run.name=both")
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    folders = [Path(result.folder) for result in (single, results[0])]
    first, second = (read_rows(folder / "metrics.jsonl") for folder in folders)
    assert first == second
    assert not (folders[1] / "vllm").exists()
