"""The other contestants, transformers' Trainer and TRL's SFTTrainer. Run by `run.py`: python peers.py NAME WORKS"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from work import Row, StepClock, Work, read_works, run_contestant

from align.models.cpu_memory import keep_freed_memory


def common_arguments(work: Work, folder: str, rows: int, lr: float) -> dict[str, Any]:
    """Return the arguments that both trainers get, equal to those of `stage=sft` where they change the result."""
    steps = -(-rows // work.batch)
    return {
        "output_dir": folder,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(steps * work.warmup),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "num_train_epochs": 1,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.batch // work.micro_batch,
        "bf16": work.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",  # the batches are grouped by length already
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": work.seed,
    }


def build_trainer(
    name: str, model: Any, tokenizer: Any, dataset: Dataset, work: Work, arguments: dict[str, Any]
) -> Any:
    if name == "Trainer":
        collator = DataCollatorForSeq2Seq(tokenizer, model=None, padding=True)
        settings = TrainingArguments(**arguments)
        return Trainer(
            model=model, args=settings, train_dataset=dataset, data_collator=collator, processing_class=tokenizer
        )
    settings = SFTConfig(**arguments, max_length=1024)
    return SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)


def load(work: Work) -> tuple[Any, Any]:
    if work.kept_memory:
        keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype))
    torch.manual_seed(work.seed)
    lora = LoraConfig(r=work.rank, lora_alpha=work.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(work.model)


def fit(name: str, model: Any, tokenizer: Any, rows: list[Row], work: Work, lr: float) -> StepClock:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = common_arguments(work, folder, len(rows), lr)
        trainer = build_trainer(name, model, tokenizer, Dataset.from_list(rows), work, arguments)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock


if __name__ == "__main__":
    run_contestant(read_works(), load, partial(fit, sys.argv[1]))
