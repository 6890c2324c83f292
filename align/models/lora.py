"""How a fresh LoRA adapter is made: on which layers, of what rank and scale (Hu et al., 2021). Imports no torch until a
model is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.errors import InputError
from align.run import json_object
from align.run.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig

STATE_SPACE = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")
NO_LORA = {name: ["out_proj", "conv1d", "dt_proj"] for name in STATE_SPACE} | {
    "deepseek_v4": ["o_a_proj"], "llama4": ["router"], "llama4_text": ["router"], "phimoe": ["router"]
}  # fmt: skip
"""Linear layers that bear no adapter, by model type: a forward or a kernel reads their weight past the layer, so that
an adapter would do nothing until it is merged (PEFT refuses the first two on five of these types); or the layer is
more than a matrix: several in one, a router that gives several tensors."""
OF_A_RUN = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type", "peft_version",
    "revision", "runtime_config", "task_type",
)  # fmt: skip
"""Keys of a saved configuration that say where and how the adapter was made, and not what it computes."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A fresh adapter.

    Attributes:
        r: rank.
        alpha: what it adds is multiplied by alpha / r.
        dropout: share of its inputs that training leaves out. Supervised training alone has any: what is scored or
            compared elsewhere must be the policy that samples.
        targets: the names of layers; none for every linear layer but the head.
        rslora: multiply by alpha / √r (Kalajdzievski, "A rank stabilization scaling factor", 2023).
        dora: train the norms of the weights' columns apart (Liu et al., "DoRA", 2024).
    """

    r: int
    alpha: int
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    @classmethod
    def of(cls, settings: Any) -> Lora:
        """Return a fresh adapter of the settings of the group `method`, whose targets are a list of names, or one word
        for all linear layers."""
        targets = () if isinstance(settings.targets, str) else tuple(settings.targets)
        return cls(settings.r, settings.alpha, settings.dropout, targets, settings.rslora, settings.dora)

    def config(self, model: Any, classifier: bool = False) -> LoraConfig:
        """PEFT's configuration of it on a model. `SEQ_CLS` makes PEFT train and save the `score` head beside it.

        Raises:
            InputError: a name is that of no layer that can bear an adapter.
        """
        from peft import LoraConfig, TaskType

        none = NO_LORA.get(getattr(getattr(model, "config", None), "model_type", ""), [])
        check_targets(model, self.targets, none)
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, use_rslora=self.rslora, use_dora=self.dora,
            target_modules=list(self.targets) or "all-linear",
            exclude_modules=none or None,
            task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraLike:
    """A fresh adapter of the shape of another one, whoever made that: a reward model starts from the weights of the
    supervised adapter.

    Attributes:
        saved: the other's `adapter_config.json`.
    """

    saved: Mapping[str, Any]

    def config(self, model: Any, classifier: bool = False) -> LoraConfig:
        from peft import LoraConfig, TaskType

        known = LoraConfig.__dataclass_fields__.keys() - set(OF_A_RUN)
        kept = {key: value for key, value in self.saved.items() if key in known and value is not None}
        kind = TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM
        return LoraConfig(**kept, task_type=kind)


def settings_in(folder: Path) -> dict[str, Any]:
    """What a saved adapter was made with, by the names of the group `method`.

    Raises:
        CorruptFile: its configuration cannot be read.
    """
    saved = json_object(folder / ADAPTER_CONFIG, "init", "Train or download the adapter again.")
    names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
    targets = saved.get("target_modules")
    return {
        **{ours: saved.get(theirs) for ours, theirs in names.items()},
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
    }


def check_targets(model: Any, targets: tuple[str, ...], none: list[str]) -> None:
    """Raises: InputError: a name is that of no linear layer, or of one that bears no adapter.

    Args:
        none: the names of layers that bear none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)))
    # Of a layer that has an adapter already the base is its own, and the factors are none.
    linear = {n.removesuffix(".base_layer") for n, layer in layers if layer is not head and ".lora_" not in n}
    can = sorted({name.rpartition(".")[2] for name in linear} - set(none) - {"score"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear) or target in none:
            problem = "is no linear layer of this model that can bear an adapter (the head bears none)"
            raise InputError("method.targets", target, problem, f"It has: {', '.join(can)}.")
