"""Llama with LoRA in NumPy, one row at a time and without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

Weights = dict[str, np.ndarray]


def read_weights(path: Path) -> Weights:
    """Return the tensors of a file in fp32."""
    return {name: to_fp32(tensor) for name, tensor in safetensors.deserialize(path.read_bytes())}


def to_fp32(tensor: dict[str, Any]) -> np.ndarray:
    if tensor["dtype"] == "BF16":  # the upper half of an fp32
        values = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(tensor["data"], {"F32": np.float32, "F16": np.float16}[tensor["dtype"]])
    return values.reshape(tensor["shape"]).astype(np.float32)


class Lora:
    """A plain LoRA adapter, read from a folder in PEFT's format."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"]:
            raise ValueError("more than plain LoRA")
        self.scale = config["lora_alpha"] / config["r"]
        self.weights = read_weights(folder / "adapter_model.safetensors")

    def __call__(self, module: str, x: np.ndarray) -> np.ndarray | float:
        a, b = (self.weights.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        return 0.0 if a is None or b is None else self.scale * (x @ a.T) @ b.T


class Llama:
    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.weights |= read_weights(path)

    def logits(self, ids: list[int], lora: Lora | None) -> np.ndarray:
        """Compute the logits of one sequence, of shape [S, V]."""
        config = self.config
        weights = self.weights
        heads = config["num_attention_heads"]
        groups = config["num_key_value_heads"]
        size = config["head_dim"]
        eps = config["rms_norm_eps"]
        length = len(ids)

        def linear(module: str, x: np.ndarray) -> np.ndarray:
            return x @ weights[f"{module}.weight"].T + (lora(module, x) if lora else 0.0)

        def norm(module: str, x: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{module}.weight"]

        half = size // 2
        rates = config["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half)
        angles = (np.arange(length)[:, None] * rates[None]).astype(np.float32)
        cos = np.cos(angles)[:, None]
        sin = np.sin(angles)[:, None]

        def rotate(x: np.ndarray) -> np.ndarray:
            first = x[..., :half]
            second = x[..., half:]
            return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)

        x = weights["model.embed_tokens.weight"][ids]
        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            h = norm(f"{layer}.input_layernorm", x)
            q = rotate(linear(f"{layer}.self_attn.q_proj", h).reshape(length, heads, size))
            k = rotate(linear(f"{layer}.self_attn.k_proj", h).reshape(length, groups, size)).repeat(heads // groups, 1)
            v = linear(f"{layer}.self_attn.v_proj", h).reshape(length, groups, size).repeat(heads // groups, 1)
            scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.float32(np.sqrt(size)) + future
            mixed = (softmax(scores) @ v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(length, -1)
            x = x + linear(f"{layer}.self_attn.o_proj", mixed)
            h = norm(f"{layer}.post_attention_layernorm", x)
            gate = linear(f"{layer}.mlp.gate_proj", h)
            x = x + linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", h))
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return norm("model.norm", x) @ head.T


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
