"""Measurement of the peak memory of tensors, in bytes, in two worst-case optimiser steps of a trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align.data.chat.encode import EncodedRow
from align.data.pairs import TokenizedAnswer, TokenizedPair
from align.models.adapters import add_new_adapter
from align.models.load import DTYPES, load_base, load_classifier, load_tokenizer
from align.planning.live_bytes import watch_live_bytes
from align.planning.memory import Workload, build_full_rows
from align.run import Base
from align.trainers.common import Training, train
from align.trainers.dpo import build_dpo_trainer
from align.trainers.kto import build_kto_trainer
from align.trainers.reward import Ranking, build_reward_trainer
from align.trainers.sft import build_sft_trainer


class LiveBytesOfSteps(TrainerCallback):
    """A callback that records the peak bytes of live tensors in each optimiser step, before the update (`update`) and
    in it (`optimiser`). The last step counts."""

    def __init__(self, lap: Callable[[], int]) -> None:
        self.lap = lap
        self.counts: dict[str, int] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.lap()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.counts["update"] = self.lap()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.counts["optimiser"] = self.lap()


def measure_steps(base: Base, work: Workload, training: Training, device: torch.device) -> dict[str, int]:
    """Run two worst-case optimiser steps, and return phase → peak bytes of live tensors in the second one. Only then do
    the optimiser's moments exist.

    Args:
        work: the workload, run on the weights of `base` with a new adapter.
        training: settings of the trainer.
    """
    torch.manual_seed(0)
    dtype = DTYPES[work.dtype]
    tokenizer = load_tokenizer(base)
    load = load_classifier if work.stage == "reward" else load_base
    model = load(base, work.method, device, dtype)
    if work.method != "full":
        model = add_new_adapter(model, work.lora, is_reward_model=work.stage == "reward")
    batch = training.micro_batch * (2 if work.accumulates else 1)
    training = replace(training, batch_size=batch, max_steps=2, save_every=100)
    with tempfile.TemporaryDirectory() as folder, watch_live_bytes(device, model) as lap:
        arguments = training.arguments(Path(folder), device, dtype, 2)
        live = LiveBytesOfSteps(lap)
        train(partial(build_measured_trainer, work, model, tokenizer, training, arguments), model, live)
    return live.counts


def build_measured_trainer(
    work: Workload, model: Any, tokenizer: Any, training: Training, arguments: dict[str, Any]
) -> Any:
    """Build the trainer of the workload's stage on dummy rows of maximum length, enough for two steps."""
    start = work.length // 2
    count = 2 * training.batch_size
    rows = build_full_rows(count * work.texts, work.length)
    if work.stage == "dpo":
        pairs = [TokenizedPair(*ids, start, start) for ids in zip(rows[::2], rows[1::2], strict=True)]
        return build_dpo_trainer(
            model, tokenizer, pairs, arguments, beta=0.1, loss="sigmoid" if work.reference else "simpo"
        )
    if work.stage == "kto":
        labelled = [TokenizedAnswer(row, start, i % 2 == 0) for i, row in enumerate(rows)]
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        return build_kto_trainer(model, tokenizer, labelled, arguments, beta=0.1, max_length=work.length, **weights)
    if work.stage == "reward":
        pairs_of_each = [(0, i) for i in range(1, work.texts)]
        rankings = [Ranking(rows[i::count], pairs_of_each, [1.0] * len(pairs_of_each)) for i in range(count)]
        return build_reward_trainer(model, tokenizer, rankings, arguments)
    encoded = [EncodedRow(row, row) for row in rows]
    return build_sft_trainer(model, tokenizer, encoded, arguments, max_length=work.length, packing=False)
