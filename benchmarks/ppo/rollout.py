"""Sampling alone: our engine beside transformers' `generate` on the same weights, tokens a second.

python benchmarks/ppo/rollout.py [MODEL_FOLDER] [float32|bfloat16|nf4]      (the folder that run.py makes by default)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from ours import roles_on
from work import PROMPTS, Work

from align.config.root import ModelConfig
from align.data.chat import encode_prompts
from align.models.base import find_base
from align.models.load import load_tokenizer
from align.models.trunk import pad
from align.rollout.hf import HfEngine
from align.types import Conversation, Message


def main(model: str, dtype: str, batch: int = 16, tokens: int = 64, rounds: int = 3) -> None:
    work = Work(model, batch, tokens, 1, 1, dtype)
    with tempfile.TemporaryDirectory() as folder:
        roles = roles_on(work, Path(folder))
    tokenizer = load_tokenizer(find_base(ModelConfig(model)))
    asked = [Conversation((Message("user", text),)) for text in PROMPTS * (batch // len(PROMPTS))]
    prompts = [p.input_ids for p in encode_prompts(tokenizer, asked, 1024)[0]]
    engine = HfEngine((), tokenizer.pad_token_id, tokens)
    ids = pad(prompts, tokenizer.pad_token_id, left=True)
    mask = pad([[1] * len(p) for p in prompts], 0, left=True)

    def ours() -> None:
        engine.generate(roles.model, prompts, torch.Generator().manual_seed(0))

    def generate() -> None:
        roles.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    def lean(wanted: bool) -> None:
        """PEFT's own forward for `generate`: that is what it is used with."""
        from align.models.lean import make_lean

        for module in roles.model.modules():
            vars(module).pop("forward", None)
        if wanted:
            make_lean(roles.model)

    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    with torch.no_grad(), roles.use("policy"):
        for number in range(rounds + 1):  # alternating; the first round warms up
            for name, run in (("ours", ours), ("generate", generate)):
                lean(name == "ours")
                began = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - began)
    ours_s, theirs_s = (batch * tokens / statistics.median(seconds[name]) for name in ("ours", "generate"))
    print(f"{dtype}: ours {ours_s:.0f} tok/s, generate {theirs_s:.0f}, ratio {ours_s / theirs_s:.2f}")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent / ".models" / "smollm2"
    main(sys.argv[1] if len(sys.argv) > 1 else str(here), sys.argv[2] if len(sys.argv) > 2 else "bfloat16")
