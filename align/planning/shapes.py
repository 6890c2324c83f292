"""The layer sizes of a model, computed from its `config.json`. Imports torch only if the architecture is not
Llama-like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.run import Base, model_config

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layer sizes are computed from the configuration alone, and which have the fast path on a CPU."""
GROUPS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
CONTEXTS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
"""Defaults of `num_key_value_heads` (`GROUPS`) and of `max_position_embeddings` (`CONTEXTS`) by model type."""


class Linear(NamedTuple):
    """The linear layers of a model that have one name and size, with their number.

    Attributes:
        name: last part of the name, such as `q_proj`.
        count: number of these layers.
    """

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The layer sizes of a model: widths, heads, vocabulary, context length, linear layers and weight counts.

    Attributes:
        width: width D of the hidden states.
        mlp: inner width of the MLP.
        heads, groups: number of heads of queries, and of keys and values.
        head: width of a head.
        vocabulary: V.
        context: maximum positions.
        linears: the linear layers that can have adapters and are quantised.
        embeddings: number of weights of the input embedding.
        output: number of weights of the head; 0 if it is tied to the embedding.
        others: number of all other weights, such as norms and biases.
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
    def queries(self) -> int:
        """Width of a token's queries over all heads."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Width of a token's keys over all key-value heads, which is also that of the values."""
        return self.groups * self.head

    @property
    def linear_weights(self) -> int:
        return sum(m.inputs * m.outputs * m.count for m in self.linears)

    @property
    def weights(self) -> int:
        """Number of all weights of the model."""
        return self.linear_weights + self.embeddings + self.output + self.others

    @property
    def largest(self) -> int:
        """Number of weights of the largest linear layer."""
        return max(m.inputs * m.outputs for m in self.linears)

    def adapter_weights(self, rank: int, targets: tuple[str, ...] = (), dora: bool = False) -> int:
        """Return the number of weights of a LoRA or DoRA adapter with this rank on the target layers.

        Args:
            targets: names of layers; empty for all.
        """
        adapted = [m for m in self.linears if not targets or m.name in targets]
        return sum((rank * (m.inputs + m.outputs) + dora * m.outputs) * m.count for m in adapted)


def read_shape(base: Base) -> Shape:
    """Return the layer sizes of a base model from its `config.json`, without loading weights.

    Raises:
        InputError: its configuration is invalid.
    """
    config = model_config(Path(base.path), displayed=base.id)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise build_key_error(config, "model_type", "is no name of an architecture, such as llama")
    if kind in LLAMA_LIKE:
        return compute_llama_shape(config)
    if not is_named_in_transformers(kind):
        raise build_key_error(config, "model_type", "is no architecture that the installed transformers has")
    return build_shape(base)


def build_key_error(config: Mapping[str, Any], key: str, problem: str) -> InputError:
    """Return an InputError about a missing or invalid key of a model's `config.json`."""
    problem = problem if key in config else "is missing"
    return InputError(f"config.json, {key}", config.get(key), problem, "Download or save the model again.")


def is_named_in_transformers(kind: str) -> bool:
    """Return whether the installed transformers knows the model type `kind`. Its lists of models are read as text,
    because importing them takes seconds."""
    package = find_spec("transformers")
    lists = Path(package.origin).parent / "models" / "auto" if package and package.origin else None
    return lists is not None and any(f'"{kind}"' in file.read_text(encoding="utf-8") for file in lists.glob("*.py"))


def compute_llama_shape(config: Mapping[str, Any]) -> Shape:
    """Compute the layer sizes of a Llama-like model from its `config.json` and transformers' defaults.

    Raises:
        InputError: a number is missing, has another type, or contradicts another.
    """

    def read_size(key: str, default: int | None = None) -> int:
        size = default if config.get(key) is None else config[key]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise build_key_error(config, key, "is no size: a whole number above 0")
        return size

    def read_flag(key: str) -> bool:
        flag = config.get(key, False)
        if not isinstance(flag, bool):
            raise build_key_error(config, key, "is neither true nor false")
        return flag

    kind = config["model_type"]
    width = read_size("hidden_size")
    layers = read_size("num_hidden_layers")
    mlp = read_size("intermediate_size")
    heads = read_size("num_attention_heads")
    if config.get("head_dim") is None and width % heads:
        problem = f"does not divide hidden_size={width}, and there is no head_dim"
        raise build_key_error(config, "num_attention_heads", problem)
    groups = read_size("num_key_value_heads", GROUPS.get(kind, heads))
    if heads % groups:
        raise build_key_error(config, "num_key_value_heads", f"does not divide num_attention_heads={heads}")
    head = read_size("head_dim", 128 if kind == "qwen3" else width // heads)
    vocabulary = read_size("vocab_size")
    queries = heads * head
    keys = groups * head
    matrices = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, mlp),
        "up_proj": (width, mlp),
        "down_proj": (mlp, width),
    }
    has_bias = read_flag("attention_bias") and kind in ("llama", "qwen3")
    bias = (queries + 2 * keys) * (kind == "qwen2" or has_bias) + width * has_bias  # the latter of o_proj
    bias += (2 * mlp + width) * (read_flag("mlp_bias") and kind == "llama")
    norms = 2 * width + 2 * head * (kind == "qwen3")
    return Shape(
        width,
        layers,
        mlp,
        heads,
        groups,
        head,
        vocabulary,
        read_size("max_position_embeddings", CONTEXTS[kind]),
        tuple(Linear(name, *sizes, layers) for name, sizes in matrices.items()),
        embeddings=vocabulary * width,
        output=0 if read_flag("tie_word_embeddings") else vocabulary * width,
        others=layers * (norms + bias) + width,
    )


def build_shape(base: Base) -> Shape:
    """Compute the layer sizes of any causal model from its modules, which are built on the meta device without weights.

    Raises:
        InputError: the modules cannot be built.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from align.models.load import get_context_length

    try:  # for a model on the hub, only the configuration was downloaded
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path, trust_remote_code=False))
        config = model.config.get_text_config()
        width = int(config.hidden_size)
    except Exception as error:  # a wrong value may raise anything
        problem = "its modules cannot be built, so that nothing is known of its size"
        raise InputError("model.path", base.id, problem, "Use a causal model that transformers knows.") from error
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            counts[name.rpartition(".")[2], inputs, outputs] += 1
    linears = tuple(Linear(*key, count) for key, count in counts.items())
    tied = head is not None and head.weight is embedding.weight
    embeddings = embedding.weight.numel()
    output = 0 if head is None or tied else head.weight.numel()
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    shape = Shape(
        width,
        int(config.num_hidden_layers),
        max((max(m.inputs, m.outputs) for m in linears), default=width),
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(getattr(config, "head_dim", None) or width // heads),
        int(config.vocab_size),
        get_context_length(model),
        linears,
        embeddings,
        output,
        others=0,
        llama=False,
    )
    return replace(shape, others=sum(p.numel() for p in model.parameters()) - shape.weights)
