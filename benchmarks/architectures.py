"""Every causal type that transformers builds small, beside transformers itself: align/models/architectures.json.

    python benchmarks/architectures.py              all types: the table and docs/architectures.md
    python benchmarks/architectures.py llama gpt2   these types: their rows are printed, nothing is written

Each type is measured in a forked process with a limit of time. What is right is what `AutoModelForCausalLM` says of one
row at a time, without padding, and what its own `generate` writes; `measured.py` has the questions.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import signal
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from measured import measure
from small_models import TYPES

from align.models.architectures import TABLE

DOC = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
LIMIT_S = 600.0


def apart(model_type: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The row of a type, measured in a process of its own: a crash or a hang is a row too."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(measure(model_type)))
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(limit_s) else {"path": "unbuilt", "cause": f"not done after {limit_s:.0f} s"}
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL  # by the kernel, where memory ended
        cause = "too large in its smallest shape for this machine" if killed else f"it ends with {process.exitcode}"
        row = {"path": "unbuilt", "cause": cause}
    if process.is_alive():
        process.kill()
    process.join()
    return row


def sweep(types: tuple[str, ...]) -> dict[str, Any]:
    rows = {}
    for name in types:
        began = time.perf_counter()
        rows[name] = apart(name)
        shown = {k: v for k, v in rows[name].items() if k not in ("settings", "variants")}
        print(f"{name:28}{time.perf_counter() - began:6.1f} s  {shown}", flush=True)
    return rows


PATHS = {
    "fast": "align computes hidden states and head separately, with a reserved cache and short forwards on a CPU",
    "plain": "the model's own forward, with transformers' own cache",
    "refused": "refused before weights are loaded",
    "unbuilt": "not measured: takes the plain path and is probed when it is loaded",
}


PROVEN = (
    (
        "Each type on the fast or the plain path was measured as a small model, in fp32, on a CPU. It had to give "
        "the model's own logits (for padded rows: those of each row alone), the tokens of transformers' own "
        "greedy `generate`, an SFT step with the loss of those logits, a PPO update whose first ratio is 1, and a "
        "merged model with the logits of base and adapter."
    ),
    (
        "*Padded*: rows of several lengths can go through the model together. *Packed*: `stage.packing` can be "
        "used. *Off*: the largest difference of a logprob, in nats. *Proven with*: the kinds of layers in the "
        "measured models (`+`: all of these in one model); after the semicolon, the settings that were varied, "
        "one alone and several together. All other settings had their defaults. *Cause*: why a type is not on the "
        "fast path, or cannot be trained here."
    ),
    ("A configuration that was not measured takes the plain path, is probed when it is loaded, and cannot pack rows."),
)


def proven_with(row: dict[str, Any]) -> str:
    """The kinds of layers of a measured type, and the settings that were varied."""
    settings = row.get("settings", {})
    layers = [f"{key}={value}" for key, value in settings.items() if re.search(r"layers?_.*types?$", key)]
    varied: dict[str, list[str]] = {}
    for variant in row.get("variants", ()):
        for key, value in variant.items():
            varied.setdefault(key, []).append(str(value).lower() if isinstance(value, bool) else str(value))
    changed = [f"{key}={' or '.join(dict.fromkeys(values))}" for key, values in varied.items()]
    return "; ".join(filter(None, (", ".join(layers), ", ".join(changed))))


def document(table: dict[str, Any]) -> str:
    """docs/architectures.md."""
    rows = table["types"]
    counts = {path: sum(r["path"] == path for r in rows.values()) for path in PATHS}
    lines = [
        "# Architectures",
        "",
        "This page lists transformers' causal model types, and which of them align can train.",
        "`python benchmarks/architectures.py` makes it; do not edit it.",
        "[decisions.md](decisions.md#an-architecture-is-supported-where-it-was-measured) says how types are measured.",
        "",
        f"transformers {table['transformers']}, {len(rows)} causal types; {table['minutes']} minutes of one processor.",
        "",
        "| path | types | meaning |",
        "| --- | --- | --- |",
        *(f"| {path} | {counts[path]} | {said} |" for path, said in PATHS.items()),
        "",
        *(line for paragraph in PROVEN for line in (*textwrap.wrap(paragraph, 120), "")),
        "| type | path | padded | packed | off | proven with | cause |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        marks = ("yes" if row.get(k) else "no" for k in ("padding", "packing")) if "off" in row else ("", "")
        off = f"{row['off']:.0e}" if "off" in row else ""
        lines.append(f"| {name} | {row['path']} | {' | '.join(marks)} | {off} | {proven_with(row)} | {row['cause']} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = sweep(tuple(names) or TYPES)
    if names:
        return
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = round((spent.ru_utime + spent.ru_stime) / 60)
    table = {"transformers": transformers.__version__, "minutes": minutes, "types": rows}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    DOC.write_text(document(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
