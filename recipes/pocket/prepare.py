"""Write what the built-in model is trained from: its tokenizer and random weights.

Usage: python recipes/pocket/prepare.py FOLDER

The tokenizer is SentencePiece BPE with byte fallback, trained on the corpus's `base` part only, so that both
transformers and llama.cpp can load it. Normalisation is the identity and no space is added in front, so that both
tokenise alike everywhere, also right after a special token. The chat symbols are *control* symbols: single tokens that
neither library makes from a user's text.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import sentencepiece as spm
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from align.data import chitchat
from align.data.chat.template import POCKET

VOCABULARY = 4096
CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def train_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model` and the files from which transformers loads it."""
    model = io.BytesIO()
    lines = (line for text in chitchat.load_texts("base") for line in text.split("\n"))
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=CONTROL,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        num_threads=1,
        max_sentence_length=8192,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue())
    added = {
        str(pieces.piece_to_id(token)): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for token in ("<unk>", "<s>", "</s>", "<pad>", *CONTROL)
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": POCKET,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_random_weights(folder: Path) -> None:
    """Write a Llama with random weights. All its linear dimensions are multiples of 256, as NF4 and k-quants need."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # The output layer shares these weights: at the default 0.02 the first logits are already near uniform.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    train_tokenizer(target)
    write_random_weights(target)
