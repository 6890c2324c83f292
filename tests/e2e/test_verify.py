"""`stage=verify` as a command: it accepts the settings of PPO, passes on correct code, and names each failed check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready

from align.__main__ import main
from align.ppo import update
from align.run import read_manifest

pytestmark = pytest.mark.usefixtures("no_network")
SHORT = ["rollout.max_new_tokens=8", "device=cpu"]


def run_verify(settings: list[str], root: Path, capfd: pytest.CaptureFixture[str]) -> Mapping[str, Any]:
    assert main(["stage=verify", *settings, *SHORT, f"run.root={root}"]) == 0, capfd.readouterr()
    stdout = capfd.readouterr().out
    assert "all 15 checks pass" in stdout
    assert "about" in stdout.splitlines()[1]  # the estimated duration
    return read_manifest(Path(stdout.splitlines()[-1])).metrics


@pytest.mark.parametrize(("method", "most"), [("qlora", 0.0), ("full", 1e-5)])
def test_it_needs_nothing_that_was_trained(
    method: str, most: float, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    metrics = run_verify(["model=hub", f"model.path={tiny_model}", f"method={method}"], tmp_path, capfd)
    assert metrics["closed_form"] < 1e-3
    assert metrics["first_ratio"] <= most
    assert {"rloo_unbiased", "grpo_unbiased"} <= metrics.keys()  # each has a figure under its own name


def test_a_line_of_ppo_is_verified_as_it_stands(ready: Ready, capfd: pytest.CaptureFixture[str]):
    """The check runs with the adapters, the reward model and the PPO settings of the command."""
    settings = ["stage.kl_in=loss", "stage.kl_estimator=k3", "stage.gamma=0.9", "stage.bootstrap_truncated=true"]
    ppo_settings = [word for word in ready.ppo if not word.startswith("stage=")]
    run_verify([*ppo_settings, *settings, "stage.gradient_checkpointing=true"], ready.root, capfd)
    manifest = read_manifest(next((ready.root / "verify").iterdir()))
    assert {"init", "reward", "code"} <= manifest.inputs.keys()


def test_what_is_wrong_is_named(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    policy_loss = update.policy_loss
    monkeypatch.setattr(update, "policy_loss", lambda new, old, gains, *rest: policy_loss(new, old, -gains, *rest))
    command = ["stage=verify", "model=hub", f"model.path={tiny_model}", *SHORT, f"run.root={tmp_path}"]
    assert main(command) == 1
    captured = capfd.readouterr()
    assert (
        "PPO does not compute correctly here: closed form, no critic, first gradient, rloo unbiased, grpo unbiased"
        in captured.err
    )
    assert "FAILS  first gradient" in captured.out
