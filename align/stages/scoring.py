"""What `reward=` says, as a scorer: what PPO optimises, or what judges."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.root import Config
from align.config.scorers import (
    EnsembleReward,
    FunctionReward,
    LearnedReward,
    RewardConfig,
    RulesReward,
    SentimentReward,
    SumReward,
    parts_of,
)
from align.data.chat import end_of_turn, stop_token_ids
from align.errors import InputError, require
from align.models.adapters import attach
from align.models.backbone import hidden_size
from align.models.base import base_of
from align.models.load import load_base, load_tokenizer
from align.models.roles import Roles, linear_head, score_weight
from align.run import Artifact, Base, Input, artifact_in, file_digest, resolve
from align.stages.start import method_of, tokenizer_of
from reward import learned
from reward.combined import Ensemble, Sum
from reward.function import Function, defined, load_function, source_of
from reward.rules import Rules, Sentiment, rule_of
from reward.scorer import Scorer


def leaves(config: RewardConfig, field: str = "reward") -> Iterator[tuple[str, RewardConfig]]:
    """Every reward that is no combination of others, with the name of its field, in the order of the configuration."""
    if isinstance(config, EnsembleReward):
        for i, ref in enumerate(config.refs):
            yield f"{field}.refs[{i}]", LearnedReward(ref=ref)
    elif isinstance(config, SumReward):
        for i, (_, part) in enumerate(parts_of(config)):
            yield from leaves(part, f"{field}.parts[{i}]")
    else:
        yield f"{field}.ref" if isinstance(config, LearnedReward) else field, config


def records(config: RewardConfig, root: Path, base: Base, method: str | None) -> dict[str, Input]:
    """What the reward reads, as inputs of the run: `reward`, `reward.1`, … the reward models; `reward.fn`, … the files
    of functions.

    Args:
        method: of the policy whose base the reward models share; None where each brings its own, as a judge does.

    Raises:
        MissingArtifact: a reward model is not there yet; the message names the command that makes it.
        InputError: something is named that is no reward model, or no function.
    """
    models: list[Input] = []
    files: list[Input] = []
    for field, leaf in leaves(config):
        if isinstance(leaf, LearnedReward):
            models.append(model_at(leaf.ref, root, base, method, field).as_input())
        elif isinstance(leaf, FunctionReward):
            source, made_of = source_of(str(leaf.fn)), defined(load_function(str(leaf.fn)))
            # Where the function and its parts stand, whichever module it was named by: as files and as contents.
            places = [f"{where}:{name}" for file, name in made_of for where in (file, file_digest(file))]
            digest = file_digest(source) if source else str(leaf.fn)
            files.append(Input(digest, ref=str(leaf.fn), details={"defined": places}))
    return {
        **{f"reward.{i}" if i else "reward": r for i, r in enumerate(models)},
        **{f"reward.fn.{i}" if i else "reward.fn": r for i, r in enumerate(files)},
    }


def model_at(ref: str, root: Path, base: Base, method: str | None, field: str) -> Artifact:
    """A reward model. `latest` means the newest on the policy's base."""
    artifact = resolve(ref, root, base.digest if ref.endswith(":latest") else None, field)
    made_by = artifact.manifest.stage if artifact.manifest else "reward"  # a bare folder does not say
    if artifact.whole or made_by != "reward":
        raise InputError(field, ref, "is no reward model", "Name one that stage=reward made, such as reward:latest.")
    if method is not None and on_base([artifact], base):
        method_of(artifact, method, field)
    return artifact


def models_of(inputs: Mapping[str, Input]) -> list[Artifact]:
    """The reward models that `records` wrote down, in its order."""
    named = {int(name.partition(".")[2] or 0): r for name, r in inputs.items() if re.fullmatch(r"reward(\.\d+)?", name)}
    return [artifact_in(Path(named[i].path), named[i].ref) for i in sorted(named)]


def on_base(models: Sequence[Artifact], base: Base) -> list[Artifact]:
    """Those that are adapters on the policy's own base; a bare folder says of none, and is taken for one of them."""
    return [m for m in models if m.base is None or m.base.digest == base.digest]


def same_template(config: Config, models: Sequence[Artifact], base: Base, tokenizer: Any) -> None:
    """Refuse a reward model on the policy's base that was trained with another chat template than the policy's: it
    would read the policy's tokens, and nothing that it was trained on looked like them. A folder without a tokenizer
    does not say, and is believed.

    Args:
        models: the reward models in the order of `leaves`.
        tokenizer: the policy's.

    Raises:
        InputError: names the reward model.
    """
    named = [(field, leaf.ref) for field, leaf in leaves(config.reward) if isinstance(leaf, LearnedReward)]
    own = on_base(models, base)
    for (field, ref), model in zip(named, models, strict=True):
        if model in own and (model.path / "tokenizer_config.json").is_file():
            trained = load_tokenizer(base, model.path).chat_template
            require(
                trained in (None, tokenizer.chat_template), field, ref,
                "was trained with another chat template than the policy speaks by",
                f"Train it from the same supervised adapter, by the same template: stage=reward init={config.init}.",
            )  # fmt: skip


def scorer(
    config: RewardConfig,
    models: Sequence[Artifact],
    roles: Roles,
    base: Base,
    size: int,
    dtype: torch.dtype,
    tokenizer: Any,
) -> Scorer:
    """The scorer of a configuration.

    Args:
        models: the reward models in the order of `leaves`.
        roles: hold those among them that are adapters on `base`, in that order.
        size: rows a pass.
        tokenizer: the policy's, whose chat template those are trained with too.
    """
    own = on_base(models, base)
    device = next(roles.model.parameters()).device
    end = end_of_turn(tokenizer) if own else None
    made = (
        learned.RoleReward(roles, own.index(m), size, end) if m in own else foreign(m, device, dtype, size)
        for m in models
    )
    return built(config, made)


def built(config: RewardConfig, made: Iterator[Scorer]) -> Scorer:
    """The scorer of a configuration out of the reward models `made`, in the order of `leaves`."""

    def build(part: RewardConfig) -> Scorer:
        match part:
            case LearnedReward():
                return next(made)
            case EnsembleReward():
                return Ensemble(tuple(next(made) for _ in part.refs), part.combine, part.deviations)
            case SumReward():
                return Sum(tuple((weight, build(inner)) for weight, inner in parts_of(part)))
            case FunctionReward():
                return Function(load_function(str(part.fn)), str(part.fn))
            case SentimentReward():
                return Sentiment()
            case RulesReward():
                return Rules([(float(rule.get("weight", 1.0)), rule_of(rule)) for rule in part.rules])
        raise ValueError(part.name)

    return build(config)


def foreign(artifact: Artifact, device: torch.device, dtype: torch.dtype, size: int) -> learned.LearnedReward:
    """A reward model on another base than the policy's: it reads text, by its own template and tokenizer."""
    base = base_of(artifact, "reward.ref")
    method = method_of(artifact, "auto", "reward.ref")
    model = attach(load_base(base, method, device, dtype), artifact.path, "reward", scored=True, alone=True)
    head = linear_head(score_weight(artifact.path, hidden_size(model))).to(device)
    tokenizer = tokenizer_of(artifact, base)
    stops = stop_token_ids(tokenizer, model.generation_config)
    return learned.LearnedReward(model, head, tokenizer, stops, size, artifact.ref)
