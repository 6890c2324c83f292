"""The peer on the quickstart's task. Run by `gold.py` in the peer's environment: python gold_peer.py WORK-AS-JSON"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


def standardise(head: torch.nn.Linear, mean: float, scale: float) -> torch.nn.Linear:
    """The head that gives (score − mean) · scale."""
    made = torch.nn.Linear(head.in_features, 1)
    made.weight.data = head.weight.data * scale
    made.bias.data.fill_(-mean * scale)
    return made


def main(work: dict[str, Any]) -> None:
    torch.manual_seed(work["seed"])
    models, batch = work["models"], work["batch_size"]
    tokenizer = AutoTokenizer.from_pretrained(f"{models}/policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(f"{models}/policy", dtype=torch.float32)
    reward, value = (  # the value model starts from the reward model with an empty head, as ours does
        AutoModelForSequenceClassification.from_pretrained(f"{models}/reward", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    reward.score = standardise(reward.score, work["mean"], work["scale"])
    torch.nn.init.zeros_(value.score.weight)
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    with open(f"{models}/prompts.json") as file:
        data = Dataset.from_list([{"input_ids": row} for row in json.load(file)])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
            num_mini_batches=work["minibatches"], num_ppo_epochs=work["epochs"],
            total_episodes=batch * work["updates"], response_length=work["tokens"], stop_token="eos",
            missing_eos_penalty=work["penalty"], kl_coef=work["kl_coef"], lam=work["lam"], gamma=work["gamma"],
            temperature=1.0, local_rollout_forward_batch_size=batch, report_to=[], save_strategy="no",
            num_sample_generations=0, bf16=False, gradient_checkpointing=False, use_cpu=True,
            learning_rate=work["lr"], lr_scheduler_type="constant", logging_steps=1, seed=work["seed"],
        ),
        processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=data, eval_dataset=data.select(range(8)),
        peft_config=LoraConfig(
            r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    trainer.train()
    trainer.model.policy.save_pretrained(work["out"])
    tokenizer.save_pretrained(work["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
