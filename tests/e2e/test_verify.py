"""`stage=verify` as a command: it takes a line of PPO, holds on right code, and fails by name on wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready

from align.__main__ import main
from align.ppo import update
from align.run import read_manifest

pytestmark = pytest.mark.usefixtures("no_network")
SHORT = ["rollout.max_new_tokens=8", "device=cpu"]


def verified(words: list[str], root: Path, capfd: pytest.CaptureFixture[str]) -> Mapping[str, Any]:
    assert main(["stage=verify", *words, *SHORT, f"run.root={root}"]) == 0, capfd.readouterr()
    out = capfd.readouterr().out
    assert "all 15 anchors hold" in out
    assert "about" in out.splitlines()[1]  # how long it will take
    return read_manifest(Path(out.splitlines()[-1])).metrics


@pytest.mark.parametrize(("method", "most"), [("qlora", 0.0), ("full", 1e-5)])
def test_it_needs_nothing_that_was_trained(
    method: str, most: float, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    metrics = verified(["model=hub", f"model.path={tiny_model}", f"method={method}"], tmp_path, capfd)
    assert metrics["closed_form"] < 1e-3
    assert metrics["first_ratio"] <= most
    assert {"rloo_unbiased", "grpo_unbiased"} <= metrics.keys()  # a figure for each, by a name of its own


def test_a_line_of_ppo_is_verified_as_it_stands(ready: Ready, capfd: pytest.CaptureFixture[str]):
    """Its adapters, its reward model, its prices and its routes."""
    settings = ["stage.kl_in=loss", "stage.kl_estimator=k3", "stage.gamma=0.9", "stage.bootstrap_truncated=true"]
    words = [word for word in ready.ppo if not word.startswith("stage=")]
    verified([*words, *settings, "stage.gradient_checkpointing=true"], ready.root, capfd)
    manifest = read_manifest(next((ready.root / "verify").iterdir()))
    assert {"init", "reward", "code"} <= manifest.inputs.keys()


def test_what_is_wrong_is_named(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = update.policy_loss
    monkeypatch.setattr(update, "policy_loss", lambda new, old, gains, *rest: right(new, old, -gains, *rest))
    words = ["stage=verify", "model=hub", f"model.path={tiny_model}", *SHORT, f"run.root={tmp_path}"]
    assert main(words) == 1
    said = capfd.readouterr()
    assert "PPO is not right here: closed form, no critic, first gradient, rloo unbiased, grpo unbiased" in said.err
    assert "FAILS  first gradient" in said.out
