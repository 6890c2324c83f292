"""Compare the requests of a mixed, staggered batch with the same requests alone: tokens and logprobs, bit by bit.

    python benchmarks/serve/batch_exactness.py [--models pocket,smollm2] [--dtypes float32,bfloat16] [--counts 1,2]

Eight adapters of ranks 8 to 64 and the base, prompts of 1 to 300 tokens, every way of sampling. The mixed batch runs
twice, with and without a prefix cache; alone, each request runs without one. In fp32 the logprobs of prompts and
answers are also compared with PEFT's. The exit status is 1 if a bit differs, or if PEFT differs by more than 2e-4.
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
from common import (
    FIRST_ID,
    LAST_ID,
    MANY_RANKS,
    BenchmarkRecord,
    create_decoder,
    create_parser,
    create_random_adapters,
    find_bases,
    format_rows,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.models.fastpath.mixed import MixedDecoder
from align.rollout.continuous import ContinuousBatch
from align.rollout.serving_engine import Output, Request, SamplingParams, Token
from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS = 8
COLUMNS = 384
SLOTS = 32
PEFT_TOLERANCE = 2e-4
"""Largest difference of a logprob, in nats."""
STEPS_BETWEEN_ARRIVALS = 3
ARRIVALS_AT_ONCE = 2
MIXED_BATCHES = {"mixed": 0, "mixed_with_prefix_cache": 1 << 28}
"""Name of a mixed batch → bytes of its prefix cache."""


class Answer(NamedTuple):
    """A request's output.

    Attributes:
        tokens: sampled tokens.
        prompt: tokens of the prompt, if their logprobs were requested.
        cached: numbers of prompt tokens that came from the prefix cache.
    """

    tokens: list[Token]
    prompt: list[Token | None]
    cached: list[int]

    def add_output(self, output: Output) -> None:
        if output.error is not None:
            raise output.error
        self.tokens.extend(output.tokens)
        self.prompt.extend(output.prompt_logprobs or ())
        self.cached.append(output.cached_tokens)


def create_requests(count: int, digests: Sequence[str], seed: int, prompt_logprobs: int | None = None) -> list[Request]:
    """Return random requests.

    A third of the prompts share a prefix and belong to two adapters, which the prefix cache has to keep apart.
    """
    draw = random.Random(seed)

    def draw_ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(length))

    prefix = draw_ids(150)
    requests = []
    for number in range(count):
        sampling = SamplingParams(
            draw.randrange(4, 40),
            draw.choice((0, 0.7, 1.0)),
            draw.choice((0.9, 1.0)),
            number,
            logprobs=3,
            prompt_logprobs=prompt_logprobs,
        )
        if number % 3 == 0:
            prompt = prefix[: draw.choice((100, 150))] + draw_ids(30)
            requests.append(Request(prompt, sampling, draw.choice(digests[:2])))
        else:
            length = draw.choice((1, 2, 63, 64, 65, draw.randrange(3, 300), 300))
            prompt = draw_ids(length)
            requests.append(Request(prompt, sampling, draw.choice([*digests, None]), tenant=str(number % 2)))
    return requests


def generate_answers(batch: ContinuousBatch, requests: Sequence[Request], staggered: bool) -> list[Answer]:
    """Run the requests, two every three steps if `staggered`, else one after another."""
    answers = [Answer([], [], []) for _ in requests]
    waiting = list(zip(requests, answers, strict=True))[::-1]
    step = 0
    busy = True
    while waiting or busy:
        for _ in range(ARRIVALS_AT_ONCE if staggered else 1):
            arrives = step % STEPS_BETWEEN_ARRIVALS == 0 if staggered else not busy or step == 0
            if waiting and arrives:
                request, answer = waiting.pop()
                batch.add(request, answer.add_output)
        step += 1
        busy = batch.step()
    return answers


def create_batch(
    decoder: MixedDecoder, adapters: Sequence[Path], prefix_bytes: int
) -> tuple[ContinuousBatch, list[str]]:
    """Return a batch in which the adapters are registered, and their digests."""
    batch = ContinuousBatch(decoder, COLUMNS, queue=1 << 20, prefix_bytes=prefix_bytes)
    return batch, [batch.register(folder) for folder in adapters]


def compare_batches(decoder: MixedDecoder, adapters: Sequence[Path], count: int, seed: int) -> dict[str, Any]:
    """Return which requests differ between a mixed batch and alone, and the seconds of both."""
    sequential_batch, digests = create_batch(decoder, adapters, 0)
    requests = create_requests(count, digests, seed)
    start = time.perf_counter()
    references = generate_answers(sequential_batch, requests, staggered=False)
    result: dict[str, Any] = {"requests": count, "tokens": sum(len(answer.tokens) for answer in references)}
    result["alone_s"] = round(time.perf_counter() - start, 2)
    for name, prefix_bytes in MIXED_BATCHES.items():
        batch, _ = create_batch(decoder, adapters, prefix_bytes)
        start = time.perf_counter()
        answers = generate_answers(batch, requests, staggered=True)
        pairs = zip(references, answers, strict=True)
        differ = [i for i, (reference, answer) in enumerate(pairs) if reference.tokens != answer.tokens]
        result[name] = {
            "differ": differ,
            "s": round(time.perf_counter() - start, 2),
            "cached_tokens": sum(sum(answer.cached) for answer in answers),
        }
    assert result["mixed_with_prefix_cache"]["cached_tokens"] > 0, "no tokens came from the prefix cache"
    return result


@torch.no_grad()
def compute_peft_distance(base: Base, decoder: MixedDecoder, adapters: Sequence[Path], count: int, seed: int) -> float:
    """Return the largest |Δ logprob| between PEFT and the prompts and answers of a mixed batch."""
    batch, digests = create_batch(decoder, adapters, 0)
    requests = create_requests(count, digests, seed, prompt_logprobs=0)
    answers = generate_answers(batch, requests, staggered=True)
    base_model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base_model, adapters[0], adapter_name=digests[0])
    for folder, digest in zip(adapters[1:], digests[1:], strict=True):
        model.load_adapter(folder, digest)
    model.eval()
    largest = 0.0
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *(token.id for token in answer.tokens)]])
        logits = model(input_ids=ids, adapter_names=[request.adapter or "__base__"]).logits
        peft_logprobs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logprobs = [token.logprob for token in (*answer.prompt, *answer.tokens) if token is not None]
        largest = max(largest, float((peft_logprobs - torch.tensor(logprobs)).abs().max()))
    return largest


def measure_row(base: Base, dtype: str, threads: int, count: int, rounds: int) -> dict[str, Any]:
    """Return the comparisons of a base in a dtype, one a round. `count` is the number of requests."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        adapters = create_random_adapters(base, ADAPTERS, MANY_RANKS, Path(folder))
        decoder = create_decoder(base, getattr(torch, dtype), SLOTS, COLUMNS)
        row = {"promised": decoder.exact, "any_rows": decoder.takes_any_rows}
        row["rounds"] = [compare_batches(decoder, adapters, count, seed) for seed in range(rounds)]
        if dtype == "float32":
            row["from_peft"] = compute_peft_distance(base, decoder, adapters, count, rounds)
    return row


def count_differing(row: dict[str, Any], batch_name: str) -> int:
    return sum(len(result[batch_name]["differ"]) for result in row["rounds"])


def has_failed(row: dict[str, Any]) -> bool:
    differs = any(count_differing(row, name) for name in MIXED_BATCHES)
    return differs or row.get("from_peft", 0.0) > PEFT_TOLERANCE


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the Markdown table of README.md."""
    rows = []
    for name, row in results["rows"].items():
        request_count = sum(result["requests"] for result in row["rounds"])
        cached = sum(result["mixed_with_prefix_cache"]["cached_tokens"] for result in row["rounds"])
        differ = [f"{count_differing(row, batch_name)} of {request_count}" for batch_name in MIXED_BATCHES]
        distance = f"{row['from_peft']:.1e} (≤ {PEFT_TOLERANCE:g})" if "from_peft" in row else "–"
        rows.append([name, *differ, str(cached), distance])
    columns = ("", "differ from alone", "with a prefix cache", "tokens from it", "from PEFT, nats")
    return format_rows(columns, rows)


def main() -> int:
    parser = create_parser(__doc__, 1, HERE / "exact.json")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--counts", default="1,2", help="threads, separated by commas; --threads is not read")
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        for dtype in options.dtypes.split(","):
            for threads in map(int, options.counts.split(",")):
                label = f"{Path(name).name} {dtype}, {threads} thread{'s' if threads > 1 else ''}"
                record.add(label, measure_row(base, dtype, threads, options.requests, options.rounds))
                gc.collect()
    print("\n" + format_table(record.results))
    return int(any(map(has_failed, record.results["rows"].values())))


if __name__ == "__main__":
    sys.exit(main())
