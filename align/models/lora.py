"""Settings of a new LoRA adapter (Hu et al., 2021). Imports torch only when they are applied to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.errors import InputError
from align.run import read_json_object
from align.run.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig

STATE_SPACE = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")
NO_LORA = {
    **{name: ["out_proj", "conv1d", "dt_proj"] for name in STATE_SPACE},
    "deepseek_v4": ["o_a_proj"],
    "llama4": ["router"],
    "llama4_text": ["router"],
    "phimoe": ["router"],
}
"""Names of linear layers that cannot have an adapter, by model type. A forward or a kernel reads their weight directly,
so that an adapter would have no effect until it is merged (PEFT refuses the first two on five of these types); or the
layer is more than one matrix, such as a router that returns several tensors."""
RUN_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
"""Keys of a saved adapter configuration that record how the adapter was trained, and not what it computes."""


@dataclass(frozen=True, slots=True)
class Lora:
    """The settings of a new LoRA adapter: rank, alpha, dropout and target layers.

    Attributes:
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: dropout of its inputs in supervised training. Other stages have none, because the scored policy must be
            the one that was sampled.
        targets: names of layers; empty for every linear layer except the head.
        rslora: multiply by alpha / √r instead (Kalajdzievski, "A rank stabilization scaling factor", 2023).
        dora: train the norms of the weights' columns separately (Liu et al., "DoRA", 2024).
    """

    r: int
    alpha: int
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    @classmethod
    def from_settings(cls, settings: Any) -> Lora:
        """Build the settings from the config group `method`, whose `targets` are a list of names, or a string for all
        linear layers."""
        targets = () if isinstance(settings.targets, str) else tuple(settings.targets)
        return cls(settings.r, settings.alpha, settings.dropout, targets, settings.rslora, settings.dora)

    def config(self, model: Any, is_reward_model: bool = False) -> LoraConfig:
        """Return PEFT's LoraConfig for a model with these settings, without layers that cannot have an adapter.

        Args:
            is_reward_model: whether PEFT trains and saves the `score` head too (`SEQ_CLS`).

        Raises:
            InputError: a target is not a layer that can have an adapter.
        """
        from peft import LoraConfig, TaskType

        excluded = NO_LORA.get(getattr(getattr(model, "config", None), "model_type", ""), [])
        require_adaptable_targets(model, self.targets, excluded)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=list(self.targets) or "all-linear",
            exclude_modules=excluded or None,
            task_type=TaskType.SEQ_CLS if is_reward_model else TaskType.CAUSAL_LM,
        )


@dataclass(frozen=True, slots=True)
class LoraLike:
    """The settings of a new adapter with the rank and targets of a saved one. A reward model starts from the weights of
    the supervised adapter.

    Attributes:
        saved: content of the saved adapter's `adapter_config.json`.
    """

    saved: Mapping[str, Any]

    def config(self, model: Any, is_reward_model: bool = False) -> LoraConfig:
        from peft import LoraConfig, TaskType

        keys = LoraConfig.__dataclass_fields__.keys() - RUN_KEYS
        shape = {key: value for key, value in self.saved.items() if key in keys and value is not None}
        return LoraConfig(**shape, task_type=TaskType.SEQ_CLS if is_reward_model else TaskType.CAUSAL_LM)


def read_saved_settings(folder: Path) -> dict[str, Any]:
    """Read rank, alpha, dropout, targets and variants of a saved adapter, under their names in the config group
    `method`.

    Raises:
        CorruptFile: its configuration cannot be read.
    """
    saved = read_json_object(folder / ADAPTER_CONFIG, "init", "Train or download the adapter again.")
    targets = saved.get("target_modules")
    return {
        "r": saved.get("r"),
        "alpha": saved.get("lora_alpha"),
        "dropout": saved.get("lora_dropout"),
        "rslora": saved.get("use_rslora"),
        "dora": saved.get("use_dora"),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
    }


def require_adaptable_targets(model: Any, targets: tuple[str, ...], excluded: list[str]) -> None:
    """Raise InputError if a target is not a linear layer of the model, or is one that cannot have an adapter.

    Args:
        excluded: names of layers that cannot have an adapter.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)))
    # In a model with adapters, a layer is its `base_layer`; the LoRA factors are skipped.
    linear = {n.removesuffix(".base_layer") for n, layer in layers if layer is not head and ".lora_" not in n}
    possible = sorted({name.rpartition(".")[2] for name in linear} - set(excluded) - {"score"})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear) or target in excluded:
            problem = "is no linear layer of this model that can bear an adapter (the head bears none)"
            raise InputError("method.targets", target, problem, f"It has: {', '.join(possible)}.")
