"""The shape of a model: which matrices it has, and how wide it is. Read from its `config.json`; imports no torch where
the architecture is Llama-like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import InputError
from align.run import Base, model_config

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Types whose modules are known here; their decoders have the fast path on a CPU."""


class Linear(NamedTuple):
    """Linear layers of one name and shape.

    Attributes:
        name: the last part of it, such as `q_proj`.
        count: how many there are.
    """

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Attributes:
    width: D, of the hidden states.
    mlp: width of what the MLP works in.
    heads, groups: of queries, and of keys and values.
    head: width of one.
    vocabulary: V.
    context: positions that it was made for.
    linears: those that bear adapters and are quantised.
    embeddings: weights of the input embedding.
    output: weights of a head of its own; 0 where it is tied.
    others: weights of norms, biases, and all else.
    llama: whether it is Llama-like.
    """

    width: int
    layers: int
    mlp: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    context: int
    linears: tuple[Linear, ...]
    embeddings: int
    output: int
    others: int
    llama: bool = True

    @property
    def linear_weights(self) -> int:
        return sum(m.inputs * m.outputs * m.count for m in self.linears)

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_weights + self.embeddings + self.output + self.others

    @property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max(m.inputs * m.outputs for m in self.linears)

    def adapter_weights(self, rank: int, targets: tuple[str, ...] = (), dora: bool = False) -> int:
        """Of one adapter.

        Args:
            targets: names of layers; none for all.
        """
        bear = [m for m in self.linears if not targets or m.name in targets]
        return sum((rank * (m.inputs + m.outputs) + dora * m.outputs) * m.count for m in bear)


def shape_of(base: Base) -> Shape:
    """The shape of a base, without its weights.

    Raises:
        InputError: its configuration is none that can be read.
    """
    config = model_config(Path(base.path), displayed=base.id)
    if config.get("model_type") in LLAMA_LIKE:
        return llama_shape(config)
    return built_shape(base)


def llama_shape(config: Mapping[str, Any]) -> Shape:
    """Of a Llama-like model, by the numbers of its `config.json`.

    Raises:
        InputError: one of them is missing or no number.
    """

    def number(key: str, default: int | None = None) -> int:
        found = config.get(key)
        found = default if found is None else found
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise InputError(f"config.json, {key}", found, "is no size", "Download or save the model again.")
        return found

    kind = config["model_type"]
    width, layers, mlp = number("hidden_size"), number("num_hidden_layers"), number("intermediate_size")
    heads = number("num_attention_heads")
    groups = number("num_key_value_heads", 8 if kind == "mistral" else 32 if kind.startswith("qwen") else heads)
    head = number("head_dim", 128 if kind == "qwen3" else width // heads)
    vocabulary = number("vocab_size")
    inside, shared = heads * head, groups * head
    linears = (
        Linear("q_proj", width, inside, layers), Linear("k_proj", width, shared, layers),
        Linear("v_proj", width, shared, layers), Linear("o_proj", inside, width, layers),
        Linear("gate_proj", width, mlp, layers), Linear("up_proj", width, mlp, layers),
        Linear("down_proj", mlp, width, layers),
    )  # fmt: skip
    bias = (inside + 2 * shared) * (kind == "qwen2" or bool(config.get("attention_bias")))
    bias += width * (kind in ("llama", "qwen3") and bool(config.get("attention_bias")))  # of o_proj
    bias += (2 * mlp + width) * (kind == "llama" and bool(config.get("mlp_bias")))
    normed = 2 * head * (kind == "qwen3")
    tied = bool(config.get("tie_word_embeddings", False))
    return Shape(
        width, layers, mlp, heads, groups, head, vocabulary, number("max_position_embeddings", 2048), linears,
        embeddings=vocabulary * width, output=0 if tied else vocabulary * width,
        others=layers * (2 * width + bias + normed) + width,
    )  # fmt: skip


def built_shape(base: Base) -> Shape:
    """Of any other model, by its modules, built without weights.

    Raises:
        InputError: they cannot be built.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from align.models.load import context_length

    try:  # the configuration alone is there of a model on the hub
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path, trust_remote_code=False))
        width = int(model.config.get_text_config().hidden_size)
    except Exception as error:  # what a wrong value leads to has any type
        problem = "its modules cannot be built, so that nothing is known of its size"
        raise InputError("model.path", base.id, problem, "Use a causal model that transformers knows.") from error
    config, head, embedding = (
        model.config.get_text_config(),
        model.get_output_embeddings(),
        model.get_input_embeddings(),
    )
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            counts[name.rpartition(".")[2], inputs, outputs] += 1
    linears = tuple(Linear(*key, count) for key, count in counts.items())
    every = sum(p.numel() for p in model.parameters())
    tied = head is None or head.weight is embedding.weight
    embeddings, output = embedding.weight.numel(), 0 if head is None or tied else head.weight.numel()
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    return Shape(
        width=width, layers=int(config.num_hidden_layers), heads=heads,
        mlp=max((max(m.inputs, m.outputs) for m in linears), default=width),
        groups=int(getattr(config, "num_key_value_heads", None) or heads),
        head=int(getattr(config, "head_dim", None) or width // heads),
        vocabulary=int(config.vocab_size), context=context_length(model), linears=linears, embeddings=embeddings,
        output=output, others=every - embeddings - output - sum(m.inputs * m.outputs * m.count for m in linears),
        llama=False,
    )  # fmt: skip
