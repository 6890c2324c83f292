"""What a stage that samples and scores answers reads before any weights: who answers, the prompts, the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from align.config.root import Config
from align.config.scorers import reward_spec
from align.core.types import Conversation
from align.data.chat.encode import Prompt, encode_prompts, prompt_room, stop_token_ids
from align.data.chat.template import use_template
from align.models.load import context_length, describe, own_tokenizer
from align.ppo.workers import Read
from align.reward.build import same_template
from align.reward.inputs import models_of
from align.rollout.strip_reasoning import answers_alone, whole
from align.run import Artifact, Run
from align.stages.starting import start


class Asked(NamedTuple):
    """Attributes:
    policy: what answers, or what it starts from.
    prompts: as the policy is asked them.
    room: the most tokens of a prompt.
    dropped: how many prompts are longer.
    reward: its description.
    models: the reward models among the run's inputs.
    """

    policy: Artifact
    tokenizer: Any
    prompts: list[Prompt]
    room: int
    dropped: int
    reward: Mapping[str, Any]
    models: list[Artifact]


def asked(run: Run, config: Config, prompts: Sequence[Conversation]) -> Asked:
    """See the head of this file.

    Raises:
        InputError: a reward model on the policy's base was trained with another chat template.
    """
    base, policy = run.base, start(config, run.inputs["init"].path)[0]
    tokenizer = own_tokenizer(policy, base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    reward, models = reward_spec(config.reward), models_of(run.inputs)
    same_template(reward, models, base, tokenizer, config.init)
    room = prompt_room(context_length(describe(base)), config.data.max_length, config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts, room)
    return Asked(policy, tokenizer, found, room, dropped, reward, models)


def reading(config: Config, tokenizer: Any, generation_config: Any) -> Read:
    """What whoever scores reads of answers: all of them, or without their reasoning (`rollout.reasoning=hide`)."""
    if config.rollout.reasoning != "hide":
        return whole
    return partial(answers_alone, tokenizer=tokenizer, stops=stop_token_ids(tokenizer, generation_config))
