"""Memory of policy, value, reward and reference on one base, beside four models of their own.

python benchmarks/ppo/memory.py [MODEL_FOLDER] [--rows 16] [--save memory.json]      (by default what run.py makes)

Each figure is the peak of a process over what its imports take: the models, and one update's passes on the same rows
(a pass of each role, a gradient of policy and value). Apart, the models are what people load who have no roles: the
policy and the value are adapters on bases of their own, reward and reference whole models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from ours import precision, roles_on
from work import RESULT, Work, result_of

from align.core.types import Rollout
from align.models.adapters import with_new_adapter
from align.models.base import find_base
from align.models.forward import hidden_size, hidden_states, response_logprobs, states_before
from align.models.load import load_base
from align.models.lora import Lora
from align.models.roles import linear_head
from align.track import get_peak_rss_mb

HERE = Path(__file__).resolve().parent
PROMPT, RESPONSE = 36, 32


def rollout(rows: int) -> Rollout:
    """Rows of the benchmark's size."""
    tokens = torch.randint(10, 200, (rows, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(0))
    return Rollout(tokens, torch.ones_like(tokens, dtype=torch.bool), PROMPT, torch.ones(rows, dtype=torch.bool))


def together(work: Work) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roles = roles_on(work, Path(folder))
    rows = rollout(work.batch)
    roles.scores(rows)
    roles.estimates(rows, 1.0)
    read = roles.logprobs("policy", rows, 1.0, train=True)
    read.logprobs_BT.sum().backward()
    roles.values(rows, train=True, policy_states_BTD=read.states_BTD).sum().backward()


def apart(work: Work) -> None:
    base, (method, dtype) = find_base(work.model), precision(work)
    policy, value, reward, reference = (load_base(base, method, torch.device("cpu"), dtype) for _ in range(4))
    policy, value = (with_new_adapter(model, Lora(8, 16)) for model in (policy, value))
    for name, parameter in [*policy.named_parameters(), *value.named_parameters()]:
        if "lora_" in name:
            parameter.data = parameter.data.float()
    head = linear_head(torch.zeros(1, hidden_size(value)))
    rows = rollout(work.batch)
    with torch.no_grad():
        hidden_states(reward, rows.tokens_BS, rows.mask_BS)
        response_logprobs(reference, rows, 1.0)
        response_logprobs(policy, rows, 1.0)
        states_before(hidden_states(value, rows.tokens_BS, rows.mask_BS), rows)
    response_logprobs(policy, rows, 1.0)[0].sum().backward()
    head(states_before(hidden_states(value, rows.tokens_BS, rows.mask_BS), rows).float()).sum().backward()


def measured(what: str, work: Work) -> float:
    """MB over the imports of one process."""
    return result_of([sys.executable, str(Path(__file__)), "--child", what, work.text()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HERE / ".models" / "smollm2"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        imports = get_peak_rss_mb()
        {"together": together, "apart": apart}[given.child[0]](Work.of(given.child[1]))
        print(RESULT + str(get_peak_rss_mb() - imports))
        return
    table = {}
    print(f"{'':<31}{'one base':>10}{'four models':>13}{'ratio':>7}   MB over the imports, {given.rows} rows")
    for dtype, backbone in (("nf4", "own"), ("nf4", "policy"), ("bfloat16", "own"), ("float32", "own")):
        work = Work(given.model, given.rows, RESPONSE, 1, 1, dtype, value_backbone=backbone)
        ours, theirs = measured("together", work), measured("apart", work)
        table[f"{dtype}, value on {backbone}"] = {"together_mb": round(ours), "apart_mb": round(theirs)}
        row = f"{dtype}, value_backbone={backbone}"
        print(f"{row:<31}{ours:>10.0f}{theirs:>13.0f}{ours / theirs:>7.2f}", flush=True)
    if given.save:
        given.save.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
