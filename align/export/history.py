"""Training history for an export's model card, computed from the manifests of the runs in its lineage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.run.lineage import LineageStep
from align.run.manifest import Input, Manifest

WITHOUT_CRITIC = {"rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++"}
"""`stage.advantage` → display name of an advantage estimator that needs no critic."""
SETTINGS = ("learning rate", "trained for", "batch", "weights", "besides")
"""Columns of the table of runs in a model card, after the run's name."""


def list_lineage_runs(steps: Sequence[LineageStep]) -> list[dict[str, Any]]:
    """Return one mapping per run of a lineage for the model card, with its stage, name, digest and training
    settings."""
    names = [f"{step.stage}/{step.name}" for step in steps]
    return [
        {
            "stage": step.stage,
            "name": step.name,
            "digest": step.digest,
            "settings": describe_settings(step.manifest, names[:i]) if step.manifest else {},
        }
        for i, step in enumerate(steps)
    ]


def describe_settings(manifest: Manifest, shown_runs: Collection[str] = ()) -> dict[str, str]:
    """Return a mapping from each of `SETTINGS`, such as `learning rate`, to a text about a run, from its manifest. A
    text is empty if unknown.

    Args:
        shown_runs: runs, `stage/name`, whose adapter settings the card shows elsewhere.
    """
    stage = manifest.config.get("stage", {})
    texts = (
        describe_learning_rate(stage),
        describe_duration(manifest.stage, stage, manifest.metrics),
        str(stage.get("batch_size", "")),
        describe_weights(manifest, shown_runs),
        describe_other_settings(manifest.stage, manifest.config),
    )
    return dict(zip(SETTINGS, texts, strict=True))


def describe_weights(manifest: Manifest, shown_runs: Collection[str]) -> str:
    """Describe the weights that a run trained, such as `LoRA of rank 8, alpha 16, on all linear layers`, for a model
    card.

    If the run continued the adapter of a shown run, that run is named instead.
    """
    init = manifest.inputs.get("init")
    run = f"{init.stage}/{init.name}" if init and init.whole is False else ""
    if run not in shown_runs:
        return describe_method(manifest.config.get("method", {}))
    if manifest.stage == "reward":
        return f"a copy of the adapter of {run}, and a head of scores"
    return f"the adapter of {run}"


def describe_learning_rate(stage: Mapping[str, Any]) -> str:
    if stage.get("lr") is None:
        return ""
    warmup = f", warm-up {stage['warmup']:.0%}" if stage.get("warmup") else ""
    return f"{stage['lr']:g}" + (f", {stage['schedule']}{warmup}" if stage.get("schedule") else "")


def describe_duration(name: str, stage: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Describe how long a run trained, such as `2 epochs, 400 steps`, and the published step or update if it is not the
    last."""
    if name == "ppo":
        updates = stage.get("updates")
        published = metrics.get("published_update")
        note = "" if published in (None, updates) else f", of which update {published} is published"
        return f"{updates} updates of {stage.get('epochs')} passes each{note}"
    steps = metrics.get("steps")
    published = metrics.get("published_step")
    parts = []
    if stage.get("epochs") and not stage.get("max_steps"):
        parts.append(f"{stage['epochs']:g} epochs")
    if steps:
        parts.append(f"{steps} steps")
    if published not in (None, steps):
        parts.append(f"of which step {published} is published")
    return ", ".join(parts)


def describe_method(method: Mapping[str, Any]) -> str:
    """Describe the trained weights by a method's settings: the whole model, or the kind, rank and layers of an
    adapter."""
    if method.get("name") == "full":
        return "all of the model"
    if "r" not in method:
        return ""
    kinds = [kind for key, kind in (("rslora", "rsLoRA"), ("dora", "DoRA")) if method.get(key)]
    targets = method.get("targets")
    layers = ", ".join(map(str, targets)) if isinstance(targets, Sequence) and not isinstance(targets, str) else ""
    text = " and ".join(kinds) or "LoRA"
    if method.get("name") == "qlora":
        text += " on NF4"
    text += f" of rank {method['r']}, alpha {method.get('alpha')}"
    if method.get("dropout"):
        text += f", dropout {method['dropout']:g}"
    return f"{text}, on {layers or 'all linear layers'}"


def describe_other_settings(name: str, config: Mapping[str, Any]) -> str:
    """Describe the most important other settings of a run, such as DPO's beta, or PPO's KL coefficient and sampling.

    Returns an empty text if none exist.
    """
    stage = config.get("stage", {})
    if name in ("dpo", "kto"):
        loss = stage.get("loss", "sigmoid")
        return f"beta {stage.get('beta')}" + ("" if loss == "sigmoid" else f", loss {loss}")
    if name == "ppo":
        return f"{describe_estimator(stage)}KL coefficient {stage.get('kl_coef')}; {describe_sampling(config)}"
    return "packed rows" if stage.get("packing") else ""


def describe_estimator(stage: Mapping[str, Any]) -> str:
    """Describe the advantage estimator of a PPO stage without a critic, or return an empty text if it has one."""
    name = WITHOUT_CRITIC.get(stage.get("advantage", ""))
    if not name:
        return ""
    answers = stage.get("group_size") or 1
    return f"advantages by {name}{f' from {answers} answers to each prompt' if answers > 1 else ''}; "


def describe_sampling(config: Mapping[str, Any]) -> str:
    """Describe how a PPO run sampled answers: temperature, maximum tokens, and whether the reasoning was hidden from
    the reward."""
    rollout = config.get("rollout", {})
    hidden = ", their reasoning hidden from the reward" if rollout.get("reasoning") == "hide" else ""
    limit = f"at most {rollout.get('max_new_tokens')} tokens"
    return f"answers sampled at temperature {rollout.get('temperature')}, {limit}{hidden}"


def describe_data(manifest: Manifest, held_out_share: float | None = None) -> str:
    """Describe the held-out data that a run was measured on, such as `10% of chats.jsonl, held out`.

    Args:
        held_out_share: held-out share of the training data; by default, for a file, the run's own.
    """
    data = manifest.config["data"]
    if data.get("eval_path"):
        return Path(data["eval_path"]).name
    project = manifest.inputs.get("data", Input("")).project
    file = Path(data["path"]).name if data.get("path") else data["name"]
    name = f"annotations {project}" if project else file
    if held_out_share is None and data.get("path"):
        held_out_share = data.get("held_out")
    return f"the held-out part of {name}" if held_out_share is None else f"{held_out_share:.0%} of {name}, held out"


def find_system_prompt(steps: Sequence[LineageStep], is_reward_model: bool) -> dict[str, str]:
    """Return the newest system prompt that `data.system` gave the runs of a lineage, with the run's name, or an empty
    mapping.

    Its `text` and `run` are returned, and as `without` the last run, if that had none.

    Args:
        is_reward_model: for a reward model, whose own run alone counts. For a policy, runs of reward models do not
            count.
    """
    relevant = [step for step in steps if step.manifest and (step.stage == "reward") == is_reward_model]
    for step in reversed(relevant[-1:] if is_reward_model else relevant):
        assert step.manifest is not None
        if text := step.manifest.config["data"].get("system"):
            last = relevant[-1]
            without = {} if step is last else {"without": f"{last.stage}/{last.name}"}
            return {"text": str(text), "run": f"{step.stage}/{step.name}", **without}
    return {}
