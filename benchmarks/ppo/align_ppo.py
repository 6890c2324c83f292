"""Measure align's side of a row: the updates of `stage=ppo`. Run by `run.py`: python align_ppo.py WORK-AS-JSON"""

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
from align.data.chat.encode import encode_prompts, find_stop_token_ids
from align.models.adapters import add_new_adapter, save_adapter
from align.models.base import find_base
from align.models.forward import compute_in_chunks
from align.models.load import load_base, load_classifier, load_tokenizer
from align.models.lora import Lora
from align.models.roles import Roles
from align.ops.linear import ONEDNN, linear
from align.ppo.experience import Estimator, assemble_experience, compute_estimates
from align.ppo.update import Losses, take_gradient_steps
from align.rollout.engine import derive_row_seeds
from align.rollout.hf import HfEngine
from align.track import get_peak_rss_mb


def choose_precision(work: Work) -> tuple[str, torch.dtype]:
    """Return `method` and the compute dtype."""
    return ("qlora", torch.bfloat16) if work.dtype == "nf4" else ("lora", getattr(torch, work.dtype))


def save_new_adapters(work: Work, folder: Path) -> None:
    """Save untrained adapters of rank 8 as the policy's start (`init`) and as the reward model (`reward`)."""
    base = find_base(work.model)
    method, dtype = choose_precision(work)
    for name, load in (("init", load_base), ("reward", load_classifier)):
        model = add_new_adapter(load(base, method, torch.device(work.device), dtype), Lora(8, 16), name == "reward")
        save_adapter(model, folder / name, base)


def build_roles(work: Work, folder: Path) -> Roles:
    """Return the roles of a run with new adapters, which another process saves: in this one it would count as
    memory."""
    process = multiprocessing.get_context("fork").Process(target=save_new_adapters, args=(work, folder))
    process.start()
    process.join()
    return load_roles(work, folder)


def load_roles(work: Work, folder: Path) -> Roles:
    """Load the roles from the adapters that `save_new_adapters` saved."""
    base = find_base(work.model)
    method, dtype = choose_precision(work)
    model = load_base(base, method, torch.device(work.device), dtype)
    return Roles(model, folder / "init", [folder / "reward"], Lora(8, 16), work.value_backbone)


def measure_gemm_peak(dtype: torch.dtype, size: int = 2048, rounds: int = 5) -> float:
    """Return the best GFLOP/s of a square product, by torch's own or by oneDNN's kernel."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = 0.0
    for multiply in (torch.matmul, linear) * rounds:
        started = time.perf_counter()
        multiply(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
    return best


def count_flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of every product in a call, those of oneDNN's operator included."""

    def count_linear(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]

    onednn = {torch.ops.mkldnn._linear_pointwise: count_linear} if ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        run()
    return counter.get_total_flops()


def build_update(work: Work, roles: Roles) -> Callable[[int], dict[str, float]]:
    """Return a function that runs update n as `stage=ppo` does, and returns the seconds of its phases."""
    tokenizer = load_tokenizer(find_base(work.model))
    stop_ids = () if work.fixed else find_stop_token_ids(tokenizer, roles.model.generation_config)
    engine = HfEngine(stop_ids, tokenizer.pad_token_id, work.tokens)
    conversations = [Conversation((Message("user", text),)) for text in PROMPTS * work.batch for _ in range(work.group)]
    prompts = [prompt.input_ids for prompt in encode_prompts(tokenizer, conversations, 1024)[0]]
    parameters = [parameter for role in roles.trainable for parameter in roles.parameters_of(role)]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5)
    micro_batch = work.micro_batch or work.batch
    kl_in_loss = work.advantage == "grpo"
    kl = {"kl_coef": work.kl_coef, "kl_estimator": "k3" if kl_in_loss else "k1"}
    losses = Losses(value_clip_range=0.2, **(kl if kl_in_loss else {}))

    def run_update(number: int) -> dict[str, float]:
        start = time.perf_counter()
        first = number * work.batch % (len(prompts) - work.batch)
        seeds = derive_row_seeds(range(work.batch), number)
        rollout = engine.generate(prompts[first : first + work.batch], roles.actor("policy"), seeds)
        rollout_end = time.perf_counter()
        scores = compute_in_chunks(roles.scores, rollout, micro_batch)
        estimates, cached = compute_estimates(roles, rollout, temperature=1.0, micro_batch=micro_batch, minibatches=1)
        experience, _ = assemble_experience(
            rollout,
            scores,
            *estimates,
            estimator=Estimator(work.advantage, work.group),
            kl_in_reward=not kl_in_loss,
            **kl,
        )
        estimate_end = time.perf_counter()
        take_gradient_steps(
            roles,
            optimiser,
            experience,
            cached,
            epochs=work.epochs,
            minibatch_count=1,
            max_grad_norm=1.0,
            generator=torch.Generator().manual_seed(number),
            micro_batch=micro_batch,
            temperature=1.0,
            losses=losses,
        )
        end = time.perf_counter()
        return {
            "rollout_s": rollout_end - start,
            "estimate_s": estimate_end - rollout_end,
            "update_s": end - estimate_end,
        }

    return run_update


def main(work: Work) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        roles = build_roles(work, Path(folder))  # first, because it forks, and a fork does not copy threads
    run_update = build_update(work, roles)
    phases_by_update: list[dict[str, float]] = []
    processor_times = [time.process_time()]
    for number in range(work.updates):
        phases_by_update.append(run_update(number))
        processor_times.append(time.process_time())
    peak_rss_mb = get_peak_rss_mb()  # before the measurements below, which take memory too
    phases = {
        name: statistics.median(update_phases[name] for update_phases in phases_by_update[1:])
        for name in phases_by_update[0]
    }
    seconds = [sum(update_phases.values()) for update_phases in phases_by_update]
    gemm_peak = measure_gemm_peak(torch.float32 if work.dtype == "float32" else torch.bfloat16)
    gemm_share = count_flops(lambda: run_update(0)) / statistics.median(seconds[1:]) / 1e9 / gemm_peak
    report(
        work,
        seconds,
        peak_rss_mb=peak_rss_mb,
        **phases,
        gemm_peak_share=gemm_share,
        gemm_peak_gflops=gemm_peak,
        cpu_s_per_update=statistics.median(end - start for start, end in pairwise(processor_times[1:])),
    )


if __name__ == "__main__":
    main(Work.from_text(sys.argv[1]))
