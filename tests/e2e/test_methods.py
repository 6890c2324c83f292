"""The whole path in other precisions and with other methods."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from stage_commands import PPO, SFT, Workshop

from align.models.adapters import read_tensors
from align.run import read_manifest
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")


def test_adapters_on_an_nf4_base_in_bf16_are_trained_and_published_in_fp32(
    tmp_path: Path, chats: Path, tiny_model: Path
) -> None:
    shop = Workshop(tmp_path / "runs", chats, "dtype=bfloat16")
    tuned = shop.run("sft", "model=hub", f"model.path={tiny_model}", "method=qlora", "method.r=4", *SFT)
    assert {tensor.dtype for tensor in read_tensors(tuned / "artifact").values()} == {torch.float32}
    metrics = read_manifest(tuned).metrics
    assert metrics["loss_after"] < metrics["loss_before"]
    assert read_manifest(shop.run("export", "export=merged", f"artifact={tuned}")).metrics["kl"] < 0.05


def test_every_stage_under_lora_in_bf16(tmp_path: Path, chats: Path, tiny_model: Path) -> None:
    """Trained weights stay in fp32 under any dtype. (`test_stages` runs all stages on NF4 in fp32.)"""
    shop = Workshop(tmp_path / "runs", chats, "dtype=bfloat16")
    tuned = shop.run("sft", "model=hub", f"model.path={tiny_model}", "method=lora", "method.r=4", *SFT)
    shop.run_up_to_reward()  # without method=lora: the adapter's method is taken
    ppo = shop.run("ppo", *PPO, "stage.value_backbone=frozen")
    for run in (tuned, ppo):
        assert {t.dtype for t in read_tensors(run / "artifact").values()} == {torch.float32}
    manifest = read_manifest(ppo)
    assert (manifest.config["method"]["name"], manifest.metrics["quantised_layers"]) == ("lora", 0)
    assert abs(read_rows(ppo / "metrics.jsonl")[0]["first_ratio"] - 1) < 0.02
    assert math.isfinite(manifest.metrics["last_score"])
    assert read_manifest(tuned).metrics["loss_after"] < read_manifest(tuned).metrics["loss_before"]
    shop.refuses("stage=eval", "method=qlora", *shop.data_words, says="was trained with method=lora")
    shop.run("sft", "model=hub", f"model.path={tiny_model}", "stage.max_steps=1", *SFT, "run.name=other")
    messages = (
        "was trained with method=lora, and the policy, from init=sft:other, has method=qlora",
        "Train the reward model with stage=reward init=sft:other.",
    )
    shop.refuses("stage=ppo", *shop.data_words, *PPO, "init=sft:other", "reward.ref=reward:latest", says=messages)
    assert read_manifest(shop.run("export", "export=merged", f"artifact={ppo}")).metrics["kl"] < 0.05
    shop.run("eval", "stage.prompts=8")
