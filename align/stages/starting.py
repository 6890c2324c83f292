"""What a stage starts from: what `init` or `artifact` names, its base, and the settings that come with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.groups import ALL_LINEAR
from align.config.rates import default_rate, find_size_class
from align.config.root import Config
from align.config.settings import changed
from align.core.errors import InputError, require
from align.models.lora import Lora, settings_in
from align.models.start import start_from
from align.run import Artifact, Base, Input
from align.run.weights import brings_scores, count_weights


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage starts from, resolved once, before the run has a name. A finished run is answered from it, and a
    mistake in a row is found by it: neither waits for torch.

    Attributes:
        config: with what the inputs decide: the method that an adapter belongs to.
        label: the readable part of the run's derived name.
        base: the base weights.
        records: name → what goes in, as the manifest will hold it.
        rows: reads the data. What it returns is passed to the stage's `run` after the run and its configuration.
        again: see `align.run.Run.open`.
        trains: the stage trains on what `rows` returns first.
    """

    config: Config
    label: str
    base: Base | None
    records: dict[str, Input] = field(default_factory=dict)
    rows: Callable[[], tuple[Any, ...]] = tuple
    again: bool = False
    trains: bool = False


def starting_point(config: Config) -> tuple[Artifact, Base, Config]:
    """What the policy starts from, and its base.

    Raises:
        InputError: every weight is to train of what is an adapter.
    """
    artifact, base, config = start(config)
    require(
        config.method.name != "full" or artifact.whole, "method", "full", f"{artifact.ref} is an adapter",
        "Start from a whole model (init=full:latest, base, a folder or hub:ID), or drop method=.",
    )  # fmt: skip
    return artifact, base, config


def start(config: Config, ref: str | None = None, field: str = "init") -> tuple[Artifact, Base, Config]:
    """What a stage starts from, see `align.models.start.start_from`; and the configuration with the method that this
    belongs to and the system prompt that it was trained with.

    Args:
        ref: the reference; None for what the configuration has as `field`.

    Raises:
        InputError: it is a reward model, where the stage is not one that exports it.
    """
    ref = ref if ref is not None else str(getattr(config, field))
    root, model = config.run.folder, config.model
    found = start_from(ref, root, path=model.path, revision=model.revision, method=config.method.name, field=field)
    if config.stage.name != "export" and not found.artifact.whole and brings_scores(found.artifact.path):
        remedy = "Name an adapter of stage=sft, stage=dpo, stage=kto or stage=ppo."
        raise InputError(field, ref, "is a reward model, and no policy", remedy)
    method = changed(config.method, name=found.method)
    if field == "init" and not found.artifact.whole and found.method != "full":
        made = settings_in(found.artifact.path)
        why = f"{found.artifact.ref} is an adapter already, and goes on as it is"
        method.refuse_others(made, why, "Drop it, or start from a whole model.")
        method = changed(method, **carried_on(made, method, found.artifact))
    asked_with = found.artifact.manifest.config["data"].get("system") if found.artifact.manifest else None
    if config.data.system is None and asked_with:  # what was taught under a system prompt is asked under it
        config = changed(config, data=changed(config.data, system=asked_with))
    return found.artifact, found.base, changed(config, method=method)


def carried_on(made: Mapping[str, Any], method: Any, adapter: Artifact) -> dict[str, Any]:
    """The settings of an adapter that a run goes on with, for its manifest. What is of another kind than a setting may
    be (of an adapter that was made elsewhere) stays at its default.

    Args:
        made: see `settings_in`. Its targets are names of layers, which `all-linear` stood for where its run says so.
    """
    found = {key: value for key, value in made.items() if type(value) is type(getattr(method, key))}
    said = adapter.manifest.config["method"].get("targets") if adapter.manifest else None
    targets = ALL_LINEAR if said == ALL_LINEAR else made["targets"]
    return {**found, "targets": targets if isinstance(targets, list) and targets else ALL_LINEAR}


def lora_of(config: Config) -> Lora:
    """How a fresh adapter is made."""
    method, targets = config.method, config.method.targets
    names = () if targets == ALL_LINEAR else tuple(targets)
    return Lora(method.r, method.alpha, method.dropout, names, method.rslora, method.dora)


def fill_rates(config: Config, base: Base | None) -> tuple[Config, str]:
    """Return the configuration with every empty learning rate filled in, and a clause that says where `stage.lr` is
    from. The clause is empty where the command line gave the rate or the stage has none.

    Args:
        base: the base weights; None for a stage without a model.
    """
    weights = None if base is None else count_weights(Path(base.path))
    method = config.method.name
    if config.method.lr is None:
        stage = "full" if method == "full" else "sft"
        config = changed(config, method=changed(config.method, lr=default_rate(stage, method, weights)))
    rates = {"lr": default_rate(config.stage.name, method, weights)}
    if config.stage.name in ("ppo", "verify"):
        rates["value_lr"] = default_rate("value", method, weights)
    empty = {key: rate for key, rate in rates.items() if rate is not None and getattr(config.stage, key) is None}
    if not empty:
        return config, ""
    config = changed(config, stage=changed(config.stage, **empty))
    return config, f"default for {find_size_class(weights).title}" if "lr" in empty else ""
