"""Train the peer's PPO on the quickstart's task. Run by `gold.py` in the peer's environment:
python trl_ppo_gold.py WORK-AS-JSON"""

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


def standardise_head(head: torch.nn.Linear, mean: float, scale: float) -> torch.nn.Linear:
    """Return a head whose score is (score − mean) · scale."""
    standardised = torch.nn.Linear(head.in_features, 1)
    standardised.weight.data = head.weight.data * scale
    standardised.bias.data.fill_(-mean * scale)
    return standardised


def main(work: dict[str, Any]) -> None:
    torch.manual_seed(work["seed"])
    models_path = work["models"]
    batch_size = work["batch_size"]
    tokenizer = AutoTokenizer.from_pretrained(f"{models_path}/policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(f"{models_path}/policy", dtype=torch.float32)
    reward, value = (  # the value model starts from the reward model with a head of zeros, as align's does
        AutoModelForSequenceClassification.from_pretrained(f"{models_path}/reward", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    reward.score = standardise_head(reward.score, work["mean"], work["scale"])
    torch.nn.init.zeros_(value.score.weight)
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    with open(f"{models_path}/prompts.json") as file:
        dataset = Dataset.from_list([{"input_ids": input_ids} for input_ids in json.load(file)])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=work["minibatches"],
            num_ppo_epochs=work["epochs"],
            total_episodes=batch_size * work["updates"],
            response_length=work["tokens"],
            stop_token="eos",
            missing_eos_penalty=work["penalty"],
            kl_coef=work["kl_coef"],
            lam=work["lam"],
            gamma=work["gamma"],
            temperature=1.0,
            local_rollout_forward_batch_size=batch_size,
            report_to=[],
            save_strategy="no",
            num_sample_generations=0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            logging_steps=1,
            seed=work["seed"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        peft_config=LoraConfig(
            r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.model.policy.save_pretrained(work["out"])
    tokenizer.save_pretrained(work["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
