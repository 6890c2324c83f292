"""What a reward reads from disk: reward models that earlier runs published, and the files of functions.

A reward is described by a mapping, as `align.config.scorers.build_reward_spec` gives it: `{"name": "learned",
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
from align.models.base import check_same_method
from align.reward.check import Checks
from align.reward.checkers import checks_of
from align.reward.checkers.checked import AllowCode, code_permission
from align.reward.function import FIELD
from align.run import Artifact, Base, Input, file_digest, load_artifact, resolve


def leaves(reward: Mapping[str, Any], field: str = "reward") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every reward that is no combination of others, with the name of its field, in the order of the description."""
    match reward["name"]:
        case "ensemble":
            for i, ref in enumerate(reward["refs"]):
                yield f"{field}.refs[{i}]", {"name": "learned", "ref": ref}
        case "sum":
            for i, part in enumerate(reward["parts"]):
                yield from leaves(part, f"{field}.parts[{i}]")
        case "learned":
            yield f"{field}.ref", reward
        case _:
            yield field, reward


def reward_inputs(
    reward: Mapping[str, Any], root: Path, base: Base | None, policy: Artifact | None = None, method: str = ""
) -> dict[str, Input]:
    """What the reward reads, as inputs of the run: `reward`, `reward.1`, … the reward models; `reward.fn`, … the files
    of functions.

    Args:
        base: of the policy, on which `latest` is looked for; None where there is none.
        policy: what the policy starts from whose base the reward models share; None where each brings its own, as a
            judge does.
        method: that the policy is trained with.

    Raises:
        MissingArtifact: a reward model is not there yet; the message names the command that makes it.
        InputError: something is named that is no reward model, or no function.
    """
    models: list[Input] = []
    files: list[Input] = []
    for field, leaf in leaves(reward):
        if leaf["name"] == "learned":
            models.append(model_at(leaf["ref"], root, base, field, policy, method).as_input())
        elif leaf["name"] == "fn":
            spec = str(leaf["fn"])
            source, made_of = find_module_file(spec, FIELD), find_definitions(load_function(spec, FIELD))
            # Where the function and its parts stand, whichever module it was named by: as files and as contents.
            places = [f"{where}:{name}" for file, name in made_of for where in (file, file_digest(file))]
            digest = file_digest(source) if source else spec
            files.append(Input(digest, ref=spec, details={"defined": places}))
        elif leaf["name"] == "check" and leaf["check"] is not None:
            checks_of(leaf["check"], 1, f"{field}.check", allow_code=permission_of(leaf))
    return {
        **{f"reward.{i}" if i else "reward": r for i, r in enumerate(models)},
        **{f"reward.fn.{i}" if i else "reward.fn": r for i, r in enumerate(files)},
    }


def permission_of(leaf: Mapping[str, Any]) -> AllowCode:
    """Return whether the checks of a reward may run programs that a model wrote."""
    return code_permission(leaf["allow_code"], leaf["unsafe_code"])


def check_rows(reward: Mapping[str, Any], prompts: Sequence[Conversation]) -> None:
    """Raise where the row of a prompt does not say what a reward needs to know of it: `reward=check` needs a check.
    Which columns a function reads, nobody knows before it is called.

    Raises:
        InputError: names the row.
    """
    for _, leaf in leaves(reward):
        if leaf["name"] == "check":
            checks = Checks(leaf["check"], allow_code=permission_of(leaf))
            for prompt in prompts:
                checks.checkers(prompt)


def model_at(ref: str, root: Path, base: Base | None, field: str, policy: Artifact | None, method: str) -> Artifact:
    """A reward model. `latest` means the newest on the policy's base."""
    artifact = resolve(ref, root, base.digest if base and ref.endswith(":latest") else None, field)
    made_by = artifact.manifest.stage if artifact.manifest else "reward"  # a bare folder does not say
    if artifact.whole or made_by != "reward":
        raise InputError(field, ref, "is no reward model", "Name one that stage=reward made, such as reward:latest.")
    if policy is not None and base is not None and on_base([artifact], base):
        check_same_method(artifact, field, policy, method)
    return artifact


def read_alike(models: Sequence[Artifact], reasoning: str, field: str = "rollout.reasoning") -> None:
    """Raise where a reward model would read reasoning that it was never shown.

    Args:
        reasoning: `hide` where answers are scored without it.
        field: the setting that says so.

    Raises:
        InputError: it was trained on answers alone, and whole answers are to be scored.
    """
    for model in models:
        trained = model.manifest.config["data"].get("reasoning") if model.manifest else None
        require(
            trained != "hide" or reasoning == "hide", field, reasoning,
            f"{model.ref} was trained on answers without their reasoning (data.reasoning=hide)",
            f"Write {field}=hide, or score by another reward model.",
        )  # fmt: skip


def models_of(inputs: Mapping[str, Input]) -> list[Artifact]:
    """The reward models that `reward_inputs` wrote down, in its order."""
    named = {int(name.partition(".")[2] or 0): r for name, r in inputs.items() if re.fullmatch(r"reward(\.\d+)?", name)}
    return [load_artifact(Path(named[i].path), named[i].ref) for i in sorted(named)]


def on_base(models: Sequence[Artifact], base: Base) -> list[Artifact]:
    """Those that are adapters on the policy's own base; a bare folder says of none, and is taken for one of them."""
    return [m for m in models if m.base is None or m.base.digest == base.digest]
