"""The whole path again, in the other precisions and ways to train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from searched import settle
from workshop import EVERY_RUN, PPO, SFT, STREAMS, Workshop, files

from align.models.adapters import read_tensors
from align.run import read_manifest
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")


def test_every_stage_under_lora(tmp_path: Path, chats: Path, tiny_model: Path) -> None:
    shop = Workshop(tmp_path / "runs", chats)
    shop.run("sft", "model=hub", f"model.path={tiny_model}", "method=lora", "method.r=4", *SFT)
    shop.up_to_reward()  # nobody says method=lora again: the adapter knows
    done = read_manifest(shop.run("ppo", *PPO, "stage.value_backbone=policy"))
    assert done.config["method"]["name"] == "lora"
    assert done.metrics["quantised_layers"] == 0
    assert shop.status("stage=eval", "method=qlora", *shop.on_file) == 2
    assert "was trained with method=lora" in shop.said
    other = shop.run("sft", "model=hub", f"model.path={tiny_model}", "stage.max_steps=1", *SFT, "run.name=other")
    assert shop.status("stage=ppo", *shop.on_file, *PPO, "init=sft:other", "reward.ref=reward:latest") == 2
    assert "was trained with method=lora, and the policy, from init=sft:other, has method=qlora" in shop.said
    assert f"Train the reward model with stage=reward init=sft:{other.name}." in shop.said
    assert "method=." not in shop.said  # there is none to drop
    assert math.isfinite(done.metrics["last_score"])
    assert read_manifest(shop.run("export", "export=merged")).metrics["kl"] < 0.01


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_every_stage_in_bf16(tmp_path: Path, chats: Path, tiny_model: Path, method: str) -> None:
    """What trains stays in fp32, whatever is computed in."""
    shop = Workshop(tmp_path / "runs", chats, "dtype=bfloat16")
    tuned = shop.run("sft", "model=hub", f"model.path={tiny_model}", f"method={method}", "method.r=4", *SFT)
    shop.up_to_reward()
    done = shop.run("ppo", *PPO, f"stage.value_backbone={'own' if method == 'qlora' else 'frozen'}")
    for run in (tuned, done):
        assert {t.dtype for t in read_tensors(run / "artifact").values()} == {torch.float32}
    assert abs(read_rows(done / "metrics.jsonl")[0]["first_ratio"] - 1) < 0.02
    assert read_manifest(tuned).metrics["loss_after"] < read_manifest(tuned).metrics["loss_before"]
    assert read_manifest(shop.run("export", "export=merged")).metrics["kl"] < 0.05
    shop.run("eval", "stage.prompts=8")


def test_packing_trains_on_fewer_longer_rows(tmp_path: Path, chats: Path, tiny_model: Path) -> None:
    shop = Workshop(tmp_path / "runs", chats)
    packed = shop.run("sft", "model=hub", f"model.path={tiny_model}", *SFT, "stage.packing=true")
    metrics = read_manifest(packed).metrics
    assert metrics["loss_after"] < metrics["loss_before"]
    assert metrics["steps"] == read_rows(packed / "metrics.jsonl")[-1]["step"]


def test_wandb_keeps_its_files_beside_ours_and_stays_offline(
    tmp_path: Path, chats: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'align-rlhf[wandb]'")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    shop = Workshop(tmp_path / "runs", chats)
    command = ("model=hub", f"model.path={tiny_model}", "stage.max_steps=2", "stage.log_every=1")
    watched = shop.run("sft", *command, "track=wandb")
    assert files(watched) == EVERY_RUN | STREAMS | {"steps.jsonl", "trained_on.jsonl", "trained_ids.parquet", "wandb"}
    settle()
    (file,) = (watched / "wandb").glob("offline-run-*/*.wandb")
    assert read_manifest(watched).digest in file.read_bytes().decode("latin-1")
    assert shop.run("sft", *command) == watched  # how a run is watched is no part of what it is
