"""Our side: the same work by the loop that `stage=ppo` runs. Run by `run.py`: python ours.py WORK-AS-JSON"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from work import PROMPTS, Work, report

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompts, stop_token_ids
from align.models.adapters import save_adapter, with_new_adapter
from align.models.base import find_base
from align.models.forward import compute_in_chunks
from align.models.load import load_base, load_classifier, load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles
from align.ops.linear import ONEDNN, linear
from align.ppo.experience import Estimator, assemble_experience, compute_estimates
from align.ppo.update import Losses, take_gradient_steps
from align.rollout.engine import row_seeds
from align.rollout.hf import HfEngine
from align.track import get_peak_rss_mb


def precision(work: Work) -> tuple[str, torch.dtype]:
    """Method and compute dtype."""
    return ("qlora", torch.bfloat16) if work.dtype == "nf4" else ("lora", getattr(torch, work.dtype))


def make_adapters(work: Work, folder: Path) -> None:
    """Fresh adapters of rank 8 in the places of a supervised one and of a reward model."""
    base, (method, dtype) = find_base(work.model), precision(work)
    for name, load in (("init", load_base), ("reward", load_classifier)):
        model = with_new_adapter(load(base, method, torch.device(work.device), dtype), Lora(8, 16), name == "reward")
        save_adapter(model, folder / name, base)


def roles_on(work: Work, folder: Path) -> Roles:
    """The roles of a run. What they are made from is made in another process: here it would count as memory."""
    maker = multiprocessing.get_context("fork").Process(target=make_adapters, args=(work, folder))
    maker.start()
    maker.join()
    return loaded(work, folder)


def loaded(work: Work, folder: Path) -> Roles:
    """The roles from what `make_adapters` made."""
    base, (method, dtype) = find_base(work.model), precision(work)
    model = load_base(base, method, torch.device(work.device), dtype)
    return Roles(model, folder / "init", [folder / "reward"], Lora(8, 16), work.value_backbone)


def gemm_peak(dtype: torch.dtype, size: int = 2048, times: int = 5) -> float:
    """The machine's best GFLOP/s on a square product, by the quicker of torch's two libraries."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = 0.0
    for product in (torch.matmul, linear) * times:
        began = time.perf_counter()
        product(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def flops(work: Callable[[], object]) -> int:
    """Of every product in a call; the counter has to be told what oneDNN's operator does."""

    def product(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]

    onednn = {torch.ops.mkldnn._linear_pointwise: product} if ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        work()
    return counter.get_total_flops()


def updates(work: Work, roles: Roles) -> Callable[[int], dict[str, float]]:
    """Update number n, as `stage=ppo` makes it: its seconds by phase."""
    tokenizer = load_tokenizer(find_base(work.model))
    stops = () if work.fixed else stop_token_ids(tokenizer, roles.model.generation_config)
    engine = HfEngine(stops, tokenizer.pad_token_id, work.tokens)
    asked = [Conversation((Message("user", text),)) for text in PROMPTS * work.batch for _ in range(work.group)]
    prompts = [p.input_ids for p in encode_prompts(tokenizer, asked, 1024)[0]]
    optimiser = torch.optim.AdamW([p for role in roles.trainable for p in roles.parameters_of(role)], lr=1e-5)
    size = work.micro_batch or work.batch
    in_loss = work.advantage == "grpo"
    kl = {"kl_coef": work.kl_coef, "kl_estimator": "k3" if in_loss else "k1"}
    losses = Losses(value_clip_range=0.2, **(kl if in_loss else {}))

    def one(number: int) -> dict[str, float]:
        laps = {"start": time.perf_counter()}
        first = number * work.batch % (len(prompts) - work.batch)
        seeds = row_seeds(range(work.batch), number)
        rollout = engine.generate(prompts[first : first + work.batch], roles.actor("policy"), seeds)
        laps["rollout_s"] = time.perf_counter()
        scores = compute_in_chunks(roles.scores, rollout, size)
        estimates, cached = compute_estimates(roles, rollout, temperature=1.0, micro_batch=size, minibatches=1)
        made, _ = assemble_experience(
            rollout, scores, *estimates, estimator=Estimator(work.advantage, work.group), kl_in_reward=not in_loss, **kl
        )  # fmt: skip
        laps["estimate_s"] = time.perf_counter()
        take_gradient_steps(
            roles, optimiser, made, cached, epochs=work.epochs, minibatch_count=1, max_grad_norm=1.0,
            generator=torch.Generator().manual_seed(number), micro_batch=size, temperature=1.0,
            losses=losses,
        )  # fmt: skip
        laps["update_s"] = time.perf_counter()
        times = list(laps.values())
        return {name: b - a for name, a, b in zip(list(laps)[1:], times, times[1:], strict=False)}

    return one


def main(work: Work) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        roles = roles_on(work, Path(folder))  # before anything starts threads, which a fork would not have
    one = updates(work, roles)
    laps: list[dict[str, float]] = []
    marks = [time.process_time()]
    for number in range(work.updates):
        laps.append(one(number))
        marks.append(time.process_time())
    memory = get_peak_rss_mb()  # before anything that an update does not need
    phases = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    seconds = [sum(lap.values()) for lap in laps]
    peak = gemm_peak(torch.float32 if work.dtype == "float32" else torch.bfloat16)
    share = flops(lambda: one(0)) / statistics.median(seconds[1:]) / 1e9 / peak
    processor = statistics.median(b - a for a, b in pairwise(marks[1:]))
    report(
        work, seconds, peak_rss_mb=memory, **phases, gemm_peak_share=share, gemm_peak_gflops=peak,
        cpu_s_per_update=processor,
    )  # fmt: skip


if __name__ == "__main__":
    main(Work.of(sys.argv[1]))
