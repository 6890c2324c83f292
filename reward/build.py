"""The scorer of a description (see `reward.inputs`), out of reward models that are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from align.core.errors import require
from align.core.functions import load_function
from align.data.chat.encode import end_of_turn, stop_token_ids
from align.data.chat.template import use_template
from align.models.adapters import attach
from align.models.base import base_of, choose_method
from align.models.forward import hidden_size
from align.models.load import load_base, load_tokenizer, own_tokenizer
from align.models.roles import Roles, linear_head, score_weight
from align.reward.check import Checks
from align.reward.combined import Ensemble, Sum
from align.reward.function import FIELD, Function
from align.reward.inputs import leaves, on_base, permission_of
from align.reward.learned import LearnedReward, RoleReward
from align.reward.rules import Rules, Sentiment, rule_of
from align.reward.scorer import Scorer
from align.run import Artifact, Base


def build(reward: Mapping[str, Any], made: Iterator[Scorer]) -> Scorer:
    """The scorer of a description.

    Args:
        made: a scorer for each of its reward models, in the order of `leaves`.
    """
    match reward["name"]:
        case "learned":
            return next(made)
        case "ensemble":
            members = tuple(next(made) for _ in reward["refs"])
            return Ensemble(members, reward["combine"], reward["deviations"])
        case "sum":
            return Sum(tuple((float(part["weight"]), build(part, made)) for part in reward["parts"]))
        case "fn":
            return Function(load_function(str(reward["fn"]), FIELD), str(reward["fn"]), reward.get("timeout"))
        case "check":
            return Checks(reward["check"], reward["score"] == "parts", permission_of(reward))
        case "sentiment":
            return Sentiment()
        case "rules":
            return Rules([(float(rule.get("weight", 1.0)), rule_of(rule)) for rule in reward["rules"]])
    raise ValueError(reward["name"])


def build_beside_policy(
    reward: Mapping[str, Any],
    models: Sequence[Artifact],
    roles: Roles,
    base: Base,
    size: int,
    dtype: torch.dtype,
    tokenizer: Any,
) -> Scorer:
    """The scorer of a description beside a policy, on whose base some of its reward models are adapters.

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
        RoleReward(roles, own.index(m), size, end) if m in own else on_its_own_base(m, device, dtype, size)
        for m in models
    )
    return build(reward, made)


def on_its_own_base(artifact: Artifact, device: torch.device, dtype: torch.dtype, size: int) -> LearnedReward:
    """A reward model with a base of its own: it reads text, by its own template and tokenizer."""
    base = base_of(artifact, "reward.ref")
    method = choose_method(artifact, "auto", "reward.ref")
    model = attach(load_base(base, method, device, dtype), artifact.path, "reward", scored=True, alone=True)
    head = linear_head(score_weight(artifact.path, hidden_size(model))).to(device)
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, None)
    stops = stop_token_ids(tokenizer, model.generation_config)
    return LearnedReward(model, head, tokenizer, stops, size, artifact.ref)


def same_template(
    reward: Mapping[str, Any], models: Sequence[Artifact], base: Base, tokenizer: Any, policy: str
) -> None:
    """Refuse a reward model on the policy's base that was trained with another chat template than the policy's: it
    would read the policy's tokens, and nothing that it was trained on looked like them. A folder without a tokenizer
    does not say, and is believed.

    Args:
        models: the reward models in the order of `leaves`.
        tokenizer: the policy's.
        policy: the reference that it starts from.

    Raises:
        InputError: names the reward model.
    """
    named = [(field, leaf["ref"]) for field, leaf in leaves(reward) if leaf["name"] == "learned"]
    own = on_base(models, base)
    for (field, ref), model in zip(named, models, strict=True):
        if model in own and (model.path / "tokenizer_config.json").is_file():
            trained = load_tokenizer(base, model.path).chat_template
            require(
                trained in (None, tokenizer.chat_template), field, ref,
                "was trained with another chat template than the policy speaks by",
                f"Train it from the same supervised adapter, by the same template: stage=reward init={policy}.",
            )  # fmt: skip
