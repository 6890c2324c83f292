"""Measure every causal type of transformers as a small model, and write align/models/architectures.json.

    python benchmarks/architectures.py              all types: the table and docs/architectures.md
    python benchmarks/architectures.py llama gpt2   these types: their rows are printed, nothing is written

Each type is measured in a forked process with a time limit. Expected are the logits of `AutoModelForCausalLM` for one
row at a time, without padding, and the tokens of its own `generate`; `measure_architecture.py` has the checks.
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
from measure_architecture import measure_type
from small_models import TYPES

from align.models.architectures import TABLE

DOC = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
LIMIT_S = 600.0


def measure_type_in_fork(model_type: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Return the row of a type, measured in a process of its own."""
    return measure_in_fork(lambda: measure_type(model_type), limit_s)


def measure_in_fork(measure: Callable[[], dict[str, Any]], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Call a function in a forked process and return its row. If the process crashes or takes too long, return a row
    that says so."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure()))
    process.start()
    sender.close()
    try:
        row = (
            receiver.recv()
            if receiver.poll(limit_s)
            else {"path": "unbuilt", "cause": f"not done after {limit_s:.0f} s"}
        )
    except EOFError:
        process.join()
        is_out_of_memory = process.exitcode == -signal.SIGKILL
        cause = (
            "too large in its smallest shape for this machine"
            if is_out_of_memory
            else f"it ends with {process.exitcode}"
        )
        row = {"path": "unbuilt", "cause": cause}
    if process.is_alive():
        process.kill()
    process.join()
    return row


def measure_types(types: tuple[str, ...]) -> dict[str, Any]:
    """Measure types one after another and print their rows. Returns type → row."""
    rows = {}
    for name in types:
        started = time.perf_counter()
        rows[name] = measure_type_in_fork(name)
        columns = {key: value for key, value in rows[name].items() if key not in ("settings", "variants")}
        print(f"{name:28}{time.perf_counter() - started:6.1f} s  {columns}", flush=True)
    return rows


PATHS = {
    "fast": "align computes hidden states and head separately, with a reserved cache and short forwards on a CPU",
    "plain": "the model's own forward, with transformers' own cache",
    "refused": "refused before weights are loaded",
    "unbuilt": "not measured: takes the plain path and is probed when it is loaded",
}


TYPE_NOTES = (
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


def describe_proof(row: dict[str, Any]) -> str:
    """Return the kinds of layers of a measured type, and the settings that were varied."""
    settings = row.get("settings", {})
    layers = [f"{key}={value}" for key, value in settings.items() if re.search(r"layers?_.*types?$", key)]
    values_by_setting: dict[str, list[str]] = {}
    for variant in row.get("variants", ()):
        for key, value in variant.items():
            values_by_setting.setdefault(key, []).append(str(value).lower() if isinstance(value, bool) else str(value))
    variations = [f"{key}={' or '.join(dict.fromkeys(values))}" for key, values in values_by_setting.items()]
    return "; ".join(filter(None, (", ".join(layers), ", ".join(variations))))


CHECKPOINT_NOTES = (
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


def format_checkpoint_section(table: dict[str, Any]) -> list[str]:
    """Return the lines of docs/architectures.md on published checkpoints."""
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
        *(line for paragraph in CHECKPOINT_NOTES for line in (*textwrap.wrap(paragraph, 120), "")),
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


def format_page(table: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    rows = table["types"]
    counts = {path: sum(row["path"] == path for row in rows.values()) for path in PATHS}
    lines = [
        "# Architectures",
        "",
        "This page lists published checkpoints and transformers' causal model types, and which of them align can",
        "train. `python benchmarks/architectures.py` and `python benchmarks/checkpoints.py` make it; do not edit it.",
        "[decisions.md](decisions.md#an-architecture-is-supported-where-it-was-measured) says how types are measured.",
        "",
        *format_checkpoint_section(table),
        "## Types",
        "",
        f"transformers {table['transformers']}, {len(rows)} causal types; {table['minutes']} minutes of one processor.",
        "",
        "| path | types | meaning |",
        "| --- | --- | --- |",
        *(f"| {path} | {counts[path]} | {meaning} |" for path, meaning in PATHS.items()),
        "",
        *(line for paragraph in TYPE_NOTES for line in (*textwrap.wrap(paragraph, 120), "")),
        "| type | path | padded | packed | off | proven with | cause |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        marks = ("yes" if row.get(key) else "no" for key in ("padding", "packing")) if "off" in row else ("", "")
        off = f"{row['off']:.0e}" if "off" in row else ""
        lines.append(
            f"| {name} | {row['path']} | {' | '.join(marks)} | {off} | {describe_proof(row)} | {row['cause']} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = measure_types(tuple(names) or TYPES)
    if names:
        return
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = round((usage.ru_utime + usage.ru_stime) / 60)
    previous_table = json.loads(TABLE.read_text(encoding="utf-8"))
    table = {**previous_table, "transformers": transformers.__version__, "minutes": minutes, "types": rows}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    DOC.write_text(format_page(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
