"""What a configuration does at once, for `align.planning`: read off it without torch, and without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align import ranks
from align.config.groups import ALL_LINEAR
from align.config.root import Config
from align.config.scorers import reward_spec
from align.config.settings import changed
from align.core.errors import InputError, MissingArtifact
from align.core.files import user_path
from align.data.chat.encode import prompt_room
from align.models.architectures import refuse
from align.models.base import BUILT_IN, find_base
from align.models.lora import settings_in
from align.models.start import BASE, adapter_folder, method_of
from align.planning.memory import footprint
from align.planning.shapes import Shape, shape_of
from align.planning.workload import Workload
from align.reward.inputs import leaves, models_of, on_base
from align.run import Artifact, Base, Run, artifact_in, hub_config, model_config, resolve
from align.track import device_in_use

MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
"""Optimiser → bytes for each weight that it trains."""
TEXTS = {"reward": 2, "dpo": 2}
"""Texts of a pair."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan starts from.

    Attributes:
        config: with the method and the adapter's settings that it goes on with.
        from_adapter: it starts from an adapter.
        rewards: reward models on its base.
        notes: what is taken for granted.
    """

    config: Config
    base: Base
    from_adapter: bool
    rewards: int
    notes: tuple[str, ...]


def planned(config: Config) -> Planned:
    """What a run of this configuration would start from: what is there, or what its commands would make.

    Raises:
        InputError: a model or a reference that cannot be read, or a method that contradicts what is there.
    """
    root, notes = config.run.folder, list[str]()
    artifact = None if config.init == BASE else found(config.init, root, "init")
    if artifact is None:
        base, method = located(config), config.method.name
        method = "qlora" if method == "auto" else method
        adapter = config.init != BASE and method != "full" and config.stage.name != "full"
        if config.init != BASE:
            what = "an adapter of the settings of method=" if adapter else "the base itself"
            notes.append(f"init={config.init} is not there yet: planned from {what}")
    else:
        method, adapter = method_of(artifact, config.method.name, "init"), adapter_folder(artifact) is not None
        base = located(config) if config.model.path else (artifact.base or located(config))
        base = replace(base, path=str(artifact.path)) if artifact.whole else base
    settled = changed(config.method, name=method)
    if artifact is not None and adapter:
        settled = changed(settled, **adapter_settings(settings_in(artifact.path)))
    config = changed(config, method=settled)
    rewards = 0
    if config.stage.name == "ppo":
        for field, leaf in leaves(reward_spec(config.reward)):
            if leaf["name"] == "learned":
                model = found(leaf["ref"], root, field)
                beside = model is None or model.base is None or not base.digest or model.base.digest == base.digest
                rewards += beside
                notes += [] if beside else [f"{field}={leaf['ref']} is on a base of its own, which is not counted"]
    return Planned(config, base, adapter, rewards, tuple(notes))


def gpu_here() -> bool:
    """Whether this machine has an NVIDIA GPU, asked without torch, whose import takes longer than all the rest."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def found(ref: str, root: Path, field: str) -> Artifact | None:
    """What a reference names; None where it is not there yet."""
    try:
        return resolve(ref, root, None, field)
    except MissingArtifact:
        return None


def adapter_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a saved adapter that say how large it is."""
    kept = {"r": made["r"]} if isinstance(made["r"], int) else {}
    return kept | ({"targets": made["targets"]} if isinstance(made["targets"], list) else {})


def located(config: Config) -> Base:
    """The base that `model=` names: its `config.json`, and no weights. From the hub nothing else is fetched.

    Raises:
        InputError: there is none.
    """
    name, revision = config.model.path or "pocket", config.model.revision
    folder = user_path(name, "model.path")
    if name in BUILT_IN or (name.startswith((".", "/", "~")) and not folder.is_dir()):
        return find_base(name, revision)  # which says what is wrong
    if not folder.is_dir():
        folder = hub_config(name, revision, "model.path")
    refuse(model_config(folder, "model.path", name), name)
    return Base(name, str(folder.absolute()), revision, "")


def workload_of(config: Config, shape: Shape, from_adapter: bool, rewards: int, cuda: bool) -> Workload:
    """The worst that a stage does at once.

    Args:
        config: whose method is settled.
        cuda: whether it runs on a GPU.
    """
    stage, method, data = config.stage, config.method, config.data
    dtype = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    asked = stage.gradient_checkpointing
    targets = () if method.targets == ALL_LINEAR else tuple(method.targets)
    work = Workload(
        stage.name, method.name, dtype, cuda, stage.micro_batch, min(data.max_length, shape.context),
        step=stage.batch_size, rank=method.r, targets=targets, dora=method.dora, from_adapter=from_adapter,
        recompute=cuda if asked == "auto" else asked == "true", rewards=rewards,
        ranks=(config.devices or 1) if ranks.alone() else ranks.world(),
    )  # fmt: skip
    if stage.name == "ppo":
        return of_ppo(config, shape, work)
    optimiser = ("paged_adamw_8bit" if cuda else "adamw") if stage.optimiser == "auto" else stage.optimiser
    texts = getattr(stage, "answers", 2) if stage.name == "reward" else TEXTS.get(stage.name, 1)
    supervised = stage.name in ("sft", "full")
    reference = stage.name == "kto" or getattr(stage, "has_reference", False)
    return replace(
        work, texts=texts, reference=reference, moments=MOMENTS[optimiser], packing=supervised and stage.packing,
        dropout=method.dropout if supervised and method.name != "full" else 0.0,
    )  # fmt: skip


def of_ppo(config: Config, shape: Shape, work: Workload) -> Workload:
    stage, rollout = config.stage, config.rollout
    prompt = prompt_room(shape.context, config.data.max_length, rollout.max_new_tokens)
    step = stage.batch_size // stage.minibatches
    together = max(stage.batch_size, stage.normalise_on, stage.eval_prompts if stage.eval_every else 0)
    return replace(
        work, micro_batch=min(stage.micro_batch, step), step=step, prompt=prompt,
        length=prompt + rollout.max_new_tokens, value_backbone=stage.value_backbone if stage.has_critic else "none",
        rollout_rows=min(rollout.batch_size, together),
        whole_batch=stage.minibatches == 1, bank=rollout.engine == "bank", remote=rollout.engine == "vllm",
        keeps_best=bool(stage.eval_every) and stage.publish == "best",
    )  # fmt: skip


def predicted_peak(config: Config, run: Run, longest: int, texts: int = 0) -> dict[str, float]:
    """For a run's figures, beside what it held: what its tensors were predicted to take, in MiB. Nothing of a model
    whose sizes cannot be told.

    Args:
        config: of the run, settled.
        longest: tokens of the longest row that it trains on; of PPO, of the longest prompt.
        texts: of a row, where `Workload.texts` does not know.
    """
    init = run.inputs.get("init")
    adapter = init is not None and init.ref != BASE and not artifact_in(Path(init.path), init.ref).whole
    rewards = len(on_base(models_of(run.inputs), run.base)) if config.stage.name == "ppo" else 0
    try:
        shape = shape_of(run.base)
        work = workload_of(config, shape, adapter, rewards, device_in_use() == "cuda")
    except InputError:
        return {}
    work = replace(work, length=longest + work.answer if work.prompt else longest, texts=texts or work.texts)
    work = replace(work, prompt=longest if work.prompt else 0)
    return {"predicted_peak_mb": round(footprint(shape, work).peak / 2**20, 1)}
