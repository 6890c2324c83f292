"""The work of the comparison: batches of three length distributions, what all contestants share, and their report."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

ROOT = Path(__file__).resolve().parents[2]
IGNORED = -100
POOL_BATCHES = 50
"""Batches of the set of rows that the trained batches are taken from."""
NO_LR = 1e-12
RESULT = "RESULT "


@dataclass(frozen=True)
class Lengths:
    """A distribution of row lengths: log-normal for prompts and for completions, each between two bounds.

    Attributes:
        prompt_median, completion_median: in tokens.
        sigma: standard deviation of the logarithm; 0.02 keeps nearly all rows at one length.
        longest: tokens of a row at most.
    """

    prompt_median: int
    completion_median: int
    sigma: float
    longest: int = 1024


DISTRIBUTIONS = {
    "uniform": Lengths(32, 80, 0.02),
    "chat-like": Lengths(24, 64, 0.8),
    "long-tailed": Lengths(12, 32, 1.3),
}


@dataclass(frozen=True)
class Work:
    """One run of one contestant.

    Attributes:
        model: folder of a chat model.
        distribution: a key of `DISTRIBUTIONS`.
        steps, batch, micro_batch: optimiser steps, rows of each, and rows of one pass.
        warm_up: rows that are trained on before the clock starts, at a learning rate that changes nothing.
        held_out: rows on which the loss is measured before and after.
        rank, alpha, lr, warmup: LoRA and the learning rate, the same for all.
        dtype: of the weights.
        threads: of the process.
        seed: of the adapter's start and of the order of rows.
        kept_memory: peers keep freed memory as `stage=sft` does.
    """

    model: str
    distribution: str
    steps: int = 12
    batch: int = 16
    micro_batch: int = 8
    warm_up: int = 8
    held_out: int = 24
    rank: int = 16
    alpha: int = 32
    lr: float = 6e-4
    warmup: float = 0.03
    dtype: str = "bfloat16"
    threads: int = 1
    seed: int = 0
    kept_memory: bool = False


Row = dict[str, list[int]]
"""A tokenised row: `input_ids` and `labels`."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run. Those that are trained on are in the order of the batches."""

    trained: list[Row]
    warm_up: list[Row]
    held_out: list[Row]


def build_rows(work: Work, tokenizer: Any) -> Rows:
    """Return the rows of a run, the same for every contestant and in the same order.

    A row is a user's turn and an assistant's turn of consecutive text out of this project's documentation. Labels are
    set on the assistant's turn alone. The batches are those that transformers' sampler by length makes of a set of
    `POOL_BATCHES` batches; the trained ones are evenly spaced among them by length.
    """
    pages = sorted((ROOT / "docs").glob("*.md"))
    text_ids = tokenizer("\n".join(page.read_text(encoding="utf-8") for page in pages))["input_ids"]
    draw = random.Random(f"{work.distribution} {work.seed}")
    lengths = DISTRIBUTIONS[work.distribution]
    prefix_ids = tokenizer("<|im_start|>user\n")["input_ids"]
    between_ids = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    suffix_ids = tokenizer("<|im_end|>\n")["input_ids"]
    room = lengths.longest - len(prefix_ids) - len(between_ids) - len(suffix_ids)
    position = 0

    def next_row() -> dict[str, list[int]]:
        nonlocal position
        prompt, completion = (
            max(4, round(median * draw.lognormvariate(0, lengths.sigma)))
            for median in (lengths.prompt_median, lengths.completion_median)
        )
        prompt = min(prompt, room // 2)
        completion = min(completion, room - prompt)
        if position + prompt + completion > len(text_ids):
            position = 0
        row_ids = text_ids[position : position + prompt + completion]
        position += prompt + completion
        prompt_ids = [*prefix_ids, *row_ids[:prompt], *between_ids]
        completion_ids = [*row_ids[prompt:], *suffix_ids]
        return {
            "input_ids": prompt_ids + completion_ids,
            "labels": [IGNORED] * len(prompt_ids) + completion_ids,
        }

    held_out = [next_row() for _ in range(work.held_out)]
    warm_up = [next_row() for _ in range(work.warm_up)]
    pool = [next_row() for _ in range(POOL_BATCHES * work.batch)]
    order = get_length_grouped_indices(
        [len(row["input_ids"]) for row in pool], work.batch, generator=torch.Generator().manual_seed(work.seed)
    )
    batches = [[pool[i] for i in order[start : start + work.batch]] for start in range(0, len(order), work.batch)]
    batches.sort(key=lambda batch: sum(len(row["input_ids"]) for row in batch))
    trained_batches = [batches[int((number + 0.5) / work.steps * POOL_BATCHES)] for number in range(work.steps)]
    draw.shuffle(trained_batches)
    return Rows([row for batch in trained_batches for row in batch], warm_up, held_out)


@torch.no_grad()
def measure_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of the labelled tokens, by the model's own forward on one row at a time."""
    was_training = model.training
    model.eval()
    total = 0.0
    count = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        count += int((targets != IGNORED).sum())
    model.train(was_training)
    return total / count


class StepClock(TrainerCallback):
    """Processor seconds and wall seconds of each optimiser step, and the loss that the trainer logged."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def mark(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def run_contestant(
    works: list[Work],
    load: Callable[[Work], tuple[Any, Any]],
    fit: Callable[[Any, Any, list[Row], Work, float], StepClock],
) -> None:
    """Do each piece of work with a model of its own, and print the figures in a line that `run.py` reads.

    Args:
        load: returns the model with a fresh adapter, and the tokenizer.
        fit: trains on the rows in their order at a learning rate, and returns the times of the steps.
    """
    results = []
    for work in works:
        torch.set_num_threads(work.threads)
        model, tokenizer = load(work)
        rows = build_rows(work, tokenizer)
        loss_before = measure_loss(model, rows.held_out)
        fit(model, tokenizer, rows.warm_up, work, NO_LR)
        clock = fit(model, tokenizer, rows.trained, work, work.lr)
        loss_after = measure_loss(model, rows.held_out)
        tokens = sum(len(row["input_ids"]) for row in rows.trained)
        processor_seconds = clock.marks[-1][0] - clock.marks[0][0]
        wall_seconds = clock.marks[-1][1] - clock.marks[0][1]
        results.append(
            {
                "tokens_per_cpu_s": tokens / processor_seconds,
                "tokens": tokens,
                "longest": max(len(row["input_ids"]) for row in rows.trained),
                "cpu_s": processor_seconds,
                "wall_s": wall_seconds,
                "steps": len(clock.losses),
                "train_losses": clock.losses,
                "loss_before": loss_before,
                "loss_after": loss_after,
            }
        )
    print(RESULT + json.dumps(results), flush=True)


def read_works() -> list[Work]:
    """Return the work that the last argument of this process describes."""
    return [Work(**fields) for fields in json.loads(sys.argv[-1])]
