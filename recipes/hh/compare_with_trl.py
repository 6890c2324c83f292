"""Train TRL's RewardTrainer on the pairs and with the settings of a finished `stage=reward`, and compare accuracies on
held-out pairs. The exit status is 1 if align's accuracy is below TRL's interval.

Usage: python recipes/hh/compare_with_trl.py RUN_FOLDER [--save FILE]

TRL is used as its documentation shows it: it renders and tokenises the conversations, and the classifier is
`AutoModelForSequenceClassification` with a new LoRA adapter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.core.types import Preference
from align.data.pairs import sample_records
from align.data.read.records import read_preferences
from align.data.split import split_by_group
from align.models.load import choose_device, choose_dtype
from align.ops.intervals import average_by_group, proportion_interval
from align.report import format_interval, note_small_sample
from align.run import read_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--save", type=Path, help="write both results to this JSON file")
    options = parser.parse_args()
    manifest = read_manifest(options.run)
    config = manifest.config
    if config["data"]["held_out"]:
        raise SystemExit("the run held prompts back from training (data.held_out): make it with data.held_out=0")
    preferences = sample_records(read_preferences(config["data"]["path"]), config["data"]["limit"], config["seed"])
    train, test = split_by_group(preferences, config["stage"]["held_out"], config["seed"])

    start = time.monotonic()
    correct = train_with_trl(manifest.base.path, config, train, test)
    groups = [preference.group_id or preference.id for preference in test]
    trl = proportion_interval(average_by_group(groups, correct)[0]).as_dict()
    trl["minutes"] = (time.monotonic() - start) / 60
    started = datetime.fromisoformat(manifest.times["started"])
    finished = datetime.fromisoformat(manifest.times["finished"])
    align = manifest.metrics["accuracy"] | {"minutes": (finished - started).total_seconds() / 60}
    results = {"pairs": len(train), "align": align, "trl": trl}
    print("\n" + format_table(results))
    if options.save:
        options.save.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if align["value"] < trl["low"] else 0


def format_table(results: dict[str, Any]) -> str:
    """Return both accuracies as a Markdown table."""
    lines = [
        f"| {results['pairs']} pairs to train on | accuracy on {results['align']['n']} held out | minutes |",
        "|---|---|---|",
    ]
    for label, key in (("`stage=reward`", "align"), ("TRL's RewardTrainer", "trl")):
        row = results[key]
        lines.append(f"| {label} | {format_interval(row)}{note_small_sample(row['n'])} | {row['minutes']:.0f} |")
    return "\n".join(lines) + "\n"


def train_with_trl(base: str, config: dict[str, Any], train: list[Preference], test: list[Preference]) -> list[float]:
    """Return for each held-out pair 1.0 if TRL's reward model prefers the chosen answer, else 0.0."""
    stage = config["stage"]
    method = config["method"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    dtype = choose_dtype(config["dtype"], choose_device(config["device"]))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            output_dir=folder,
            learning_rate=stage["lr"],
            num_train_epochs=stage["epochs"],
            per_device_train_batch_size=stage["micro_batch"],
            per_device_eval_batch_size=stage["micro_batch"],
            gradient_accumulation_steps=stage["batch_size"] // stage["micro_batch"],
            warmup_steps=stage["warmup"],
            lr_scheduler_type=stage["schedule"],
            max_grad_norm=stage["max_grad_norm"],
            max_length=config["data"]["max_length"],
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=False,
            seed=config["seed"],
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=build_conversation_rows(train),
            eval_dataset=build_conversation_rows(test),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="SEQ_CLS", r=method["r"], lora_alpha=method["alpha"], target_modules="all-linear"
            ),
        )
        trainer.train()
        gaps = []
        for batch in trainer.get_eval_dataloader():
            trainer.model.eval()
            with torch.no_grad():
                keys = ("input_ids", "attention_mask")
                scores = trainer.model(**{k: batch[k].to(trainer.model.device) for k in keys}).logits.float()
            chosen_scores, rejected_scores = scores.view(2, -1)  # the collator stacks all chosen above all rejected
            gaps += (chosen_scores - rejected_scores).tolist()
    assert len(gaps) == len(test), f"TRL left out {len(test) - len(gaps)} pairs as too long"
    return [float(gap > 0) for gap in gaps]


def build_conversation_rows(preferences: list[Preference]) -> Dataset:
    """Return whole conversations under `chosen` and `rejected`, TRL's conversational preference format."""
    rows = []
    for preference in preferences:
        row = {}
        for side in ("chosen", "rejected"):
            messages = (*preference.prompt, *getattr(preference, side))
            row[side] = [{"role": message.role, "content": message.content} for message in messages]
        rows.append(row)
    return Dataset.from_list(rows)


if __name__ == "__main__":
    sys.exit(main())
