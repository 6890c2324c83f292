"""Put a finished `stage=full` run into the package as the built-in model: bf16 weights, tokenizer, card, manifest.

Usage: python recipes/pocket/package.py RUN_FOLDER TARGET
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.chitchat import PARTS
from align.run import file_digest, read_manifest

LIMIT_MB = 16

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# pocket

A Llama of {parameters:.2f} M parameters ({layers} layers, {width} wide, {vocabulary} tokens) that chats a little:
the model that `align` ships, so that its first run takes minutes, offline, on two CPU cores. It is a base model with
a chat template, for trying training code. It knows no facts, and what it says is nobody's opinion.

- **Data**: `chitchat-dataset` 0.9 (PyPI, MIT), conversations of people; {base} % of them, by conversation, as plain
  text ({tokens:,} tokens). {remaining_parts} are kept for instruction tuning, prompts and tests.
- **Training**: `recipes/pocket/run.sh`, `stage=full`: {epochs:g} epochs, {steps:,} steps of 16 rows of at most 256
  tokens, AdamW at {lr:g}, cosine, weight decay 0.1, seed {seed}; on a CPU, fp32 weights, {compute} arithmetic, stored
  in bf16.
- **Held out** (plain text of conversations that nothing trains on, {held_out:,} tokens): {loss:.3f} nats a token,
  perplexity {perplexity:.1f} (random weights: {before:.0f}).
- **Tokenizer**: SentencePiece BPE with byte fallback, trained on the same part; the chat symbols are control symbols.
- Every file's sha256 is in `manifest.json`.
"""


def write_package(run: Path, target: Path) -> None:
    """Replace the folder `target` by the model of a run."""
    manifest = read_manifest(run)
    source = run / "artifact"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.config.use_cache = True  # training switched it off
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    start = Path(manifest.base.path)
    shutil.copyfile(start / "tokenizer.model", target / "tokenizer.model")
    figures = manifest.metrics
    remaining_parts = ", ".join(f"{percent} %" for part, percent in PARTS.items() if part != "base")
    config = manifest.config
    card = CARD.format(
        epochs=config["stage"]["epochs"],
        lr=config["stage"]["lr"],
        compute="bf16" if config["dtype"] == "bfloat16" else "fp32",
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        base=PARTS["base"],
        remaining_parts=remaining_parts,
        tokens=figures["train_tokens"],
        steps=figures["steps"],
        seed=manifest.seed,
        held_out=figures["held_out_tokens"],
        loss=figures["loss_after"],
        perplexity=figures["perplexity_after"],
        before=figures["perplexity_before"],
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    for path in target.iterdir():
        path.chmod(0o644)
    digests = {p.name: file_digest(p) for p in sorted(target.iterdir())}
    facts = {"sha256": digests, "loss": figures["loss_after"], "perplexity": figures["perplexity_after"]}
    (target / "manifest.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    size = sum(p.stat().st_size for p in target.iterdir()) / 2**20
    assert size <= LIMIT_MB, f"{size:.1f} MB, more than {LIMIT_MB}"
    print(f"{target}: {size:.1f} MB, perplexity {figures['perplexity_after']:.1f}")


if __name__ == "__main__":
    write_package(Path(sys.argv[1]), Path(sys.argv[2]))
