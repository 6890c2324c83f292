"""One worst-case micro-batch of a stage, done for real, and the bytes of tensors that were alive in each phase."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from align.config.root import Config
from align.data.chat.encode import Encoded
from align.data.pairs import Labelled, Pair
from align.models.adapters import save_adapter, with_new_adapter
from align.models.chunks import in_chunks
from align.models.load import DTYPES, load_base, load_classifier, load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles
from align.models.start import frozen_as
from align.planning.live import LiveBytes
from align.planning.workload import Workload
from align.ppo.advantages import Estimator
from align.ppo.experience import estimated, experience
from align.ppo.update import Losses, accumulate, gradient_step
from align.ppo.workers import roles_on
from align.rollout.hf import HfEngine
from align.run import Base
from align.trainers.common import Training, train
from align.trainers.dpo import dpo_trainer
from align.trainers.kto import kto_trainer
from align.trainers.reward import Ranking, reward_trainer
from align.trainers.sft import sft_trainer


def measured(base: Base, work: Workload, training: Training | None, device: torch.device) -> dict[str, int]:
    """Phase → the most bytes of tensors that were alive in it, in the second step: moments are there by then.

    Args:
        work: what is done, on weights as they are and an adapter that is fresh.
        training: how a trainer trains; None for PPO.
    """
    torch.manual_seed(0)
    if work.stage == "ppo":
        return of_ppo(base, work, device)
    assert training is not None
    return of_trainer(base, work, training, device)


def training_of(work: Workload, config: Config) -> Training | None:
    """How the trainer of a stage trains, with activations as the workload says; None for PPO."""
    if work.stage == "ppo":
        return None
    asked = "true" if work.recompute else "false"
    training = replace(Training.of(config.stage, config.seed), gradient_checkpointing=asked, lr=0.0, warmup=0.0)
    return replace(training, max_steps=None, schedule="constant")


@contextmanager
def counted(device: torch.device, *models: nn.Module | None) -> Iterator[Callable[[], int]]:
    """Gives the most that was alive since it was last asked: of a GPU what its allocator says."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        def lap() -> int:
            found = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return found

        yield lap
        return
    with LiveBytes(model for model in models if model is not None) as live:
        yield live.lap


def full_rows(count: int, length: int) -> list[list[int]]:
    """Rows of token ids that part at the first one, or, beyond a hundred rows, at the second: what rows begin with
    alike is computed once, and a plan is of rows that share nothing."""
    return [[1 + i % 100, *[1 + i // 100] * (length - 1)] for i in range(count)]


def fresh(work: Workload) -> Lora:
    return Lora(work.rank, 2 * work.rank, work.dropout, work.targets, dora=work.dora)


def of_ppo(base: Base, work: Workload, device: torch.device) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        init, reward = fresh_adapters(base, work, device, Path(folder))
        roles = roles_on(
            base, init if work.from_adapter else None, [reward] * work.rewards, method=work.method,
            frozen=frozen_as(work.method), fresh=fresh(work), value_backbone=work.value_backbone, device=device,
            dtype=DTYPES[work.dtype], seed=0,
        )  # fmt: skip
    if work.recompute:
        roles.recompute_layers()
    optimiser = torch.optim.AdamW([{"params": roles.parameters_of(role)} for role in roles.trainable], lr=0.0)
    engine = HfEngine((), 0, work.answer, 1.0, work.rollout_rows)
    found: dict[str, int] = {}
    with counted(device, roles.model, roles.policy, roles.value_head, *roles.score_heads) as lap:
        for _ in range(2):
            found = one_update(roles, optimiser, engine, work, lap)
    return found


def fresh_adapters(base: Base, work: Workload, device: torch.device, folder: Path) -> tuple[Path, Path]:
    """Adapters in the places of a supervised one and of a reward model, where these are wanted."""
    wanted = [("init", load_base)] if work.from_adapter else []
    wanted += [("reward", load_classifier)] if work.rewards else []
    for name, load in wanted:
        model = load(base, frozen_as(work.method), device, DTYPES[work.dtype])
        save_adapter(with_new_adapter(model, fresh(work), name == "reward"), folder / name, base)
    return folder / "init", folder / "reward"


def one_update(
    roles: Roles, optimiser: torch.optim.Optimizer, engine: HfEngine, work: Workload, lap: Callable[[], int]
) -> dict[str, int]:
    """One update of PPO on full rows; the most that was alive in each of its phases."""
    lap()
    rows = work.micro_batch * (2 if work.accumulates else 1)
    prompts = full_rows(max(work.rollout_rows, rows), work.prompt)
    rollout = engine.generate(prompts, roles.actor("policy"), range(len(prompts)))
    found = {"rollout": lap()}
    rollout = rollout.rows(torch.arange(rows, device=rollout.tokens_BS.device))
    with torch.no_grad():
        scores = rollout.ended_B.float()
        for member in range(work.rewards):
            scores = in_chunks(partial(roles.scores, member=member), rollout, work.micro_batch)
    minibatches = 1 if work.one_pass else 2
    estimates, cached = estimated(
        roles, rollout, temperature=1.0, micro_batch=work.micro_batch, minibatches=minibatches
    )  # fmt: skip
    estimator = Estimator("gae" if "value" in roles.trainable else "reinforce_pp")
    made, _ = experience(
        rollout, scores, *estimates, estimator=estimator, kl_coef=0.05, kl_in_reward=True, kl_estimator="k1"
    )
    found["estimate"] = lap()
    accumulate(roles, made, cached, micro_batch=work.micro_batch, temperature=1.0, losses=Losses())
    found["update"] = lap()
    gradient_step(roles, optimiser, 1.0)
    found["optimiser"] = lap()
    return found


class Laps(TrainerCallback):
    """What was alive before each optimiser step and in it; of the last step."""

    def __init__(self, lap: Callable[[], int]) -> None:
        self.lap, self.found = lap, dict[str, int]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.lap()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found["update"] = self.lap()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found["optimiser"] = self.lap()


def of_trainer(base: Base, work: Workload, training: Training, device: torch.device) -> dict[str, int]:
    """Two steps of one micro-batch each."""
    dtype, tokenizer = DTYPES[work.dtype], load_tokenizer(base)
    load = load_classifier if work.stage == "reward" else load_base
    model = load(base, work.method, device, dtype)
    if work.method != "full":
        model = with_new_adapter(model, fresh(work), classifier=work.stage == "reward")
    batch = training.micro_batch * (2 if work.accumulates else 1)
    training = replace(training, batch_size=batch, max_steps=2, save_every=100)
    with tempfile.TemporaryDirectory() as folder, counted(device, model) as lap:
        arguments = training.arguments(Path(folder), device, dtype, 2)
        make = partial(trainer_of, work, model, tokenizer, training, arguments)
        laps = Laps(lap)
        train(make, model, laps)
    return laps.found


def trainer_of(work: Workload, model: Any, tokenizer: Any, training: Training, arguments: dict[str, Any]) -> Any:
    """The stage's trainer on full rows, as many as two steps take."""
    start, count = work.length // 2, 2 * training.batch_size
    rows = full_rows(count * work.texts, work.length)
    if work.stage == "dpo":
        pairs = [Pair(chosen, rejected, start, start) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
        return dpo_trainer(model, tokenizer, pairs, arguments, beta=0.1, loss="sigmoid" if work.reference else "simpo")
    if work.stage == "kto":
        labelled = [Labelled(row, start, i % 2 == 0) for i, row in enumerate(rows)]
        return kto_trainer(
            model, tokenizer, labelled, arguments, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
            max_length=work.length,
        )  # fmt: skip
    if work.stage == "reward":
        pairs_of_each = [(0, i) for i in range(1, work.texts)]
        judged = [Ranking(rows[i::count], pairs_of_each) for i in range(count)]
        return reward_trainer(model, tokenizer, judged, arguments)
    encoded = [Encoded(row, row) for row in rows]
    return sft_trainer(model, tokenizer, encoded, arguments, max_length=work.length, packing=False)
