"""The objects that a PPO run works with: model roles on one base, the sampling engine, the scorer and the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.data.chat.encode import Prompt
from align.models.load import load_base
from align.models.lora import Lora
from align.models.roles import Role, Roles
from align.ops.moments import Moments
from align.reward.combined import score_with_diagnostics, standardise_members
from align.reward.scorer import Scorer, require_finite_scores
from align.rollout.distributed import DistributedEngine
from align.rollout.engine import Engine, concatenate_rollouts, decode_responses, derive_row_seeds
from align.rollout.strip_reasoning import JudgedAnswers, read_whole_answers
from align.run import Base


class Answers(NamedTuple):
    """Prompts and the answers that one role, such as the policy, gave to them.

    Attributes:
        rollout: the answers as tokens.
        texts: the answers as the role wrote them.
        judged: the answers as the scorer reads them, which may leave out reasoning.
    """

    prompts: Sequence[Prompt]
    rollout: Rollout
    texts: list[str]
    judged: JudgedAnswers

    @property
    def conversations(self) -> list[Conversation]:
        """The prompts with their answers as the scorer reads them, one conversation for each answer."""
        return self.judged.conversations

    @property
    def judged_texts(self) -> list[str]:
        return [conversation.messages[-1].content for conversation in self.conversations]

    def rows(self, index: Sequence[int]) -> Answers:
        """Return the answers at the given row indices, in this order."""
        rows_B = torch.tensor(index, device=self.rollout.tokens_BS.device)
        conversations, judged_rollout, reasoning = self.judged
        judged = JudgedAnswers(
            [conversations[i] for i in index],
            judged_rollout.rows(rows_B.to(judged_rollout.tokens_BS.device)),
            [reasoning[i] for i in index],
        )
        prompts = [self.prompts[i] for i in index]
        return Answers(prompts, self.rollout.rows(rows_B), [self.texts[i] for i in index], judged)


def join_answers(parts: Sequence[Answers], pad_id: int) -> Answers:
    """Concatenate several batches of answers, with shorter token rows padded by `pad_id`."""
    if len(parts) == 1:
        return parts[0]

    def join_rollouts(rollouts: list[Rollout]) -> Rollout:
        return concatenate_rollouts(rollouts, torch.arange(rows, device=rollouts[0].tokens_BS.device), pad_id)

    rows = sum(len(part.prompts) for part in parts)
    judged = JudgedAnswers(
        [conversation for part in parts for conversation in part.conversations],
        join_rollouts([part.judged.rollout for part in parts]),
        [reasoning for part in parts for reasoning in part.judged.reasoning],
    )
    return Answers(
        [prompt for part in parts for prompt in part.prompts],
        join_rollouts([part.rollout for part in parts]),
        [text for part in parts for text in part.texts],
        judged,
    )


ReadAnswers = Callable[[Sequence[Prompt], list[str], Rollout], JudgedAnswers]


@dataclass(frozen=True)
class Workers:
    """The models, sampling engine, scorer and prompts of a PPO run.

    Attributes:
        prompts: the training prompts.
        held_out: prompts that are measured and never trained on; empty without `stage.eval_every`.
        seed: of the run.
        naming_role: returns a context that names the role in errors about its samples.
        read: turns answers, as texts and tokens, into what the scorer reads.
    """

    tokenizer: Any
    roles: Roles
    engine: Engine
    scorer: Scorer
    prompts: list[Prompt]
    held_out: list[Prompt]
    seed: int
    naming_role: Callable[[Role], AbstractContextManager[None]]
    read: ReadAnswers = read_whole_answers

    def sample(self, role: Role, prompts: Sequence[Prompt], *where: str | int) -> Answers:
        """Sample one answer to each prompt from a role, such as the policy or the reference.

        Args:
            where: the place in the run. Each place has its own random draws.
        """
        return self.collect_answers(prompts, self.start_sampling(role, prompts, *where)())

    @property
    def server_ranks(self) -> DistributedEngine | None:
        """The engine if it sends requests to servers from the first rank only, else None."""
        engine = self.engine
        return engine if isinstance(engine, DistributedEngine) and engine.first_rank_only else None

    def start_sampling(self, role: Role, prompts: Sequence[Prompt], *where: str | int) -> Callable[[], Rollout | None]:
        """Give the engine the role's current weights, and return a function that samples one answer to each prompt as
        tokens.

        If the engine has weights of its own, the call may come later and from another thread. It returns None on a rank
        that asks no server.
        """
        actor = self.roles.actor(role)
        seeds = derive_row_seeds(range(len(prompts)), self.seed, *where)
        with self.naming_role(role):
            self.engine.sync(actor)
        generate = self.engine.generate if self.server_ranks is None else self.server_ranks.generate_on_first_rank

        def sample_tokens() -> Rollout | None:
            with self.naming_role(role):
                return generate([prompt.input_ids for prompt in prompts], actor, seeds)

        return sample_tokens

    def collect_answers(self, prompts: Sequence[Prompt], rollout: Rollout | None) -> Answers:
        """Decode a rollout's tokens to answer texts, and return them with the conversations that the scorer reads. If
        only the first rank asks servers, the other ranks receive its rollout.

        Args:
            rollout: None on a rank that asks no server.
        """
        if self.server_ranks is not None:
            rollout = self.server_ranks.broadcast_rollout(rollout)
        assert rollout is not None, "this engine samples on every rank"
        rollout = rollout.to(self.roles.device)
        texts = decode_responses(rollout, self.tokenizer)
        return Answers(prompts, rollout, texts, self.read(prompts, texts, rollout))

    def score(self, answers: Answers) -> tuple[Tensor, dict[str, float]]:
        """Score answers with the reward, and return the raw scores [B], on the device of the rollout, and the scorer's
        metrics. Raises InputError if a score is not finite."""
        scores, figures = score_with_diagnostics(self.scorer, answers.conversations, answers.judged.rollout)
        require_finite_scores(scores, self.scorer.name)
        return scores.to(answers.rollout.tokens_BS.device), figures

    def calibrate_scorer(self, answers: Answers) -> tuple[Workers, Moments]:
        """Put the scores of an ensemble's members on one scale computed from these answers, and return new workers with
        that scorer.

        Returns:
            workers with that scorer, and the moments of its scores for these answers.
        """
        workers = replace(self, scorer=standardise_members(self.scorer, answers.conversations, answers.judged.rollout))
        return workers, Moments.from_values(workers.score(answers)[0])

    def copy_policy_weights(self) -> tuple[Tensor, ...]:
        """Return a CPU copy of the policy's trained weights, in the order of its parameters."""
        return tuple(p.detach().to("cpu", copy=True) for p in self.roles.parameters_of("policy"))

    @contextmanager
    def using_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Replace the policy's trained weights by `weights` while the `with` block runs; an empty sequence changes
        nothing.

        Graphs that were made outside of the block stay valid.
        """
        replaced = list(zip(self.roles.parameters_of("policy"), weights, strict=True)) if weights else []
        present = [parameter.data for parameter, _ in replaced]
        try:
            for parameter, weight in replaced:
                parameter.data = weight.to(parameter.device)
            yield
        finally:
            for (parameter, _), weight in zip(replaced, present, strict=True):
                parameter.data = weight

    @torch.no_grad()
    def restore_policy(self, weights: Sequence[Tensor]) -> None:
        """Copy `weights` into the policy's trained parameters in place, in the order of the parameters."""
        for parameter, weight in zip(self.roles.parameters_of("policy"), weights, strict=True):
            parameter.copy_(weight)


def split_prompts(
    prompts: Sequence[Prompt], own_held_out: Sequence[Prompt], held_out_count: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training prompts and at most `held_out_count` held-out prompts, with no prompt in both.

    A held-out prompt is not trained on, even if a file repeats it.

    Args:
        own_held_out: prompts of a file of their own; if it is empty, the last of `prompts` are held out.

    Raises:
        InputError: no prompt is left to train on.
    """
    if not own_held_out:
        problem = f"leaves none of {len(prompts)} prompts to train on"
        require(len(prompts) > held_out_count, "stage.eval_prompts", held_out_count, problem, "Hold out fewer prompts.")
    held_out = list(own_held_out[:held_out_count] if own_held_out else prompts[len(prompts) - held_out_count :])
    measured = {prompt.conversation.messages for prompt in held_out}
    training = [prompt for prompt in prompts if prompt.conversation.messages not in measured]
    require(
        bool(training),
        "stage.eval_prompts",
        held_out_count,
        "leaves no other prompt to train on",
        "Hold out fewer prompts.",
    )
    return training, held_out


def build_roles(
    base: Base,
    init: Path | None,
    rewards: Sequence[Path],
    *,
    method: str,
    frozen_method: str,
    fresh: Lora,
    value_backbone: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Roles:
    """Load the policy, reference, value and reward models of a PPO run as roles. They are adapters on one base. Under
    `method=full`, the policy is a model of its own, and the other roles are adapters on a frozen copy of its start.

    Args:
        init, rewards, fresh, value_backbone: see `Roles`.
        frozen_method: the method by which the frozen base is loaded.
    """
    policy = load_base(base, "full", device, dtype) if method == "full" else None
    frozen_base = load_base(base, frozen_method, device, dtype)
    torch.manual_seed(seed)  # a fresh adapter's lora_A is random
    roles = Roles(frozen_base, init, rewards, fresh, value_backbone, policy, None if dtype == torch.float32 else dtype)
    if method == "qlora":
        assert roles.count_quantised_layers() > 0, "the base is not NF4"
    return roles
