"""The answers of each update of PPO: who draws them, when, and whether that is the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from align import ranks
from align.config.ppo import PpoConfig
from align.config.root import Config
from align.data.chat.encode import Prompt
from align.errors import InputError, require
from align.ops.advantages import equal_groups
from align.ppo.experience import shaped_scores
from align.ppo.sampler import check_gap, in_background, sampler_figures
from align.ppo.schedule import prompt_indices
from align.ppo.state import State
from align.ppo.workers import Answers, Workers, together
from align.rollout.answers_alone import empty
from align.stages.ppo_arguments import shaping_arguments
from align.stages.rollouts import allowed_gap
from align.track import Clock
from align.types import Rollout

Draw = Callable[[], Rollout | None]
LARGEST = 1e15
"""That an answer may earn. Whitening squares it and sums over a batch, in fp32."""


@contextmanager
def at_update(step: int, what: str) -> Iterator[None]:
    """What the user is told of what fails inside says in which update that was, from 1; 0 is before the first.

    Args:
        what: is done there, for the ranks that wait for this one.
    """
    ranks.at(f"update {step}, {what}")
    try:
        yield
    except InputError as error:
        problem = f"{f'update {step}' if step else 'before the first update'}: {error.problem}"
        raise type(error)(error.field, error.value, problem, error.remedy) from error


def by_server(config: Config) -> bool:
    """Whether another than the learner draws the answers."""
    return config.rollout.engine == "vllm"


def prompts_of(workers: Workers, config: Config, number: int, time: int = 0, groups: int | None = None) -> list[Prompt]:
    """The prompts of an update, each as often as it is answered; a function of these numbers alone.

    Args:
        time: how often the update has asked before.
        groups: so many different prompts; all of a batch by default.
    """
    stage: PpoConfig = config.stage
    whole = stage.batch_size // stage.per_prompt
    chosen = prompt_indices(number * stage.max_draws + time, whole, len(workers.prompts), config.seed)
    return [workers.prompts[i] for i in chosen[:groups] for _ in range(stage.per_prompt)]


def drawing(workers: Workers, config: Config, number: int, sampler: tuple[Tensor, ...]) -> Draw:
    """Draws the answers of an update.

    Args:
        sampler: the weights that the policy answers with; empty for those that it has.
    """
    with at_update(number + 1, "rollout"), workers.as_was(sampler):
        made = workers.drawing("policy", prompts_of(workers, config, number), "rollout", number)

    def draw() -> Rollout | None:
        with at_update(number + 1, "rollout"):
            return made()

    return draw


def drawing_ahead(workers: Workers, config: Config, number: int) -> tuple[Draw | None, tuple[Tensor, ...]]:
    """Begin to draw the answers of the update behind this one, while the policy learns; and the weights that they are
    drawn with, which a run that is continued draws them with again. Nothing where each update waits for its own."""
    stage: PpoConfig = config.stage
    if not stage.max_staleness or number + 1 == stage.updates:
        return None, ()
    return in_background(drawing(workers, config, number + 1, ())), workers.policy()


def wait_for(draw: Draw | None, clock: Clock) -> None:
    """Until what was begun is drawn: an engine answers one caller at a time."""
    if draw is not None:
        draw()
        clock.lap("ahead_s")


def roll_out(
    workers: Workers, config: Config, number: int, ahead: Draw | None, state: State, clock: Clock
) -> tuple[Answers, Tensor, dict[str, float]]:
    """The policy's answers to the prompts of an update; a raw score for each [B], and what the scorer says of them.

    Answers to one prompt stand together. Where groups may be drawn again, those whose answers differ in what they earn
    come first, in the order of drawing; groups that do not fill up the batch where no more are drawn.

    Args:
        ahead: what was begun; None where these answers were not.
        state: which weights draw, and on which scale scores are.

    Returns:
        beside the scorer's own figures, with several answers a prompt `equal_groups`, the share of prompts whose
        answers all earned the same, and `draws`, how often the update asked.
    """
    stage: PpoConfig = config.stage
    draw = ahead or drawing(workers, config, number, state.sampler)
    found = [scored_answers(workers, config, number, prompts_of(workers, config, number), draw(), clock)]
    if stage.per_prompt == 1:
        return found[0]
    groups, equal = stage.batch_size // stage.per_prompt, [equal_in(workers, found[0], config, state)]
    while (missing := groups - sum(each.count(False) for each in equal)) and len(found) < stage.max_draws:
        time = len(found)
        prompts = prompts_of(workers, config, number, time, missing)
        with at_update(number + 1, "rollout"):
            drawn = workers.drawing("policy", prompts, "rollout", number, time)()
        found.append(scored_answers(workers, config, number, prompts, drawn, clock))
        equal.append(equal_in(workers, found[-1], config, state))
    says_nothing = [flag for each in equal for flag in each]
    chosen = sorted(range(len(says_nothing)), key=says_nothing.__getitem__)[:groups]  # a stable order
    rows = [group * stage.per_prompt + k for group in chosen for k in range(stage.per_prompt)]
    answers = together([part for part, _, _ in found], workers.tokenizer.pad_token_id)
    raw = torch.cat([scores for _, scores, _ in found])
    figures = mean_figures([(len(scores), own) for _, scores, own in found])
    figures |= {"equal_groups": sum(says_nothing) / len(says_nothing), "draws": float(len(found))}
    if rows == list(range(len(raw))):
        return answers, raw, figures
    return answers.rows(rows), raw[torch.tensor(rows, device=raw.device)], figures


Scored = tuple[Answers, Tensor, dict[str, float]]
"""Answers, a raw score for each [B], and what the scorer says of them."""


def scored_answers(
    workers: Workers, config: Config, number: int, prompts: Sequence[Prompt], drawn: Rollout | None, clock: Clock
) -> Scored:
    """What was drawn, as it is judged."""
    answers = workers.heard(prompts, drawn)
    clock.lap("rollout_s")
    with at_update(number + 1, "scores"):
        raw, figures = workers.score(answers)
    clock.lap("score_s")
    if config.rollout.reasoning == "hide":
        figures = {**figures, "empty_rate": sum(map(empty, answers.read)) / len(answers.read)}
    return answers, raw, figures


def equal_in(workers: Workers, found: Scored, config: Config, state: State) -> list[bool]:
    """Of each prompt, whether its answers all earn the same. All ranks go by what the first one finds: how often they
    ask follows from it."""
    scores_B = shaped(workers, config, *found[:2], state)
    return ranks.from_main(equal_groups(scores_B, config.stage.per_prompt).tolist())


def shaped(workers: Workers, config: Config, answers: Answers, raw_B: Tensor, state: State) -> Tensor:
    """What each answer earns [B], on the scale of `state`.

    Raises:
        InputError: more than can be computed with.
    """
    scores_B = shaped_scores(raw_B, answers.rollout, state.moments, **shaping_arguments(config.stage))
    most = float(scores_B.abs().max())
    require(
        most <= LARGEST, "reward", workers.scorer.name,
        f"gives scores up to ±{float(raw_B.abs().max()):.3g}, so that an answer earns ±{most:.3g}. {LARGEST:g} is the "
        "most: fp32 cannot hold the squares of more",
        "Scale the reward down, or use stage.normalise=once.",
    )  # fmt: skip
    return scores_B


def mean_figures(found: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Of several parts the means, by their answers."""
    total = sum(rows for rows, _ in found)
    return {name: sum(rows * figures[name] for rows, figures in found) / total for name in found[0][1]}


def sampled_by_policy(
    workers: Workers,
    config: Config,
    number: int,
    rollout: Rollout,
    old_logprobs_BT: Tensor,
    sampler: tuple[Tensor, ...],
) -> dict[str, float]:
    """The figures of `sampler_figures`, where a server draws.

    Raises:
        InputError: it does not draw by the policy.
    """
    if not by_server(config):
        return {}
    servers = len(config.rollout.urls) or config.rollout.replicas
    sizes = {"temperature": config.rollout.temperature, "micro_batch": config.stage.micro_batch}
    with at_update(number + 1, "logprobs of the sampler"):
        figures = sampler_figures(workers, rollout, old_logprobs_BT, sampler, servers=servers, **sizes)
        check_gap(figures, allowed_gap(config))
    return figures
