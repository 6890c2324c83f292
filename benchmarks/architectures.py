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
from collections.abc import Callable
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
    """Measure a type in a process of its own and return its row. A crash or a hang is a row too."""
    return run_apart(lambda: measure(model_type), limit_s)


def run_apart(measurement: Callable[[], dict[str, Any]], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Return the row that a measurement returns in a process of its own, or a row that says how the process ended."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(measurement()))
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
    (
        "A configuration that was not measured, here or as a checkpoint, takes the plain path, is probed when it is "
        "loaded, and cannot pack rows."
    ),
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


CHECKPOINTS = (
    (
        "A type's row above is of its default settings. Checkpoints are published with others: positions that are "
        "scaled, layers of several kinds, biases, caps. This table has configurations of published checkpoints. Each "
        "was measured as a small model with the settings of its `config.json` (names, flags, what is empty, kinds of "
        "layers, scaling of positions), fewer and narrower layers, and random weights. The link leads to the "
        "configuration that was read: where the first address of a model could not be read, this is a copy or a "
        "fine-tuned model with the same configuration. `python benchmarks/checkpoints.py` makes the table from "
        "`benchmarks/published_configs.json`."
    ),
    (
        "*Path*, *padded* and *packed* are as above. *NF4*: `method=qlora` gives the model's own logprobs within the "
        "bound of this page. Where it leaves more than a fifth of the small model's matrices in full precision, as it "
        "does with experts, the table says so. *Sharded full*: `stage=full` with `devices=N`. *Batched*: `stage=serve` "
        "on a CPU answers many requests at once. Others are answered one after another."
    ),
    (
        "A checkpoint whose weights are stored quantised is refused whatever its row says: give align the weights as "
        "they were before."
    ),
)


def count_checkpoints(rows: dict[str, Any]) -> dict[str, int]:
    """Return how many checkpoints have each property of the table."""
    measured = [row for row in rows.values() if row["path"] in ("fast", "plain")]
    return {
        "checkpoints": len(rows),
        "fast": sum(row["path"] == "fast" for row in measured),
        "plain": sum(row["path"] == "plain" for row in measured),
        "refused": sum(row["path"] == "refused" for row in rows.values()),
        "unbuilt": sum(row["path"] == "unbuilt" for row in rows.values()),
        "packed": sum(row["packing"] for row in measured),
        "NF4": sum(not row["nf4"] for row in measured),
        "sharded full": sum(not row["sharded"] for row in measured),
        "batched": sum(not row["batched"] for row in measured),
    }


def checkpoint_lines(table: dict[str, Any]) -> list[str]:
    """Return the section of docs/architectures.md about published checkpoints."""
    rows = table.get("checkpoints", {})
    counts = count_checkpoints(rows)
    lines = [
        "## Published checkpoints",
        "",
        f"{counts['checkpoints']} checkpoints; {table.get('checkpoint_minutes', 0)} minutes of one processor.",
        "",
        "| " + " | ".join(counts) + " |",
        "|" + " --- |" * len(counts),
        "| " + " | ".join(map(str, counts.values())) + " |",
        "",
        *(line for paragraph in CHECKPOINTS for line in (*textwrap.wrap(paragraph, 120), "")),
        "| checkpoint | type | path | padded | packed | NF4 | sharded full | batched | cause |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[0].lower()):
        marks = [""] * 5
        if row["path"] in ("fast", "plain"):
            marks = ["yes" if row[key] else "no" for key in ("padding", "packing")]
            marks += [f"no: {row[key]}" if row[key] else "yes" for key in ("nf4", "sharded", "batched")]
        link = f"[{name}]({row['source']})"
        lines.append(f"| {link} | {row['type']} | {row['path']} | {' | '.join(marks)} | {row['cause']} |")
    return [*lines, ""]


def document(table: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    rows = table["types"]
    counts = {path: sum(r["path"] == path for r in rows.values()) for path in PATHS}
    lines = [
        "# Architectures",
        "",
        "This page lists published checkpoints and transformers' causal model types, and which of them align can",
        "train. `python benchmarks/architectures.py` and `python benchmarks/checkpoints.py` make it; do not edit it.",
        "[decisions.md](decisions.md#an-architecture-is-supported-where-it-was-measured) says how types are measured.",
        "",
        *checkpoint_lines(table),
        "## Types",
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
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    table = {**known, "transformers": transformers.__version__, "minutes": minutes, "types": rows}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    DOC.write_text(document(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
