"""How an export was made and measured, for its card: what the manifests of its runs say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.run.lineage import Step
from align.run.manifest import Input, Manifest

WITHOUT_CRITIC = {"rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++"}
"""`stage.advantage` → what it is called, without a critic."""
SETTINGS = ("learning rate", "trained for", "batch", "weights", "besides")
"""The columns of a card's table of runs, behind the run's name."""


def parents_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The runs of a lineage as `render_card` takes them, each with its settings where its manifest is there."""
    names = [f"{step.stage}/{step.name}" for step in steps]
    return [
        {
            "stage": step.stage, "name": step.name, "digest": step.digest,
            "settings": settings_of(step.manifest, names[:i]) if step.manifest else {},
        }
        for i, step in enumerate(steps)
    ]  # fmt: skip


def settings_of(manifest: Manifest, known: Collection[str] = ()) -> dict[str, str]:
    """How a run trained, a text for each of `SETTINGS`; empty ones are not known.

    Args:
        known: runs, `stage/name`, of which the same is said elsewhere.
    """
    stage, metrics = manifest.config.get("stage", {}), manifest.metrics
    said = {
        "learning rate": rate(stage), "trained for": duration(manifest.stage, stage, metrics),
        "batch": str(stage.get("batch_size", "")), "weights": trained_weights(manifest, known),
        "besides": besides(manifest.stage, manifest.config),
    }  # fmt: skip
    return {name: said[name] for name in SETTINGS}


def trained_weights(manifest: Manifest, known: Collection[str]) -> str:
    """What was trained. A run that goes on with an adapter has that one's settings."""
    init = manifest.inputs.get("init")
    goes_on = init is not None and init.whole is False
    run = f"{init.stage}/{init.name}" if init and goes_on else ""
    of = f"the adapter of {run}" if run in known else weights(manifest.config.get("method", {}))
    return f"a copy of {of}, and a head of scores" if manifest.stage == "reward" and run in known else of


def rate(stage: Mapping[str, Any]) -> str:
    if stage.get("lr") is None:
        return ""
    warmed = f", warm-up {stage['warmup']:.0%}" if stage.get("warmup") else ""
    return f"{stage['lr']:g}" + (f", {stage['schedule']}{warmed}" if stage.get("schedule") else "")


def duration(name: str, stage: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Epochs or updates, and the steps that these were; which of them is published, where that is not the last."""
    if name == "ppo":
        updates, published = stage.get("updates"), metrics.get("published_update")
        which = "" if published in (None, updates) else f", of which update {published} is published"
        return f"{updates} updates of {stage.get('epochs')} passes each{which}"
    steps, published = metrics.get("steps"), metrics.get("published_step")
    parts = [f"{stage['epochs']:g} epochs"] if stage.get("epochs") and not stage.get("max_steps") else []
    parts += [f"{steps} steps"] if steps else []
    parts += [f"of which step {published} is published"] if published not in (None, steps) else []
    return ", ".join(parts)


def weights(method: Mapping[str, Any]) -> str:
    """What was trained: every weight, or an adapter of which kind on which layers."""
    if method.get("name") == "full":
        return "all of the model"
    if "r" not in method:
        return ""
    kinds = [kind for key, kind in (("rslora", "rsLoRA"), ("dora", "DoRA")) if method.get(key)]
    targets = method.get("targets")
    layers = ", ".join(map(str, targets)) if isinstance(targets, Sequence) and not isinstance(targets, str) else ""
    parts = [
        " and ".join(kinds) or "LoRA", "on NF4" if method.get("name") == "qlora" else "",
        f"of rank {method['r']}, alpha {method.get('alpha')}",
        f"dropout {method['dropout']:g}" if method.get("dropout") else "",
    ]  # fmt: skip
    return (
        f"{' '.join(filter(None, parts[:3]))}{', ' + parts[3] if parts[3] else ''}, on {layers or 'all linear layers'}"
    )


def besides(name: str, config: Mapping[str, Any]) -> str:
    """What else decides the result: the price of leaving the start, and how answers were sampled."""
    stage = config.get("stage", {})
    if name in ("dpo", "kto"):
        loss = stage.get("loss", "sigmoid")
        return f"beta {stage.get('beta')}" + ("" if loss == "sigmoid" else f", loss {loss}")
    if name == "ppo":
        return f"{estimator(stage)}KL coefficient {stage.get('kl_coef')}; {sampling(config)}"
    return "packed rows" if stage.get("packing") else ""


def estimator(stage: Mapping[str, Any]) -> str:
    """How advantages were estimated, where that was not by a critic."""
    name, answers = WITHOUT_CRITIC.get(stage.get("advantage", ""), ""), stage.get("group_size") or 1
    return f"advantages by {name}{f' from {answers} answers to each prompt' if answers > 1 else ''}; " if name else ""


def sampling(config: Mapping[str, Any]) -> str:
    """How answers were sampled, and what of them was judged."""
    rollout = config.get("rollout", {})
    hidden = ", their reasoning hidden from whoever judged them" if rollout.get("reasoning") == "hide" else ""
    most = f"at most {rollout.get('max_new_tokens')} tokens"
    return f"answers sampled at temperature {rollout.get('temperature')}, {most}{hidden}"


def measured_on(manifest: Manifest, share: float | None = None) -> str:
    """Which data a run measured on.

    Args:
        share: that was held out of what it trained on; of a file the run's own unless given.
    """
    data, read = manifest.config["data"], manifest.inputs.get("data", Input(""))
    if data.get("eval_path"):
        return Path(data["eval_path"]).name
    held_out = data.get("held_out") if share is None else share
    file = Path(data["path"]).name if data.get("path") else data["name"]
    name = f"annotations {read.project}" if read.project else file
    known = held_out is not None and (data.get("path") or share is not None)
    return f"{held_out:.0%} of {name}, held out" if known else f"the held-out part of {name}"


def system_prompt(steps: Sequence[Step], scores: bool) -> dict[str, str]:
    """The newest system prompt that `data.system` gave the rows of a run, its `text` and the `run`; nothing where none
    had one. `without` is the last run, where that had none.

    Args:
        scores: of a reward model, which its own run alone decides; a policy's reward model does not.
    """
    told = [step for step in steps if step.manifest and (step.stage == "reward") == scores]
    for step in reversed(told[-1:] if scores else told):
        assert step.manifest is not None
        if text := step.manifest.config["data"].get("system"):
            last = told[-1]
            without = {} if step is last else {"without": f"{last.stage}/{last.name}"}
            return {"text": str(text), "run": f"{step.stage}/{step.name}", **without}
    return {}
