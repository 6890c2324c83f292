"""What the stages share that learn from preferences: their inputs, their rows, and the policy of DPO and KTO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.root import Config, store_url
from align.config.training import held_out_for
from align.core.errors import require
from align.data.pairs import divided_judgements, divided_pairs, pairs_records, prepared, read_pairs
from align.models.start import adapter_folder, label
from align.run import Artifact, Run
from align.stages.rows import source_of
from align.stages.starting import Inputs, lora_of, start

if TYPE_CHECKING:
    import torch


def preference_inputs(config: Config, rows: Callable[[Config], tuple[Any, ...]]) -> Inputs:
    """Return the inputs of a stage that learns from judgements: pairs, or answers with a label."""
    artifact, base, config = start(config)
    records = {"init": artifact.as_input(), **pairs_records(source_of(config), store_url(config), config.project)}
    return Inputs(config, label(base, config.method.name), base, records, partial(rows, config), trains=True)


def pairs_of(config: Config) -> tuple[Any, ...]:
    """Return preference pairs to train on, and those to measure on."""
    source = source_of(config)
    prefs = read_pairs(source, store_url(config), config.project, config.data.allow_simulated, config.seed)
    both = divided_pairs(prefs, source, config.stage.held_out, config.seed)
    held_out_for(config.stage.eval_every, len(both[1]), "stage.held_out")
    return tuple([prepared(pref, source) for pref in side] for side in both)


def judgements_of(config: Config) -> tuple[Any, ...]:
    """Return answers with a label to train on and to measure on, or preference pairs if the data has these."""
    both = divided_judgements(
        source_of(config), store_url(config), config.project, config.data.allow_simulated, config.stage.held_out,
        config.seed,
    )  # fmt: skip
    held_out_for(config.stage.eval_every, len(both[1]), "stage.held_out")
    return both


def load_policy(
    config: Config, run: Run, artifact: Artifact, device: torch.device, dtype: torch.dtype, referenced: bool
) -> Any:
    """Load the model whose adapter `default` trains, and print what its reference costs.

    Args:
        artifact: what it starts from.
        referenced: the loss compares it with its start.

    Raises:
        InputError: TRL would read other logits than the model's.
    """
    import torch

    from align.models.adapters import attach, with_new_adapter
    from align.models.load import load_base
    from align.models.plain_path import route_of
    from align.trainers.common import reference_in_words

    model = load_base(run.base, config.method.name, device, dtype)
    adapter = adapter_folder(artifact)
    name = config.stage.name
    require(
        route_of(model).halves,
        "stage",
        name,
        f"type {model.config.model_type} has logits that are more than a head on hidden states, which TRL's "
        f"{name.upper()} reads",
        "Use stage=reward and stage=ppo.",
    )
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    if adapter is None:
        model = with_new_adapter(model, lora_of(config))
    else:
        model = attach(model, adapter, "default", trainable=True)
    print(reference_in_words(model, referenced))
    return model
