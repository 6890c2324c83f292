"""Measure the peer's side of the rows on GRPO: TRL's GRPOTrainer with transformers' `generate`, and LoRA r = 8 on the
policy. Run by `run.py` in its own environment: python trl_grpo.py WORK-AS-JSON"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from work import PROMPTS, Work, report


class StepTimer(TrainerCallback):
    """Wall-clock and processor seconds of each step, measured from the end of the step before."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.last_time = time.perf_counter()
        self.last_processor_time = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        processor_now = time.process_time()
        self.seconds.append(now - self.last_time)
        self.processor_seconds.append(processor_now - self.last_processor_time)
        self.last_time = now
        self.last_processor_time = processor_now


def main(work: Work) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token or "<|endoftext|>"
    policy = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1, dtype=dtype)
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS * work.batch])
    timer = StepTimer()
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        reward_processing_classes=tokenizer,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=1,
            num_generations=work.group,
            num_iterations=work.epochs,
            max_steps=work.updates,
            beta=work.kl_coef,
            max_completion_length=work.tokens,
            generation_kwargs={"min_new_tokens": work.tokens} if work.fixed else None,
            bf16=work.autocast,
            gradient_checkpointing=work.recompute,
            use_cpu=True,
            learning_rate=1e-5,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=dataset,
        callbacks=[timer],
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    report(work, timer.seconds, cpu_s_per_update=statistics.median(timer.processor_seconds[1:]))


if __name__ == "__main__":
    main(Work.from_text(sys.argv[1]))
