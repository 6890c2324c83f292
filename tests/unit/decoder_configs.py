"""A small configuration of each kind of decoder that the fast path knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config


def build_llama_like_configs(sizes: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
    """Build one configuration of each kind.

    Args:
        sizes: sizes that all configurations share, four query heads among them.
    """
    without_head = {name: size for name, size in sizes.items() if name != "head_dim"}
    return {
        "llama, grouped keys": LlamaConfig(num_key_value_heads=2, **sizes),
        "llama, every bias": LlamaConfig(attention_bias=True, mlp_bias=True, **sizes),
        "llama, long positions": LlamaConfig(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            **sizes,
        ),
        "mistral": MistralConfig(num_key_value_heads=2, sliding_window=None, **sizes),
        "qwen2": Qwen2Config(num_key_value_heads=2, **without_head),
        "qwen3": Qwen3Config(num_key_value_heads=2, **{**sizes, "head_dim": 32}),
    }
