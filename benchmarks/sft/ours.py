"""The contestant `align`: the trainer of `stage=sft` with its defaults. Run by `run.py`: python ours.py WORKS"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from work import Row, StepClock, Work, read_works, run_contestant

from align.config.sft import SftConfig
from align.data.chat.encode import EncodedRow
from align.models.adapters import add_new_adapter
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.models.lora import Lora
from align.trainers.common import Training, train
from align.trainers.sft import build_sft_trainer

CPU = torch.device("cpu")


def load(work: Work) -> tuple[Any, Any]:
    base = find_base(work.model)
    model = load_base(base, "lora", CPU, getattr(torch, work.dtype))
    torch.manual_seed(work.seed)
    return add_new_adapter(model, Lora(work.rank, work.alpha)), load_tokenizer(base)


def fit(model: Any, tokenizer: Any, rows: list[Row], work: Work, lr: float) -> StepClock:
    settings = SftConfig(lr=lr, batch_size=work.batch, micro_batch=work.micro_batch, warmup=work.warmup)
    training = Training.from_settings(settings, work.seed)
    encoded = [EncodedRow(row["input_ids"], row["labels"]) for row in rows]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training.arguments(Path(folder), CPU, getattr(torch, work.dtype), training.steps(len(rows)))

        def make() -> Any:
            trainer = build_sft_trainer(model, tokenizer, encoded, arguments, max_length=1024, packing=settings.packing)
            trainer._get_train_sampler = lambda train_dataset=None: SequentialSampler(encoded)
            return trainer

        train(make, model, clock)
    return clock


if __name__ == "__main__":
    run_contestant(read_works(), load, fit)
