"""Whether a request of a mixed, staggered batch is answered as it is alone: equal tokens and logprobs, to the bit.

    python benchmarks/serve/exact.py [--models pocket,smollm2] [--dtypes float32,bfloat16] [--counts 1,2]

Eight adapters of ranks 8 to 64 and the base, prompts of 1 to 300 tokens, every way of sampling. The mixed batch runs
twice, with and without a prefix cache; alone each request runs without. In fp32 the logprobs of prompt and answer are
compared with PEFT's. Exit status 1 where a bit differs, or PEFT is further off than 2e-4.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import FIRST_ID, LAST_ID, MANY_RANKS, Record, bases, decoder_on, options, random_adapters, table
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.models.fastpath.mixed import MixedDecoder
from align.rollout.continuous import ContinuousBatch
from align.rollout.serving_engine import Output, Request, SamplingParams, Token
from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS, COLUMNS, SLOTS, CLOSE = 8, 384, 32, 2e-4
EVERY, AT_ONCE = 3, 2
"""Steps between arrivals, and how many arrive."""


class Heard(NamedTuple):
    """An answer: its tokens, the prompt's, and how many of these came from the prefix cache."""

    tokens: list[Token]
    prompt: list[Token | None]
    cached: list[int]

    def hear(self, output: Output) -> None:
        if output.error is not None:
            raise output.error
        self.tokens.extend(output.tokens)
        self.prompt.extend(output.prompt_logprobs or ())
        self.cached.append(output.cached_tokens)


def requests(count: int, digests: Sequence[str], seed: int, prompt_logprobs: int | None = None) -> list[Request]:
    """A third of the prompts begin alike, for two adapters, which the prefix cache has to tell apart."""
    draw = random.Random(seed)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(number))

    shared = ids(150)
    made = []
    for number in range(count):
        sampling = SamplingParams(
            draw.randrange(4, 40), draw.choice((0, 0.7, 1.0)), draw.choice((0.9, 1.0)), number, logprobs=3,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        if number % 3 == 0:
            prompt = shared[: draw.choice((100, 150))] + ids(30)
            made.append(Request(prompt, sampling, draw.choice(digests[:2])))
        else:
            length = draw.choice((1, 2, 63, 64, 65, draw.randrange(3, 300), 300))
            made.append(Request(ids(length), sampling, draw.choice([*digests, None]), tenant=str(number % 2)))
    return made


def answered(batch: ContinuousBatch, asked: Sequence[Request], staggered: bool) -> list[Heard]:
    heard = [Heard([], [], []) for _ in asked]
    waiting = list(zip(asked, heard, strict=True))[::-1]
    number, more = 0, True
    while waiting or more:
        for _ in range(AT_ONCE if staggered else 1):
            if waiting and (number % EVERY == 0 if staggered else not more or number == 0):
                request, answer = waiting.pop()
                batch.add(request, answer.hear)
        number, more = number + 1, batch.step()
    return heard


def batch_on(decoder: MixedDecoder, adapters: Sequence[Path], prefix_bytes: int) -> tuple[ContinuousBatch, list[str]]:
    batch = ContinuousBatch(decoder, COLUMNS, queue=1 << 20, prefix_bytes=prefix_bytes)
    return batch, [batch.register(folder) for folder in adapters]


def compared(decoder: MixedDecoder, adapters: Sequence[Path], count: int, seed: int) -> dict[str, Any]:
    """How many requests differ from themselves alone, and how long both took."""
    plain, digests = batch_on(decoder, adapters, 0)
    asked = requests(count, digests, seed)
    began = time.perf_counter()
    alone = answered(plain, asked, staggered=False)
    found: dict[str, Any] = {"requests": count, "tokens": sum(len(each.tokens) for each in alone)}
    found["alone_s"] = round(time.perf_counter() - began, 2)
    for name, prefix_bytes in (("mixed", 0), ("mixed_with_prefix_cache", 1 << 28)):
        batch, _ = batch_on(decoder, adapters, prefix_bytes)
        began = time.perf_counter()
        mixed = answered(batch, asked, staggered=True)
        differ = [i for i, (a, b) in enumerate(zip(alone, mixed, strict=True)) if a.tokens != b.tokens]
        found[name] = {"differ": differ, "s": round(time.perf_counter() - began, 2),
                       "cached_tokens": sum(sum(each.cached) for each in mixed)}  # fmt: skip
    assert found["mixed_with_prefix_cache"]["cached_tokens"] > 0, "nothing came from the prefix cache"
    return found


@torch.no_grad()
def distance_from_peft(base: Base, decoder: MixedDecoder, adapters: Sequence[Path], count: int, seed: int) -> float:
    """The largest |Δ logprob| of prompts and answers in a mixed batch."""
    batch, digests = batch_on(decoder, adapters, 0)
    asked = requests(count, digests, seed, prompt_logprobs=0)
    heard = answered(batch, asked, staggered=True)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(plain, adapters[0], adapter_name=digests[0])
    for folder, digest in zip(adapters[1:], digests[1:], strict=True):
        model.load_adapter(folder, digest)
    model.eval()
    worst = 0.0
    for request, answer in zip(asked, heard, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *(token.id for token in answer.tokens)]])
        logits = model(input_ids=ids, adapter_names=[request.adapter or "__base__"]).logits
        theirs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        ours = [token.logprob for token in (*answer.prompt, *answer.tokens) if token is not None]
        worst = max(worst, float((theirs - torch.tensor(ours)).abs().max()))
    return worst


def row(base: Base, dtype: str, threads: int, count: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        adapters = random_adapters(base, ADAPTERS, MANY_RANKS, Path(folder))
        decoder = decoder_on(base, getattr(torch, dtype), SLOTS, COLUMNS)
        found = {"promised": decoder.exact, "any_rows": decoder.free}
        found["rounds"] = [compared(decoder, adapters, count, seed) for seed in range(rounds)]
        if dtype == "float32":
            found["from_peft"] = distance_from_peft(base, decoder, adapters, count, rounds)
    return found


def differing(found: dict[str, Any], name: str) -> int:
    return sum(len(each[name]["differ"]) for each in found["rounds"])


def wrong(found: dict[str, Any]) -> bool:
    differs = any(differing(found, name) for name in ("mixed", "mixed_with_prefix_cache"))
    return differs or found.get("from_peft", 0.0) > CLOSE


def format_table(found: dict[str, Any]) -> str:
    """The table of README.md."""
    rows = []
    for name, each in found["rows"].items():
        of = sum(one["requests"] for one in each["rounds"])
        cached = sum(one["mixed_with_prefix_cache"]["cached_tokens"] for one in each["rounds"])
        differ = [f"{differing(each, key)} of {of}" for key in ("mixed", "mixed_with_prefix_cache")]
        distance = f"{each['from_peft']:.1e} (≤ {CLOSE:g})" if "from_peft" in each else "–"
        rows.append([name, *differ, str(cached), distance])
    columns = ("", "differ from alone", "with a prefix cache", "tokens from it", "from PEFT, nats")
    return table(columns, rows)


def main() -> int:
    parser = options(__doc__, 1, HERE / "exact.json")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--counts", default="1,2", help="threads, parted by commas; --threads is not read")
    parser.add_argument("--requests", type=int, default=64)
    given = parser.parse_args()
    record = Record(given)
    for name, base in bases(given.models).items():
        for dtype in given.dtypes.split(","):
            for threads in map(int, given.counts.split(",")):
                label = f"{Path(name).name} {dtype}, {threads} thread{'s' if threads > 1 else ''}"
                record.add(label, row(base, dtype, threads, given.requests, given.rounds))
                gc.collect()
    print("\n" + format_table(record.found))
    return int(any(map(wrong, record.found["rows"].values())))


if __name__ == "__main__":
    sys.exit(main())
