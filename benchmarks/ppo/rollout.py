"""Measure sampling alone, by an engine of align or by transformers' `generate` on the same weights. Run by `run.py` and
by `../serve/rollouts.py`:

python rollout.py WORK-AS-JSON ours|bank|generate

`ours` is `rollout.engine=hf`. `bank` copies the policy before each update, and this time is counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from align_ppo import build_roles, choose_precision
from work import PROMPTS, Work, report

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompts
from align.models.base import find_base
from align.models.forward import pad_rows
from align.models.load import load_tokenizer
from align.rollout.hf import HfEngine
from align.rollout.multi_adapter import BankEngine


def main(work: Work, sampler: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roles = build_roles(work, Path(folder))
    base = find_base(work.model)
    tokenizer = load_tokenizer(base)
    conversations = [Conversation((Message("user", text),)) for text in (PROMPTS * work.batch)[: work.batch]]
    prompts = [prompt.input_ids for prompt in encode_prompts(tokenizer, conversations, 1024)[0]]
    engine = (BankEngine if sampler == "bank" else HfEngine)((), tokenizer.pad_token_id, work.tokens)
    engine.load(base, *choose_precision(work))
    input_ids = pad_rows(prompts, tokenizer.pad_token_id, pad_left=True)
    attention_mask = pad_rows([[1] * len(prompt) for prompt in prompts], 0, pad_left=True)

    def sample_with_align() -> None:
        engine.sync(roles.actor("policy"))
        engine.generate(prompts, roles.actor("policy"), range(len(prompts)))

    def sample_with_transformers() -> None:
        roles.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=work.tokens,
            max_new_tokens=work.tokens,
            pad_token_id=tokenizer.pad_token_id,
        )

    if sampler == "generate":  # remove align's forwards: people use `generate` with those of transformers and PEFT
        for module in roles.model.modules():
            vars(module).pop("forward", None)
    sample = sample_with_transformers if sampler == "generate" else sample_with_align
    seconds = []
    with torch.no_grad(), roles.use("policy"):
        for _ in range(work.updates):
            started = time.perf_counter()
            sample()
            seconds.append(time.perf_counter() - started)
    engine.close()
    report(work, seconds)


if __name__ == "__main__":
    main(Work.from_text(sys.argv[1]), sys.argv[2])
