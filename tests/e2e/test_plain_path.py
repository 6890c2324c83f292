"""Architectures that the fast path does not fit, from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from stage_commands import PPO, SFT, Workshop

from align.models import architectures, forward, load
from align.run import read_manifest
from align.track import read_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from small_models import build_small_config, save_small_model

pytestmark = pytest.mark.usefixtures("no_network")
RULES = ("reward=rules", "reward.rules=[{rule: length, low: 3, high: 9}]", "stage.normalise=off")


def save_model_with_tokenizer(folder: Path, model_type: str, tokenizer: Any) -> str:
    save_small_model(build_small_config(model_type), folder)
    tokenizer.save_pretrained(folder)
    return f"model.path={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "falcon_h1"])
def test_the_whole_path_on_the_plain_path(model_type: str, tmp_path: Path, chats: Path, tiny_tokenizer: Any):
    """One type has a state that no reserved cache holds, and the other computes more than a head for its logits."""
    shop = Workshop(tmp_path / "runs", chats)
    model = save_model_with_tokenizer(tmp_path / "model", model_type, tiny_tokenizer)
    tuned = shop.run("sft", "model=hub", model, *SFT, "method=lora")
    assert "the plain path" in shop.output
    metrics = read_manifest(tuned).metrics
    assert metrics["loss_after"] < metrics["loss_before"]
    ppo_run = shop.run("ppo", *PPO, *RULES)
    first = read_rows(ppo_run / "metrics.jsonl")[0]
    assert first["first_log_ratio"] < 1e-4
    assert abs(first["sampler_kl"]) < 1e-8
    shop.run("eval", "stage.prompts=8")
    assert read_manifest(shop.run("export", "export=merged")).metrics["kl"] < 0.01


def test_packing_is_refused_by_the_setting_that_was_not_proven_before_a_row_is_encoded(
    tmp_path: Path, chats: Path, tiny_tokenizer: Any
):
    """The type can pack rows. It was measured with layers of both kinds, and this model has layers of one."""
    shop = Workshop(tmp_path / "runs", chats)
    model = save_model_with_tokenizer(tmp_path / "model", "gemma3_text", tiny_tokenizer)
    config = tmp_path / "model" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"layer_types": ["sliding_attention"] * len(settings["layer_types"])}))
    shop.refuses(
        "stage=sft",
        "model=hub",
        model,
        *SFT,
        *shop.data_words,
        "stage.packing=true",
        says="type gemma3_text was not proven with layer_types=sliding_attention",
    )
    assert "held out" not in shop.output


def test_dpo_is_refused_where_trl_would_read_other_logits(tmp_path: Path, chats: Path, tiny_tokenizer: Any):
    turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    refused = [{"role": "assistant", "content": "No."}]
    pairs = tmp_path / "pairs.jsonl"
    lines = (json.dumps({"chosen": t[:2], "rejected": [*t[:1], *refused]}) + "\n" for t in turns)
    pairs.write_text("".join(lines), encoding="utf-8")
    shop = Workshop(tmp_path / "runs", pairs)
    model = save_model_with_tokenizer(tmp_path / "model", "falcon_h1", tiny_tokenizer)
    line = ("stage=dpo", "model=hub", model, "init=base", "method=lora", "stage.batch_size=8", "stage.micro_batch=4")
    shop.refuses(
        *line, *shop.data_words, says="type falcon_h1 computes its logits by more than a linear head on hidden states"
    )


def test_ppo_stops_where_its_first_ratio_is_off(
    tmp_path: Path, chats: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    """A model whose rows depend on their padding is refused by the probe at load, and by PPO if the probe is off."""
    monkeypatch.setattr(architectures, "read_proven_types", dict)
    monkeypatch.setattr(forward, "find_route", lambda config: architectures.FAST)
    shop = Workshop(tmp_path / "runs", chats)
    model = save_model_with_tokenizer(tmp_path / "model", "bart", tiny_tokenizer)
    line = ("stage=ppo", "model=hub", model, "init=base", "method=lora", *PPO, *RULES, *shop.data_words)
    shop.refuses(*line, says="rows in a batch give other logits than each row alone")
    monkeypatch.setattr(load, "require_consistent_logits", lambda model, base: None)
    shop.refuses(
        *line,
        says=(
            "π_new/π_old of its first update lies",
            "so type bart computes different probabilities in different batches",
            "stage=verify",
        ),
    )
    assert not list((tmp_path / "runs" / "ppo").glob("*/artifact/adapter_config.json"))
    assert shop.status(*line, "stage.first_ratio.float32=100") == 0, shop.output
