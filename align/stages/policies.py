"""The policy of a stage that learns from preferences: the supervised adapter, or a fresh one on a whole model."""

from __future__ import annotations

from typing import Any

import torch

from align.config.root import Config
from align.errors import require
from align.models.adapters import attach, with_new_adapter
from align.models.load import load_base
from align.models.plain_path import route_of
from align.models.start import adapter_folder
from align.run import Artifact, Run
from align.stages.starting import lora_of
from align.trainers.common import reference_in_words


def policy_of(
    config: Config, run: Run, artifact: Artifact, device: torch.device, dtype: torch.dtype, referenced: bool
) -> Any:
    """The model whose adapter `default` trains; prints what its reference costs.

    Args:
        artifact: what it starts from.
        referenced: the loss compares it with its start.

    Raises:
        InputError: TRL would read other logits than the model's.
    """
    model, adapter = load_base(run.base, config.method.name, device, dtype), adapter_folder(artifact)
    name = config.stage.name
    require(
        route_of(model).halves, "stage", name,
        f"type {model.config.model_type} has logits that are more than a head on hidden states, which TRL's "
        f"{name.upper()} reads", "Use stage=reward and stage=ppo.",
    )  # fmt: skip
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    if adapter is None:
        model = with_new_adapter(model, lora_of(config))
    else:
        model = attach(model, adapter, "default", trainable=True)
    print(reference_in_words(model, referenced))
    return model
