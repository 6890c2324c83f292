"""The answers of each update of PPO: who draws them, when, and whether that is the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from align import ranks
from align.config.ppo import PpoConfig
from align.config.root import Config
from align.errors import InputError
from align.ppo.sampler import check_gap, in_background, sampler_figures
from align.ppo.schedule import prompt_indices
from align.ppo.workers import Answers, Workers
from align.rollout.answers_alone import empty
from align.stages.rollouts import allowed_gap
from align.track import Clock
from align.types import Rollout

Draw = Callable[[], Rollout | None]


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


def drawing(workers: Workers, config: Config, number: int, sampler: tuple[Tensor, ...]) -> Draw:
    """Draws the answers of an update.

    Args:
        sampler: the weights that the policy answers with; empty for those that it has.
    """
    chosen = prompt_indices(number, config.stage.batch_size, len(workers.prompts), config.seed)
    with at_update(number + 1, "rollout"), workers.as_was(sampler):
        made = workers.drawing("policy", [workers.prompts[i] for i in chosen], "rollout", number)

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
    workers: Workers, config: Config, number: int, ahead: Draw | None, sampler: tuple[Tensor, ...], clock: Clock
) -> tuple[Answers, Tensor, dict[str, float]]:
    """The policy's answers to the prompts of an update; a raw score for each [B], and what the scorer says of them.

    Args:
        ahead: what was begun; None where these answers were not.
        sampler: see `drawing`.
    """
    draw = ahead or drawing(workers, config, number, sampler)
    chosen = prompt_indices(number, config.stage.batch_size, len(workers.prompts), config.seed)
    answers = workers.heard([workers.prompts[i] for i in chosen], draw())
    clock.lap("rollout_s")
    with at_update(number + 1, "scores"):
        raw, figures = workers.score(answers)
    if config.rollout.reasoning == "hide":
        figures = {**figures, "empty_rate": sum(map(empty, answers.read)) / len(answers.read)}
    return answers, raw, figures


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
