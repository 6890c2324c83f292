"""Measure the peer's side of a row: PPO of TRL 1.12.0, the last release that has it, with LoRA r = 8 on the policy.
Run by `run.py` in an environment with that release: python trl_ppo.py WORK-AS-JSON"""

from __future__ import annotations

import os
import sys
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from work import PROMPTS, Work, report


class UpdateTimer(TrainerCallback):
    """Wall-clock seconds of each update. The trainer logs once an update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last_time = time.perf_counter()

    def on_log(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last_time)
        self.last_time = now


def main(work: Work) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token or "<|endoftext|>"
    policy = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1, dtype=dtype) for _ in range(2)
    )
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    rows = []
    for text in PROMPTS * work.batch:
        messages = [{"role": "user", "content": text}]
        encoding = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        rows.append({"input_ids": encoding["input_ids"]})
    dataset = Dataset.from_list(rows)
    timer = UpdateTimer()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=work.epochs,
            total_episodes=work.batch * work.updates,
            response_length=work.tokens,
            stop_token=None if work.fixed else "eos",
            missing_eos_penalty=1.0,
            local_rollout_forward_batch_size=work.batch,
            report_to=[],
            save_strategy="no",
            num_sample_generations=0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            learning_rate=1e-5,
            logging_steps=1,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[timer],
    )
    timer.last_time = time.perf_counter()
    trainer.train()
    report(work, timer.seconds[: work.updates])


if __name__ == "__main__":
    main(Work.from_text(sys.argv[1]))
