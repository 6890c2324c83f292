"""Compare the memory of policy, value, reward and reference on one base with that of four separate models.

python benchmarks/ppo/memory.py [MODEL_FOLDER] [--rows 16] [--save memory.json]      (by default what run.py makes)

Each figure is the peak memory of a process less that of its imports: the models, and one update's passes on the same
rows (a forward pass of each role, a backward pass of policy and value). The separate models are what people load
without align's roles: policy and value are adapters on a base each, reward and reference are full models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from align_ppo import build_roles, choose_precision
from work import RESULT, Work, result_of

from align.core.types import Rollout
from align.models.adapters import add_new_adapter
from align.models.base import find_base
from align.models.forward import (
    compute_hidden_states,
    compute_response_logprobs,
    get_hidden_size,
    select_predicting_states,
)
from align.models.load import load_base
from align.models.lora import Lora
from align.models.roles import build_linear_head
from align.track import get_peak_rss_mb

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 36
RESPONSE_TOKENS = 32


def build_random_rollout(rows: int) -> Rollout:
    """Return a rollout of random tokens, of the size that the other benchmarks have."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 200, (rows, PROMPT_TOKENS + RESPONSE_TOKENS), generator=generator)
    return Rollout(tokens, torch.ones_like(tokens, dtype=torch.bool), PROMPT_TOKENS, torch.ones(rows, dtype=torch.bool))


def run_shared_base(work: Work) -> None:
    """Make the passes of an update with all roles on one base."""
    with tempfile.TemporaryDirectory() as folder:
        roles = build_roles(work, Path(folder))
    rollout = build_random_rollout(work.batch)
    roles.scores(rollout)
    roles.estimates(rollout, 1.0)
    policy_pass = roles.logprobs("policy", rollout, 1.0, train=True)
    policy_pass.logprobs_BT.sum().backward()
    roles.values(rollout, train=True, policy_states_BTD=policy_pass.states_BTD).sum().backward()


def run_separate_models(work: Work) -> None:
    """Make the passes of an update with a model for each role."""
    base = find_base(work.model)
    method, dtype = choose_precision(work)
    policy, value, reward, reference = (load_base(base, method, torch.device("cpu"), dtype) for _ in range(4))
    policy, value = (add_new_adapter(model, Lora(8, 16)) for model in (policy, value))
    for name, parameter in [*policy.named_parameters(), *value.named_parameters()]:
        if "lora_" in name:
            parameter.data = parameter.data.float()
    value_head = build_linear_head(torch.zeros(1, get_hidden_size(value)))
    rollout = build_random_rollout(work.batch)
    with torch.no_grad():
        compute_hidden_states(reward, rollout.tokens_BS, rollout.mask_BS)
        compute_response_logprobs(reference, rollout, 1.0)
        compute_response_logprobs(policy, rollout, 1.0)
        select_predicting_states(compute_hidden_states(value, rollout.tokens_BS, rollout.mask_BS), rollout)
    compute_response_logprobs(policy, rollout, 1.0)[0].sum().backward()
    value_states = select_predicting_states(compute_hidden_states(value, rollout.tokens_BS, rollout.mask_BS), rollout)
    value_head(value_states.float()).sum().backward()


LAYOUTS = {"together": run_shared_base, "apart": run_separate_models}


def measure_in_child(layout: str, work: Work) -> float:
    """Return the peak memory of a process of its own less that of its imports, in MB."""
    return result_of([sys.executable, str(Path(__file__)), "--child", layout, work.text()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HERE / ".models" / "smollm2"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("LAYOUT", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        layout, work_text = options.child
        imports_mb = get_peak_rss_mb()
        LAYOUTS[layout](Work.from_text(work_text))
        print(RESULT + str(get_peak_rss_mb() - imports_mb))
        return
    table = {}
    print(f"{'':<31}{'one base':>10}{'four models':>13}{'ratio':>7}   MB over the imports, {options.rows} rows")
    for dtype, backbone in (("nf4", "own"), ("nf4", "policy"), ("bfloat16", "own"), ("float32", "own")):
        work = Work(options.model, options.rows, RESPONSE_TOKENS, 1, 1, dtype, value_backbone=backbone)
        shared_mb = measure_in_child("together", work)
        separate_mb = measure_in_child("apart", work)
        table[f"{dtype}, value on {backbone}"] = {"together_mb": round(shared_mb), "apart_mb": round(separate_mb)}
        row_name = f"{dtype}, value_backbone={backbone}"
        print(f"{row_name:<31}{shared_mb:>10.0f}{separate_mb:>13.0f}{shared_mb / separate_mb:>7.2f}", flush=True)
    if options.save:
        options.save.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
