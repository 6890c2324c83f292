"""Sampling alone, by an engine of ours or by transformers' `generate` on the same weights. Run by `run.py`, and by
`../serve/rollouts.py`:

python rollout.py WORK-AS-JSON ours|bank|generate

`ours` is `rollout.engine=hf`; `bank` takes a snapshot of the policy before each update, which is counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from ours import precision, roles_on
from work import PROMPTS, Work, report

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompts
from align.models.base import find_base
from align.models.forward import pad
from align.models.load import load_tokenizer
from align.rollout.hf import HfEngine
from align.rollout.multi_adapter import BankEngine


def main(work: Work, who: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roles = roles_on(work, Path(folder))
    base = find_base(work.model)
    tokenizer = load_tokenizer(base)
    asked = [Conversation((Message("user", text),)) for text in (PROMPTS * work.batch)[: work.batch]]
    prompts = [p.input_ids for p in encode_prompts(tokenizer, asked, 1024)[0]]
    engine = (BankEngine if who == "bank" else HfEngine)((), tokenizer.pad_token_id, work.tokens)
    engine.load(base, *precision(work))
    ids = pad(prompts, tokenizer.pad_token_id, left=True)
    mask = pad([[1] * len(p) for p in prompts], 0, left=True)

    def ours() -> None:
        engine.sync(roles.actor("policy"))
        engine.generate(prompts, roles.actor("policy"), range(len(prompts)))

    def generate() -> None:
        roles.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=work.tokens,
            max_new_tokens=work.tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    if who == "generate":  # with transformers' and PEFT's own forwards: that is what it is used with
        for module in roles.model.modules():
            vars(module).pop("forward", None)
    seconds = []
    with torch.no_grad(), roles.use("policy"):
        for _ in range(work.updates):
            began = time.perf_counter()
            (generate if who == "generate" else ours)()
            seconds.append(time.perf_counter() - began)
    engine.close()
    report(work, seconds)


if __name__ == "__main__":
    main(Work.of(sys.argv[1]), sys.argv[2])
