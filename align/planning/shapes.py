"""The shape of a model: which matrices it has, and how wide it is. Read from its `config.json`; imports no torch where
the architecture is Llama-like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.run import Base, model_config

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Types whose modules are known here; their decoders have the fast path on a CPU."""
GROUPS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
CONTEXTS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
"""By type, `num_key_value_heads` and `max_position_embeddings` where a `config.json` has none."""


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
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise wrong(config, "model_type", "is no name of an architecture, such as llama")
    if kind in LLAMA_LIKE:
        return llama_shape(config)
    if not named_in_transformers(kind):
        raise wrong(config, "model_type", "is no architecture that the installed transformers has")
    return built_shape(base)


def wrong(config: Mapping[str, Any], key: str, problem: str) -> InputError:
    """What is said of a key of a `config.json`."""
    problem = problem if key in config else "is missing"
    return InputError(f"config.json, {key}", config.get(key), problem, "Download or save the model again.")


def named_in_transformers(kind: str) -> bool:
    """Whether transformers names a type in its lists of models. They are read as text: importing them takes seconds."""
    package = find_spec("transformers")
    lists = Path(package.origin).parent / "models" / "auto" if package and package.origin else None
    return lists is not None and any(f'"{kind}"' in file.read_text(encoding="utf-8") for file in lists.glob("*.py"))


def llama_shape(config: Mapping[str, Any]) -> Shape:
    """Of a Llama-like model, by the numbers of its `config.json`. What that leaves out has transformers' default.

    Raises:
        InputError: one of them is missing, is of another type, or does not go with another.
    """

    def number(key: str, default: int | None = None) -> int:
        found = config.get(key)
        found = default if found is None else found
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise wrong(config, key, "is no size: a whole number above 0")
        return found

    def flag(key: str) -> bool:
        found = config.get(key, False)
        if not isinstance(found, bool):
            raise wrong(config, key, "is neither true nor false")
        return found

    kind = config["model_type"]
    width, layers, mlp = number("hidden_size"), number("num_hidden_layers"), number("intermediate_size")
    heads = number("num_attention_heads")
    if config.get("head_dim") is None and width % heads:
        raise wrong(config, "num_attention_heads", f"does not divide hidden_size={width}, and there is no head_dim")
    groups = number("num_key_value_heads", GROUPS.get(kind, heads))
    if heads % groups:
        raise wrong(config, "num_key_value_heads", f"does not divide num_attention_heads={heads}")
    head = number("head_dim", 128 if kind == "qwen3" else width // heads)
    vocabulary = number("vocab_size")
    inside, shared = heads * head, groups * head
    linears = (
        Linear("q_proj", width, inside, layers), Linear("k_proj", width, shared, layers),
        Linear("v_proj", width, shared, layers), Linear("o_proj", inside, width, layers),
        Linear("gate_proj", width, mlp, layers), Linear("up_proj", width, mlp, layers),
        Linear("down_proj", mlp, width, layers),
    )  # fmt: skip
    everywhere = flag("attention_bias") and kind in ("llama", "qwen3")
    bias = (inside + 2 * shared) * (kind == "qwen2" or everywhere) + width * everywhere  # the latter of o_proj
    bias += (2 * mlp + width) * (flag("mlp_bias") and kind == "llama")
    normed = 2 * head * (kind == "qwen3")
    return Shape(
        width, layers, mlp, heads, groups, head, vocabulary, number("max_position_embeddings", CONTEXTS[kind]), linears,
        embeddings=vocabulary * width, output=0 if flag("tie_word_embeddings") else vocabulary * width,
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
