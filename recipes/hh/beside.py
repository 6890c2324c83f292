"""TRL's RewardTrainer, run plainly on the pairs and with the settings of a finished `stage=reward`, and both accuracies
with their intervals. Exits 1 where ours lies below TRL's interval.

Usage: python recipes/hh/beside.py RUN_FOLDER [--save FILE]
Plainly: a script as TRL's own documentation has it. TRL renders and tokenises the conversations, the classifier is
transformers' with a LoRA of PEFT's from scratch, and the score is read where transformers reads it.
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
from align.data.pairs import drawn
from align.data.read.records import read_preferences
from align.data.split import split_by_group
from align.models.load import choose_device, choose_dtype
from align.ops.intervals import average_by_group, proportion_interval
from align.report import few, in_words
from align.run import read_manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--save", type=Path, help="write both results to this JSON file")
    given = parser.parse_args()
    manifest = read_manifest(given.run)
    config = manifest.config
    if config["data"]["held_out"]:
        raise SystemExit("the run held prompts back from training (data.held_out): make it with data.held_out=0")
    prefs = drawn(read_preferences(config["data"]["path"]), config["data"]["limit"], config["seed"])
    train, test = split_by_group(prefs, config["stage"]["held_out"], config["seed"])

    began = time.monotonic()
    right = peer(manifest.base.path, config, train, test)
    groups = [p.group_id or p.id for p in test]
    theirs = proportion_interval(average_by_group(groups, right)[0]).as_dict() | {
        "minutes": (time.monotonic() - began) / 60
    }
    ended, started = (datetime.fromisoformat(manifest.times[k]) for k in ("finished", "started"))
    ours = manifest.metrics["accuracy"] | {"minutes": (ended - started).total_seconds() / 60}
    found = {"pairs": len(train), "align": ours, "trl": theirs}
    print("\n" + markdown(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if ours["value"] < theirs["low"] else 0


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/recipes.md."""
    lines = [
        f"| {found['pairs']} pairs to train on | accuracy on {found['align']['n']} held out | minutes |",
        "|---|---|---|",
    ]
    for who, key in (("`stage=reward`", "align"), ("TRL's RewardTrainer", "trl")):
        row = found[key]
        lines.append(f"| {who} | {in_words(row)}{few(row['n'])} | {row['minutes']:.0f} |")
    return "\n".join(lines) + "\n"


def peer(base: str, config: dict[str, Any], train: list[Preference], test: list[Preference]) -> list[float]:
    """Whether TRL's reward model orders each held-out pair as people did."""
    stage, method = config["stage"], config["method"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    dtype = choose_dtype(config["dtype"], choose_device(config["device"]))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            output_dir=folder, learning_rate=stage["lr"], num_train_epochs=stage["epochs"],
            per_device_train_batch_size=stage["micro_batch"], per_device_eval_batch_size=stage["micro_batch"],
            gradient_accumulation_steps=stage["batch_size"] // stage["micro_batch"],
            warmup_steps=stage["warmup"], lr_scheduler_type=stage["schedule"], max_grad_norm=stage["max_grad_norm"],
            max_length=config["data"]["max_length"], bf16=dtype == torch.bfloat16, gradient_checkpointing=False,
            seed=config["seed"], save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=conversational(train), eval_dataset=conversational(test),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="SEQ_CLS", r=method["r"], lora_alpha=method["alpha"], target_modules="all-linear"
            ),
        )  # fmt: skip
        trainer.train()
        gaps = []
        for batch in trainer.get_eval_dataloader():
            trainer.model.eval()
            with torch.no_grad():
                keys = ("input_ids", "attention_mask")
                scores = trainer.model(**{k: batch[k].to(trainer.model.device) for k in keys}).logits.float()
            chosen, rejected = scores.view(2, -1)  # the collator stacks all chosen above all rejected
            gaps += (chosen - rejected).tolist()
    assert len(gaps) == len(test), f"TRL left out {len(test) - len(gaps)} pairs as too long"
    return [float(gap > 0) for gap in gaps]


def conversational(prefs: list[Preference]) -> Dataset:
    """Whole conversations under `chosen` and `rejected`, as TRL reads them."""
    rows = []
    for pref in prefs:
        turns = {side: (*pref.prompt, *getattr(pref, side)) for side in ("chosen", "rejected")}
        rows.append({side: [{"role": m.role, "content": m.content} for m in found] for side, found in turns.items()})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    sys.exit(main())
