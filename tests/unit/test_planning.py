"""Predictions of a run's memory: shapes are those of the modules, bytes are those of live tensors, and proposed changes
make the run fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from trl.kernels import chunked_logprob
from trl.trainer import utils

from align.models.adapters import add_new_adapter
from align.models.base import find_base
from align.models.fastpath import decoder, llama
from align.models.lora import Lora
from align.ops import logprobs
from align.planning import memory
from align.planning.gpus import GPUS, compute_usable_bytes, find_changes_to_fit, iter_changes
from align.planning.live_bytes import LiveBytes
from align.planning.memory import Workload, count_base_bytes, predict_footprint
from align.planning.shapes import build_shape, compute_llama_shape, read_shape
from align.ppo.measured_update import measure_update
from align.run import Base
from align.trainers.common import Training
from align.trainers.measured_steps import measure_steps

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with wide heads": LlamaConfig(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}
PPO = Workload("ppo", "qlora", "float32", False, 8, 32, step=8, prompt=24, rewards=1, from_adapter=True, rollout_rows=8)
SFT = Workload("sft", "qlora", "float32", False, 2, 64, step=4)
LARGE = compute_llama_shape(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
)
ON_GPU = Workload(
    "ppo", "lora", "bfloat16", True, 32, 2048, step=32, prompt=1792, rewards=1, rollout_rows=128, recompute=False
)


def save_config(config: LlamaConfig, folder: Path) -> Base:
    config.save_pretrained(folder)
    return Base("model", str(folder), None, "")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_is_that_of_the_modules(name: str, tmp_path: Path) -> None:
    """The shape read from config.json is that of the modules that transformers and PEFT build from it."""
    base = save_config(CONFIGS[name], tmp_path)
    shape = read_shape(base)
    module_shape = build_shape(base)
    assert shape.llama
    assert not module_shape.llama
    assert sorted(shape.linears) == sorted(module_shape.linears)
    numbers = ("width", "layers", "heads", "groups", "head", "vocabulary", "context", "embeddings", "output", "others")
    assert {n: getattr(shape, n) for n in numbers} == {n: getattr(module_shape, n) for n in numbers}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.weights == sum(p.numel() for p in model.parameters())
    model = add_new_adapter(model, Lora(4, 8))
    assert shape.adapter_weights(4) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_the_numbers_of_other_rooms_are_theirs() -> None:
    assert (memory.LONGEST, memory.KEPT) == (llama.LONGEST, llama.KEPT)
    assert (memory.ROWS, memory.LOGITS) == (logprobs.ROWS, logprobs.LOGITS)
    assert (memory.TILE, memory.TILE_TOKENS) == (utils._CHUNKED_LOGPROB_CHUNK_SIZE, chunked_logprob.TOKEN_CHUNK_SIZE)
    assert memory.COPY == decoder.MAX_COPY


@pytest.mark.parametrize(
    "work", [PPO, replace(PPO, micro_batch=4, value_backbone="policy"), SFT], ids=lambda w: w.stage
)
def test_a_prediction_is_within_a_tenth_of_what_is_alive(work: Workload) -> None:
    """The script benchmarks/scale/memory.py measures every stage in the same way."""
    base = find_base()
    training = Training(
        lr=0.0,
        epochs=1.0,
        batch_size=work.step,
        micro_batch=work.micro_batch,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=1.0,
        save_every=10,
        gradient_checkpointing="false",
        seed=0,
    )
    device = torch.device("cpu")
    counts = measure_update(base, work, device) if work.stage == "ppo" else measure_steps(base, work, training, device)
    footprint = predict_footprint(read_shape(base), work)
    assert footprint.peak == pytest.approx(max(counts.values()), rel=0.1)
    assert counts.keys() == {phase.name for phase in footprint.phases}


def test_live_bytes_are_counted_once_and_until_they_are_freed() -> None:
    module = torch.nn.Linear(8, 8, bias=False)
    with LiveBytes([module]) as live:
        assert live.now == 256
        x = torch.ones(100)
        view = x.view(10, 10)[1:]
        assert live.now == 656
        del x
        assert live.now == 656
        del view
        assert live.now == 256
        assert live.lap() == 656
        assert live.lap() == 256


def test_nf4_takes_the_bytes_that_it_takes() -> None:
    """Weights take 4.127 bits each, and embeddings are in the dtype of the computation."""
    assert count_base_bytes(LARGE, "qlora", 2) == pytest.approx(
        4.127 / 8 * LARGE.linear_weights + 2 * 1.0508e9, rel=1e-3
    )


@pytest.mark.parametrize("gb", [gpu.gb for gpu in GPUS])
def test_what_is_proposed_fits_and_nothing_of_it_is_idle(gb: float) -> None:
    """The run fits with all proposed changes, and does not fit without any one of them."""
    changes = find_changes_to_fit(LARGE, ON_GPU, compute_usable_bytes(gb))
    room = compute_usable_bytes(gb)
    if changes is None:
        assert gb == 8
        return
    fields = {
        "stage.gradient_checkpointing": lambda v: {"recompute": v == "true"},
        "stage.micro_batch": lambda v: {"micro_batch": int(v)},
        "rollout.batch_size": lambda v: {"rollout_rows": int(v)},
        "stage.value_backbone": lambda v: {"value_backbone": v},
        "method": lambda v: {"method": v},
        "data.max_length": lambda v: {"prompt": int(v), "length": int(v) + ON_GPU.answer},
    }
    changed_fields = {key: fields[key](value) for key, _, value in (change.partition("=") for change in changes)}

    def predict_peak(without: str = "") -> float:
        values = {
            k: v for key, field_values in changed_fields.items() if key != without for k, v in field_values.items()
        }
        return predict_footprint(LARGE, replace(ON_GPU, **values)).peak

    assert predict_peak() <= room
    assert all(predict_peak(key) > room for key in changed_fields)


def test_nothing_is_proposed_where_it_fits_or_nothing_helps() -> None:
    assert find_changes_to_fit(LARGE, ON_GPU, compute_usable_bytes(1000)) == []
    assert find_changes_to_fit(LARGE, ON_GPU, compute_usable_bytes(2)) is None


def test_changes_come_in_the_order_of_what_they_cost() -> None:
    keys = [change.key for change in iter_changes(ON_GPU)]
    assert keys[:2] == ["stage.gradient_checkpointing", "stage.micro_batch"]
    assert keys[-1] == "data.max_length"
    assert all(ON_GPU.step % int(c.value) == 0 for c in iter_changes(ON_GPU) if c.key == "stage.micro_batch")


def test_ranks_share_what_trains_and_not_what_is_frozen() -> None:
    full = replace(ON_GPU, stage="full", method="full", prompt=0, rewards=0, moments=2)
    one_rank = predict_footprint(LARGE, full)
    two_ranks = predict_footprint(LARGE, replace(full, ranks=2))
    assert two_ranks.standing == one_rank.standing / 2
    assert predict_footprint(LARGE, replace(ON_GPU, ranks=2)).standing == predict_footprint(LARGE, ON_GPU).standing


def test_the_table_of_sizes_is_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "scale"))
    monkeypatch.delitem(sys.modules, "sizes", raising=False)
    import sizes  # pyright: ignore[reportMissingImports]

    text = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert sizes.update_page(text) == text, "run: python benchmarks/scale/sizes.py --write"
