"""Build the scorer that a reward's description (see `align.reward.inputs`) asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from align.core.errors import require
from align.core.functions import load_function
from align.data.chat.encode import find_stop_token_ids, find_turn_end_token
from align.data.chat.template import set_chat_template
from align.models.adapters import attach_adapter
from align.models.base import choose_method, find_base_of_artifact
from align.models.forward import get_hidden_size
from align.models.load import load_base, load_own_tokenizer, load_tokenizer
from align.models.roles import Roles, build_linear_head, read_score_weight
from align.reward.check import CheckReward
from align.reward.combined import Ensemble, Sum
from align.reward.function import FIELD, FunctionReward
from align.reward.inputs import get_code_permission, iter_leaf_rewards, select_models_on_base
from align.reward.learned import LearnedReward, RoleReward
from align.reward.rules import Rules, Sentiment, build_rule
from align.reward.scorer import Scorer
from align.run import Artifact, Base


def build_scorer(reward: Mapping[str, Any], learned: Iterator[Scorer]) -> Scorer:
    """Build the scorer that the `reward` section of a configuration describes, with reward models from `learned`.

    Args:
        learned: the scorers of its reward models, in the order of `iter_leaf_rewards`; the used ones are consumed.
    """
    match reward["name"]:
        case "learned":
            return next(learned)
        case "ensemble":
            members = tuple(next(learned) for _ in reward["refs"])
            return Ensemble(members, reward["combine"], reward["deviations"])
        case "sum":
            return Sum(tuple((float(part["weight"]), build_scorer(part, learned)) for part in reward["parts"]))
        case "fn":
            return FunctionReward(load_function(str(reward["fn"]), FIELD), str(reward["fn"]), reward.get("timeout"))
        case "check":
            return CheckReward(reward["check"], reward["score"] == "parts", get_code_permission(reward))
        case "sentiment":
            return Sentiment()
        case "rules":
            return Rules([(float(rule.get("weight", 1.0)), build_rule(rule)) for rule in reward["rules"]])
    raise ValueError(reward["name"])


def build_scorer_for_policy(
    reward: Mapping[str, Any],
    models: Sequence[Artifact],
    roles: Roles,
    base: Base,
    batch_size: int,
    dtype: torch.dtype,
    tokenizer: Any,
) -> Scorer:
    """Build the scorer that the `reward` section describes for training a policy, with reward models in `roles` reused.

    Reward models on the policy's base are adapters in `roles`; the others are loaded with bases of their own.

    Args:
        models: the reward models in the order of `iter_leaf_rewards`.
        roles: holds the adapters of the reward models on `base`, in that order.
        batch_size: rows of a forward pass of a reward model.
        tokenizer: of the policy. Reward models on its base were trained with its chat template.
    """
    on_base = select_models_on_base(models, base)
    device = next(roles.model.parameters()).device
    end_token_id = find_turn_end_token(tokenizer) if on_base else None
    learned = (
        RoleReward(roles, on_base.index(model), batch_size, end_token_id)
        if model in on_base
        else load_reward_model(model, device, dtype, batch_size)
        for model in models
    )
    return build_scorer(reward, learned)


def load_reward_model(artifact: Artifact, device: torch.device, dtype: torch.dtype, batch_size: int) -> LearnedReward:
    """Load a reward model's base with its adapter, score head, chat template and tokenizer, ready to score."""
    base = find_base_of_artifact(artifact, "reward.ref")
    method = choose_method(artifact, "auto", "reward.ref")
    model = attach_adapter(
        load_base(base, method, device, dtype), artifact.path, "reward", is_reward_model=True, is_only_adapter=True
    )
    head = build_linear_head(read_score_weight(artifact.path, get_hidden_size(model))).to(device)
    tokenizer = load_own_tokenizer(artifact, base)
    set_chat_template(tokenizer, None)
    stops = find_stop_token_ids(tokenizer, model.generation_config)
    return LearnedReward(model, head, tokenizer, stops, batch_size, artifact.ref)


def require_same_template(
    reward: Mapping[str, Any], models: Sequence[Artifact], base: Base, tokenizer: Any, policy: str
) -> None:
    """Raise InputError if a reward model on the policy's base was trained with another chat template than the policy's.

    Such a model reads the policy's tokens. A folder without a tokenizer or a template passes.

    Args:
        models: the reward models in the order of `iter_leaf_rewards`.
        tokenizer: of the policy.
        policy: the reference that the policy starts from.

    Raises:
        InputError: a reward model was trained with another template.
    """
    fields = [(field, leaf["ref"]) for field, leaf in iter_leaf_rewards(reward) if leaf["name"] == "learned"]
    on_base = select_models_on_base(models, base)
    for (field, ref), model in zip(fields, models, strict=True):
        if model in on_base and (model.path / "tokenizer_config.json").is_file():
            template = load_tokenizer(base, model.path).chat_template
            require(
                template in (None, tokenizer.chat_template),
                field,
                ref,
                "was trained with a chat template that differs from the policy's",
                f"Train it from the same supervised adapter, with the same template: stage=reward init={policy}.",
            )
