"""`stage.advantage=rloo`, `grpo` and `reinforce_pp` as commands: no critic, groups of answers and exact resumption."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready
from test_resume import copy_runs, die_while_writing, start_fork

from align.__main__ import main
from align.run import file_digest, read_manifest
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")
WORDS = ("stage.lr=5e-3", "stage.save_every=2", "stage.updates=5", "stage.eval_every=null", "run.name=x")
CHOICES = {
    "rloo": ("stage.advantage=rloo", "stage.group_size=4"),
    "gspo": (
        "stage.advantage=grpo",
        "stage.group_size=4",
        "stage.importance_sampling_level=sequence",
        "stage.clip_range_high=0.28",
        "stage.loss_mean=sequence",
        "stage.normalise=running",
        "stage.kl_control=adaptive",
        "stage.kl_horizon=50",
    ),
    "reinforce_pp": ("stage.advantage=reinforce_pp",),
    "dapo": (
        "stage.advantage=grpo",
        "stage.group_size=2",
        "stage.max_draws=3",
        "stage.kl_coef=0",
        "reward=fn",
        "reward.fn=coins:heads",
        "stage.normalise=off",
        "stage.missing_eos_penalty=0",
        "stage.kl_control=fixed",
    ),
}
COINS = """
def heads(chats):
    return [float(len(chat[-1]["content"]) % 3 == 0) for chat in chats]


def nothing(chats):
    return [1.0] * len(chats)
"""


@pytest.fixture(autouse=True)
def coins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coins.py").write_text(COINS)
    monkeypatch.syspath_prepend(tmp_path)


def build_ppo_command(name: str, arguments: list[str]) -> list[str]:
    """Return a PPO command with another estimator, and with `reward.ref` only if a reward model scores."""
    choice = CHOICES[name]
    return [*(w for w in arguments if "reward=fn" not in choice or not w.startswith("reward.")), *WORDS, *choice]


@pytest.mark.parametrize("name", ["gspo", "dapo"])  # the others keep no state that these do not
def test_a_run_that_was_killed_goes_on_to_the_bit(ready: Ready, tmp_path: Path, name: str):
    digests = []
    for folder, is_killed in (("whole", False), ("cut", True)):
        root, shared_arguments = copy_runs(ready, tmp_path / folder)
        command = build_ppo_command(name, shared_arguments)
        if is_killed:
            child = start_fork(die_while_writing(command, "state.json", 2))
            child.join()
            assert child.exitcode == -signal.SIGKILL
        child = start_fork(lambda command=command: main(command))
        child.join()
        assert child.exitcode == 0
        run = root / "ppo" / "x"
        assert not (run / "artifact" / "value").exists(), "nobody valued"
        files = [*sorted(run.glob("artifact/*.safetensors")), run / "metrics.jsonl"]
        assert len(files) == 2
        digests.append([file_digest(file) for file in files])
    assert digests[0] == digests[1]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert not any({"explained_variance", "value", "value_error", "value_grad_norm"} & row.keys() for row in rows)
    assert all(row["first_log_ratio"] < 1e-4 for row in rows)
    assert max(abs(row["kl"]) for row in rows) > 0.01, "the policy moved"


def record_draws(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that receives the prompts of each draw of the policy."""
    from align.ppo.workers import Workers

    draws: list[list[str]] = []
    start_sampling = Workers.start_sampling

    def record_prompts(self: Any, role: str, prompts: Any, *place: Any) -> Any:
        if place[0] == "rollout":
            draws.append([prompt.conversation.messages[-1].content for prompt in prompts])
        return start_sampling(self, role, prompts, *place)

    monkeypatch.setattr(Workers, "start_sampling", record_prompts)
    return draws


def run_command(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Path:
    assert main(arguments) == 0, capfd.readouterr().err
    return Path(capfd.readouterr().out.splitlines()[-1])


def test_answers_to_a_prompt_stand_together(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    draws = record_draws(monkeypatch)
    folder = run_command([*build_ppo_command("rloo", ready.ppo), f"run.root={ready.root}", "run.name=groups"], capfd)
    assert len(draws) == 5
    for prompts in draws:
        assert len(prompts) == 8
        assert prompts[:4] == prompts[:1] * 4
        assert prompts[4:] == prompts[4:5] * 4
    rows = read_rows(folder / "metrics.jsonl")
    assert all(row["draws"] == 1 for row in rows)
    assert all(row["equal_groups"] == 0 for row in rows), "a reward model tells answers apart"


def test_prompts_that_tell_nothing_are_replaced(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    draws = record_draws(monkeypatch)
    folder = run_command([*build_ppo_command("dapo", ready.ppo), f"run.root={ready.root}", "run.name=dapo"], capfd)
    rows = read_rows(folder / "metrics.jsonl")
    assert sum(row["draws"] for row in rows) == len(draws)
    assert any(row["draws"] > 1 for row in rows)
    assert any(len(prompts) < 8 for prompts in draws), "only what is missing is asked again"
    assert any(row["equal_groups"] > 0 for row in rows)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_pp"])
def test_a_line_is_verified_as_it_stands(ready: Ready, capfd: pytest.CaptureFixture[str], estimator: str):
    arguments = [word for word in ready.ppo if not word.startswith("stage=")]
    settings = [f"stage.advantage={estimator}", "stage.group_size=4", "stage.rows=5", f"run.name={estimator}"]
    folder = run_command(["stage=verify", *arguments, *settings, f"run.root={ready.root}"], capfd)
    metrics = read_manifest(folder).metrics
    assert metrics["experience"] < 1e-4
    assert metrics["first_gradient"] < 1e-4
    assert "value_gradient" not in metrics
    assert read_manifest(folder).config["stage"]["rows"] == 8, "whole groups"
