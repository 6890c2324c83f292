"""The files that a reward reads: reward models of earlier runs, and the modules of user functions.

A reward is described by a mapping that `align.config.scorers.build_reward_spec` returns: `{"name": "learned",
"ref": …}`, `{"name": "sum", "parts": [{"weight": …, "name": …}, …]}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import InputError, require
from align.core.functions import find_definitions, find_module_file, load_function
from align.core.types import Conversation
from align.models.base import require_same_precision
from align.reward.check import CheckReward
from align.reward.checkers import build_checkers
from align.reward.checkers.checked import AllowCode, combine_code_settings
from align.reward.function import FIELD
from align.run import Artifact, Base, Input, file_digest, load_artifact, resolve


def iter_leaf_rewards(reward: Mapping[str, Any], field: str = "reward") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration key and the settings of each single reward, with ensembles and sums expanded in order."""
    match reward["name"]:
        case "ensemble":
            for i, ref in enumerate(reward["refs"]):
                yield f"{field}.refs[{i}]", {"name": "learned", "ref": ref}
        case "sum":
            for i, part in enumerate(reward["parts"]):
                yield from iter_leaf_rewards(part, f"{field}.parts[{i}]")
        case "learned":
            yield f"{field}.ref", reward
        case _:
            yield field, reward


def resolve_reward_inputs(
    reward: Mapping[str, Any], root: Path, base: Base | None, policy: Artifact | None = None, method: str = ""
) -> dict[str, Input]:
    """Return the reward models and the source files of user functions that a reward reads, as input name → Input.

    These are inputs of a run. Reward models are called `reward`, `reward.1`, …, and files of functions `reward.fn`,
    `reward.fn.1`, ….

    Args:
        base: of the policy; `latest` means the newest reward model on it. None if there is no policy.
        policy: the artifact that the policy starts from, if reward models may share its base. None if each loads its
            own, as a judge does.
        method: that the policy is trained with.

    Raises:
        MissingArtifact: a reward model does not exist yet; the message names the command that makes it.
        InputError: a reference is no reward model, or a function cannot be loaded.
    """
    models: list[Input] = []
    files: list[Input] = []
    for field, leaf in iter_leaf_rewards(reward):
        if leaf["name"] == "learned":
            models.append(resolve_reward_model(leaf["ref"], root, base, field, policy, method).as_input())
        elif leaf["name"] == "fn":
            spec = str(leaf["fn"])
            source = find_module_file(spec, FIELD)
            # The definitions of the function and its parts, by path and by content, however the module is named.
            definitions = [
                f"{file_or_digest}:{name}"
                for file, name in find_definitions(load_function(spec, FIELD))
                for file_or_digest in (file, file_digest(file))
            ]
            digest = file_digest(source) if source else spec
            files.append(Input(digest, ref=spec, details={"defined": definitions}))
        elif leaf["name"] == "check" and leaf["check"] is not None:
            build_checkers(leaf["check"], 1, f"{field}.check", allow_code=get_code_permission(leaf))
    return {
        **{f"reward.{i}" if i else "reward": model for i, model in enumerate(models)},
        **{f"reward.fn.{i}" if i else "reward.fn": file for i, file in enumerate(files)},
    }


def get_code_permission(leaf: Mapping[str, Any]) -> AllowCode:
    """Return whether a reward's checks may run programs that a model wrote: False, True (in a sandbox) or `unsafe`."""
    return combine_code_settings(leaf["allow_code"], leaf["unsafe_code"])


def require_row_checks(reward: Mapping[str, Any], prompts: Sequence[Conversation]) -> None:
    """Raise InputError if `reward=check` is used and a prompt's data set row has no valid check.

    A check in the configuration serves for rows without one. The columns that a function reads are not known before it
    is called.

    Raises:
        InputError: a row has no check, or a wrong one.
    """
    for _, leaf in iter_leaf_rewards(reward):
        if leaf["name"] == "check":
            checks = CheckReward(leaf["check"], allow_code=get_code_permission(leaf))
            for prompt in prompts:
                checks.find_checkers(prompt)


def resolve_reward_model(
    ref: str, root: Path, base: Base | None, field: str, policy: Artifact | None, method: str
) -> Artifact:
    """Resolve a reference such as `reward:latest` to a reward model, or raise InputError for another kind of artifact.

    `latest` means the newest reward model on the policy's base.
    """
    artifact = resolve(ref, root, base.digest if base and ref.endswith(":latest") else None, field)
    stage = artifact.manifest.stage if artifact.manifest else "reward"  # a bare folder passes
    if artifact.whole or stage != "reward":
        raise InputError(field, ref, "is no reward model", "Name one that stage=reward made, such as reward:latest.")
    if policy is not None and base is not None and select_models_on_base([artifact], base):
        require_same_precision(artifact, field, policy, method)
    return artifact


def require_matching_reasoning(models: Sequence[Artifact], reasoning: str, field: str = "rollout.reasoning") -> None:
    """Raise InputError if answers are scored with their reasoning and a reward model was trained on answers without it.

    Args:
        reasoning: `hide` if answers are scored without their reasoning.
        field: the setting that `reasoning` is the value of.

    Raises:
        InputError: a reward model was trained with `data.reasoning=hide`, and whole answers are to be scored.
    """
    for model in models:
        trained_with = model.manifest.config["data"].get("reasoning") if model.manifest else None
        require(
            trained_with != "hide" or reasoning == "hide",
            field,
            reasoning,
            f"{model.ref} was trained on answers without their reasoning (data.reasoning=hide)",
            f"Write {field}=hide, or score by another reward model.",
        )


def load_reward_artifacts(inputs: Mapping[str, Input]) -> list[Artifact]:
    """Return the artifacts of the reward models among a run's inputs (`reward`, `reward.1`, …), in their order."""
    models = {
        int(name.partition(".")[2] or 0): model
        for name, model in inputs.items()
        if re.fullmatch(r"reward(\.\d+)?", name)
    }
    return [load_artifact(Path(model.path), model.ref) for _, model in sorted(models.items())]


def select_models_on_base(models: Sequence[Artifact], base: Base) -> list[Artifact]:
    """Return the reward models whose base model has the same digest as `base`, or that record no base."""
    return [model for model in models if model.base is None or model.base.digest == base.digest]
