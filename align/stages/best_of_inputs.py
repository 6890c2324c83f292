"""What best-of-n reads besides its policy and its prompts: the reward that ranks, and the one that measures."""

from __future__ import annotations

from collections.abc import Mapping

from align.config.root import Config, plain
from align.config.scorers import reward_spec
from align.config.settings import changed
from align.core.errors import InputError
from align.evals.judges import identities, title
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.run import Artifact, Base, Input

GOLD = "gold."
"""What the names of the second reward's inputs begin with."""


def best_of_inputs(config: Config, policy: Artifact, base: Base) -> dict[str, Input]:
    """The models and functions of both rewards, as inputs of the run.

    Raises:
        MissingArtifact: a reward model is not there yet.
        InputError: something is no reward, or what measures also ranks.
    """
    root = config.run.folder
    ranks = reward_inputs(reward_spec(config.reward), root, base, policy, config.method.name)
    read_alike(models_of(ranks), config.rollout.reasoning)
    if config.stage.gold is None:
        return ranks
    measured_by = config.stage.measured_by()
    measures = reward_inputs(reward_spec(measured_by), root, base)
    read_alike(models_of(measures), config.rollout.reasoning)
    gold = plain(changed(config, reward=measured_by))["reward"]
    if identities(gold, measures) & identities(plain(config)["reward"], ranks):
        problem = "also ranks the answers: its score of the best one says nothing of quality"
        raise InputError("stage.gold", title(gold, measures), problem, "Measure by another reward, or drop it.")
    return {**ranks, **{f"{GOLD}{name}": read for name, read in measures.items()}}


def of_gold(inputs: Mapping[str, Input]) -> dict[str, Input]:
    """The inputs of the second reward, by the names that a reward's have."""
    return {name.removeprefix(GOLD): read for name, read in inputs.items() if name.startswith(GOLD)}
