"""Two ranks against one process: the same commands, and by how much metrics and weights differ.

    python benchmarks/scale/equal.py [--cases sft,ppo] [--kills 10] [--save equal.json]

One process takes two micro-batches an optimiser step and two ranks one each, in fp32 on a CPU, with the built-in model
and an epoch whose last step is short. `--kills N`: so many times a rank of a stage is killed (SIGKILL) at a random
moment, and the run is continued by one process or two ranks in turn. Ranks are forked and told by the environment what
a launcher tells them, so that none imports torch anew. A quarter of an hour on two busy CPU cores with ten kills.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

import torch  # noqa: E402
from processes import Forks, forking  # noqa: E402  # pyright: ignore[reportMissingImports]
from ranked import started  # noqa: E402  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file  # noqa: E402

from align.track import read_rows  # noqa: E402

MODEL = ("model=pocket", "method=lora", "device=cpu", "data=files", "seed=1", "data.max_length=64")
PACE = ("stage.batch_size=8", "stage.micro_batch=4", "stage.save_every=2")
SUPERVISED = (*MODEL, *PACE, "stage.log_every=1", "stage.epochs=2", "stage.warmup=0.2")
PPO = (
    *MODEL, *PACE, "data.path=talk.jsonl", "init=sft:sft-one", "reward.ref=reward:reward-one", "stage.updates=6",
    "stage.minibatches=1", "rollout.max_new_tokens=8", "rollout.batch_size=4", "stage.normalise_on=8",
)  # fmt: skip
CASES = {
    "sft": (*SUPERVISED, "data.path=talk.jsonl", "data.held_out=0.2", "stage.eval_every=3", "stage.lr=1e-3"),
    "reward": (*SUPERVISED, "data.path=pairs.jsonl", "stage.held_out=0.2", "init=sft:sft-one", "stage.lr=1e-3"),
    "dpo": (*SUPERVISED, "data.path=pairs.jsonl", "stage.held_out=0.2", "init=sft:sft-one", "stage.lr=1e-3"),
    "full": (*SUPERVISED, "method=full", "data.path=talk.jsonl", "data.held_out=0.2", "stage.lr=1e-4"),
    "ppo": PPO,
    "ppo-bf16": (*PPO, "dtype=bfloat16"),
    "ppo-micro": (*PPO, "stage.micro_batch=1"),  # four a rank: sums in another order
}  # fmt: skip
ROWS = 38
ENDS_WITHIN_S = 60.0


def write_data(folder: Path) -> None:
    """Rows of different lengths, so many that the last step of an epoch is short."""
    draw = random.Random(0)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "to", "see", "what", "dog", "had")

    def said(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(2, 9)))}

    asked = [said("user") for _ in range(ROWS)]
    talk = [{"messages": [one, said("assistant")]} for one in asked]
    pairs = [{"prompt": [q], "chosen": [said("assistant")], "rejected": [said("assistant")]} for q in asked]
    for name, rows in (("talk", talk), ("pairs", pairs)):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run(forks: Forks, folder: Path, words: Sequence[str], world: int) -> None:
    for child in started(forks, folder, *words, world=world):
        ended = child.ended()
        if ended.status:
            raise SystemExit(f"{' '.join(words)} on {world}: {ended}")


def killed(forks: Forks, folder: Path, words: Sequence[str], metrics: Path, step: int, wait_s: float, rank: int) -> str:
    """Kill a rank of two so many seconds after a step has its row; returns how the other one ended."""
    children = started(forks, folder, *words, world=2)
    while not metrics.exists() or len(read_rows(metrics)) < step:
        if children[0].poll() is not None:
            raise SystemExit(f"ended before it was killed: {children[0].ended()}")
        time.sleep(0.01)
    time.sleep(wait_s)
    os.kill(children[rank].pid, signal.SIGKILL)
    other = children[1 - rank].ended(ENDS_WITHIN_S)
    children[rank].ended()
    return f"status {other.status}"


def compared(one: Path, other: Path) -> dict[str, Any]:
    """How far two runs are apart."""
    rows = [read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    tensors = [
        {str(f.relative_to(folder)): load_file(f) for f in sorted((folder / "artifact").rglob("*.safetensors"))}
        for folder in (one, other)
    ]
    flat = [{(f, name): t for f, part in found.items() for name, t in part.items()} for found in tensors]
    assert flat[0].keys() == flat[1].keys(), "other tensors"
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]], "other rows"
    equal = sum(torch.equal(t, flat[1][key]) for key, t in flat[0].items())
    return {
        "metrics_equal": rows[0] == rows[1], "figures": furthest(*rows), "tensors": len(flat[0]),
        "tensors_equal": equal,
        "weights_off": max(float((t.float() - flat[1][key].float()).abs().max()) for key, t in flat[0].items()),
    }  # fmt: skip


def furthest(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figure → largest relative difference, of those that differ."""
    off: dict[str, float] = {}
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            if value != other[name]:
                off[name] = max(off.get(name, 0.0), abs(value - other[name]) / max(abs(value), 1e-12))
    return off


def needed(cases: Sequence[str]) -> list[str]:
    """The cases in the order of a project, with those whose runs others start from."""
    later = any(case.partition("-")[0] in ("dpo", "ppo", "reward") for case in cases)
    return [case for case in CASES if case in cases or (later and case in ("sft", "reward"))]


def compare(cases: Sequence[str], kills: int, folder: Path) -> dict[str, Any]:
    """By case: two ranks against one process, and the runs that were killed."""
    write_data(folder)
    draw, found = random.Random(1), dict[str, Any]()

    def made(case: str, name: str) -> tuple[list[str], Path]:
        """The command of a run, and its folder."""
        stage = case.partition("-")[0]
        return [f"stage={stage}", *CASES[case], f"run.name={case}-{name}"], folder / "runs" / stage / f"{case}-{name}"

    with forking() as forks:
        for case in needed(cases):
            for name, world in (("one", 1), ("two", 2)):
                run(forks, folder, made(case, name)[0], world)
            found[case] = compared(made(case, "one")[1], made(case, "two")[1])
            print(case, json.dumps(found[case]), flush=True)
        exact = [case for case in cases if case != "ppo-micro"]
        for number in range(kills):
            case, world, rank = exact[number % len(exact)], 1 + number // len(exact) % 2, draw.randrange(2)
            words, cut = made(case, f"killed-{number}")
            whole = made(case, "one" if case != "full" else "two")[1]
            step, wait_s = draw.randint(1, len(read_rows(whole / "metrics.jsonl")) - 2), draw.uniform(0, 0.2)
            other = killed(forks, folder, words, cut / "metrics.jsonl", step, wait_s, rank)
            run(forks, folder, words, world)
            told = {"rank": rank, "after_row": step, "the_other": other, "continued_on": world}
            found[case].setdefault("killed", []).append(told | compared(whole, cut))
            print(case, json.dumps(found[case]["killed"][-1]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="divided by commas")
    parser.add_argument("--kills", type=int, default=0, help="in all; the cases take turns")
    parser.add_argument("--save", type=Path, help="where to write the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="align-equal-") as scratch:
        figures = compare(given.cases.split(","), given.kills, Path(scratch))
    if given.save:
        machine = {"processor": platform.machine(), "cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__}
        given.save.write_text(json.dumps({"machine": machine, "cases": figures}, indent=2) + "\n")
