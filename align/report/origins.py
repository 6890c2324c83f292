"""The section of a report on a run's inputs and settings: command, base model, data, hardware, code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from align.report.figure_text import (
    format_duration,
    format_figure,
    format_percent,
    format_timestamp,
    is_interval,
    pluralize,
)
from align.report.page import Code, Fact, Link
from align.report.run_view import RunView
from align.run.manifest import Base, Input, Manifest
from align.track import truncate_text

METHODS = {
    "qlora": "QLoRA: an adapter on the base in NF4 (4 bits)",
    "lora": "LoRA: an adapter on the unquantised base",
    "full": "every weight trains",
}
INPUT_TERMS = {
    "init": "Started from",
    "artifact": "Looks at",
    "reward": "Reward",
    "annotations": "Votes",
    "items": "Items",
}
"""Name of a manifest's input, up to its first dot → its term on the report page."""
IN_EVAL = " that data.eval_path asks too"


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The names of the metrics that count a split's kept, dropped and truncated rows, with words for them.

    Attributes:
        kept: metric with the number of rows that were kept.
        noun: what it counts, in the singular.
        purpose: what the rows are for.
        dropped: metric with a number of dropped rows → reason; empty if they were too long.
        truncated: metric with the number of truncated rows; empty if rows are never truncated.
    """

    kept: str
    noun: str
    purpose: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    truncated: str = ""


ROW_COUNTS = (
    RowCounts(
        "train_rows",
        "row",
        " to train on",
        {"dropped_too_long": "", "dropped_unanswered": " without an answer", "dropped_in_eval": IN_EVAL},
        "cut",
    ),
    RowCounts("pairs", "pair", " to train on", {"dropped": "", "dropped_in_eval": IN_EVAL}),
    RowCounts("prompts", "prompt", "", {"dropped": "", "dropped_in_eval": IN_EVAL}),
    RowCounts("held_out_prompts", "prompt", " to measure on"),
    RowCounts(
        "held_out_rows",
        "row",
        " held out",
        {"held_out_too_long": "", "held_out_unanswered": " without an answer"},
        "held_out_cut",
    ),
    RowCounts("held_out_pairs", "pair", " held out", {"held_out_dropped": ""}),
    RowCounts("held_out_answers", "answer", " held out", {"held_out_dropped": ""}),
)
REASONING = {
    "mask": "reasoning is read, and left out of the loss (data.reasoning=mask)",
    "hide": "reasoning is taken out of the rows (data.reasoning=hide)",
}
"""Value of `data.reasoning` → explanation, for the values that are not the default."""
LONGEST_SYSTEM = 200
"""Maximum number of characters of a system prompt that a report shows."""
DIGITS = 12
"""Number of hexadecimal digits of a digest or a commit that a report shows."""


def list_origins(view: RunView) -> list[tuple[str, list[Fact]]]:
    """Return the list of a run's inputs and settings for its report, as (term, explanations) pairs.

    The terms are command, base model, method, inputs, data, batch, machine, code and so on. Unknown ones are left out.
    """
    manifest = view.manifest
    first_start = get_first_start_time(manifest)
    terms: list[tuple[str, list[Fact]]] = [
        ("Command", [Code(view.command)] if view.command else []),
        ("Base", list(describe_base(manifest.base, view.folder))),
        ("Method", list(describe_method(view))),
        *collect_inputs(manifest, view.folder).items(),
        ("Data", list(describe_data(view))),
        ("Learning rate", list(describe_learning_rate(view.settings))),
        ("Batch", list(describe_batch(view.settings))),
        ("Seed", [str(manifest.seed)]),
        ("Started", [format_timestamp(first_start)] if first_start else []),
        ("Took", [describe_running_time(manifest)] if manifest.times.get("finished") else []),
        ("Computed on", [describe_machine(manifest, view.config)]),
        ("Versions", [", ".join(f"{name} {version}" for name, version in manifest.packages.items())]),
        ("Code", list(describe_code(manifest))),
    ]
    return [(term, [part for part in parts if part]) for term, parts in terms if any(parts)]


def describe_base(base: Base | None, folder: Path) -> Iterator[Fact]:
    """Yield the name and digest of the base model, or a link to the report of the run that made it and the digest.

    Args:
        folder: the folder of the run that is described.
    """
    if base is None:
        return
    base_run = Path(base.path).absolute().parent
    digest = f"sha256 {base.digest[:DIGITS]}…"
    if Path(base.path).name == "artifact" and base_run.parent.parent == folder.parent.parent.absolute():
        yield link_to_report(base_run.parent.name, base_run.name, folder)
        yield digest
    else:
        yield f"{base.id}{f', revision {base.revision[:DIGITS]}' if base.revision else ''}, {digest}"


def describe_method(view: RunView) -> Iterator[str]:
    method = view.config.get("method", {})
    if view.manifest.base is None or method.get("name") not in METHODS:
        return
    yield METHODS[method["name"]]
    # Other stages continue an adapter with the parameters that it has.
    if view.manifest.stage == "sft" and "r" in method and method["name"] != "full":
        parameters = [f"rank {method['r']}", f"alpha {method['alpha']}"]
        if method.get("dropout"):
            parameters.append(f"dropout {method['dropout']:g}")
        parameters += [name for key, name in (("rslora", "rsLoRA"), ("dora", "DoRA")) if method.get(key)]
        yield ", ".join(parameters)


def collect_inputs(manifest: Manifest, folder: Path) -> dict[str, list[Fact]]:
    """Return a mapping from term, such as `Started from`, to descriptions of the runs and files that a run read."""
    inputs: dict[str, list[Fact]] = {}
    for name, run_input in manifest.inputs.items():
        if term := INPUT_TERMS.get(name.partition(".")[0]):
            inputs.setdefault(term, []).append(describe_input(run_input, folder))
    return inputs


def describe_input(run_input: Input, folder: Path) -> Fact:
    if run_input.stage:
        return link_to_report(run_input.stage, run_input.name, folder)
    if run_input.project:
        last_row = f", up to row {run_input.seq:,} of the ledger" if run_input.seq >= 0 else ""
        return f"project {run_input.project} of the annotation store{last_row}"
    return run_input.ref


def link_to_report(stage: str, name: str, folder: Path) -> Fact:
    """Return a link to another run's report, or `stage:name` as text if it has no report in the same `run.root`."""
    has_report = (folder.parent.parent / stage / name / "report.html").is_file()
    return Link(f"{stage}:{name}", f"../../{stage}/{quote(name)}/report.html") if has_report else f"{stage}:{name}"


def describe_data(view: RunView) -> Iterator[str]:
    """Yield phrases on the run's data: its source, its chat template and the numbers of rows kept and dropped."""
    data = view.config.get("data", {})
    data_input = view.manifest.inputs.get("data")
    if data_input is None:
        return
    if data_input.project:
        yield str(describe_input(data_input, view.folder))
    elif data.get("path"):
        yield f"{data_input.ref or data['path']}, sha256 {data_input.digest[:DIGITS]}…"
        if data.get("eval_path"):
            yield f"measured on {data['eval_path']}"
    elif version := data_input.details.get("tasks_version"):
        yield f"{data_input.path}, reasoning-gym {version}, sha256 {data_input.digest[:DIGITS]}…"
    else:
        yield f"the corpus {data['name']}{', part ' + data['part'] if data.get('part') else ''}"
    yield from describe_rendering(data)
    metrics = view.metrics
    if view.manifest.stage == "sample":  # its pairs are made from the answers, not read
        metrics = {key: value for key, value in metrics.items() if key != "pairs"}
    yield from describe_row_counts(metrics, data.get("max_length"))


def describe_rendering(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield phrases on the chat template, system prompt and reasoning of the run's conversations, if not the default.

    Args:
        data: the configuration under `data`.
    """
    if data.get("template"):
        yield f"chat template {data['template']}, in place of the model's own"
    if kwargs := data.get("template_kwargs"):
        yield f"arguments of the chat template: {', '.join(f'{name}={value}' for name, value in kwargs.items())}"
    if data.get("system"):
        yield f"system turn where a row has none: {truncate_text(data['system'], LONGEST_SYSTEM)}"
    if reasoning := REASONING.get(data.get("reasoning", "")):
        yield reasoning


def describe_row_counts(metrics: Mapping[str, Any], max_length: int | None) -> Iterator[str]:
    """Yield phrases on the numbers of training and held-out rows that were used, dropped and truncated.

    Args:
        max_length: `data.max_length`, in tokens.
    """
    too_long = f" for being longer than {max_length:,} tokens" if max_length else " for their length"
    if is_interval(metrics.get("win_rate")):
        metrics = {"prompts": metrics["win_rate"]["n"], **metrics}
    if "wanted" in metrics:
        dropped = f"; dropped {metrics['dropped']:,}{too_long}" if metrics.get("dropped") else ""
        yield f"{metrics['wanted']:,} wanted and {metrics['unwanted']:,} unwanted answers to train on{dropped}"
    for counts in ROW_COUNTS:
        if counts.kept in metrics:
            kept = metrics[counts.kept]
            # Rows of the evaluation data are dropped before the number of rows is limited, so they are not in the sum.
            total = kept + sum(metrics.get(key, 0) for key in counts.dropped if key != "dropped_in_eval")
            rows = f"{kept:,} of {pluralize(total, counts.noun)}" if total > kept else pluralize(total, counts.noun)
            reasons = [
                f"{metrics[key]:,}{reason or too_long}" for key, reason in counts.dropped.items() if metrics.get(key)
            ]
            dropped = f"; dropped {' and '.join(reasons)}" if reasons else ""
            truncated = ""
            if max_length and metrics.get(counts.truncated):
                truncated = f"; cut {metrics[counts.truncated]:,} at {max_length:,} tokens"
            yield f"{rows}{counts.purpose}{dropped}{truncated}"
    if undecided := metrics.get("dropped_undecided"):
        yield f"left out {pluralize(undecided, 'pair')} whose answers are equal, tied or alone"
    if skipped := metrics.get("skipped_rows"):
        yield f"left out {pluralize(skipped, 'row')} that could not be kept"
    lost_reasoning = [
        f"of {answers} in {pluralize(metrics[key], 'row')}"
        for answers, key in (
            ("the last answer", "reasoning_lost_last"),
            ("earlier answers", "reasoning_lost_earlier"),
        )
        if metrics.get(key)
    ]
    if lost_reasoning:
        yield f"the chat template left out the reasoning {' and '.join(lost_reasoning)}"


def describe_learning_rate(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the learning rate with its schedule and warmup as text, and then the critic's if there is one.

    Args:
        settings: the configuration under `stage`.
    """
    if settings.get("lr") is None:
        return
    schedule = f", {settings['schedule']} schedule" if settings.get("schedule") else ""
    warmup = f", warmed up over {format_percent(settings['warmup'])} of the steps" if settings.get("warmup") else ""
    yield f"{settings['lr']:g}{schedule}{warmup}"
    has_critic = settings.get("advantage", "gae") == "gae"
    if settings.get("value_lr") is not None and has_critic:
        yield f"{settings['value_lr']:g} for the value"


def describe_batch(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield one phrase on the batch size, the answers per prompt and the micro-batch size, if there is a batch size.

    Args:
        settings: the configuration under `stage`.
    """
    if settings.get("batch_size") is None:
        return
    unit = "answers an update" if "updates" in settings else "a step"
    group_size = settings.get("group_size") or 1
    group = f", {group_size:,} to each prompt" if group_size > 1 else ""
    micro_batch = settings.get("micro_batch")
    at_once = f", {micro_batch:,} at once" if micro_batch else ""
    yield f"{settings['batch_size']:,} {unit}{group}{at_once}"


def get_first_start_time(manifest: Manifest) -> str:
    """Return the ISO 8601 time at which a run started, before any resume; empty if it is not recorded."""
    return manifest.times.get("first_started") or manifest.times.get("started", "")


def describe_running_time(manifest: Manifest) -> str:
    """Return the duration of a finished run as text. That of a resumed run counts from its last start."""
    start, end = (datetime.fromisoformat(manifest.times[key]) for key in ("started", "finished"))
    resumed = ", since it was continued" if "first_started" in manifest.times else ""
    return format_duration((end - start).total_seconds()) + resumed


def describe_machine(manifest: Manifest, config: Mapping[str, Any]) -> str:
    """Return the run's device, dtype, machine type and number of CPUs as text.

    Device and dtype are from its configuration if the manifest lacks them.
    """
    hardware = manifest.hardware
    parts = [str(hardware.get(key) or config.get(key)) for key in ("device", "dtype") if key in config]
    parts = [part for part in parts if part != "auto"]
    if hardware.get("machine"):
        parts.append(str(hardware["machine"]))
    if hardware.get("cpus"):
        parts.append(f"{format_figure(hardware['cpus'])} processors")
    return ", ".join(filter(None, parts))


def describe_code(manifest: Manifest) -> Iterator[str]:
    """Yield a phrase on the git commit and digest of align's code, and one on the working folder's other commit."""
    commit = manifest.commit.rstrip("+")
    digest = f"sha256 {manifest.code[:DIGITS]}…" if manifest.code else ""
    if commit:
        changes = ", with changes that were not committed" if manifest.commit.endswith("+") else ""
        yield f"align at git commit {commit[:DIGITS]}{changes}, {digest}"
    else:
        yield digest
    git = manifest.git or {}
    if git.get("commit", commit) != commit:
        changes = ", with changes that were not committed (they are in manifest.json)" if git.get("diff") else ""
        yield f"run in a folder at git commit {git['commit'][:DIGITS]}{changes}"


def format_current_time() -> str:
    """Return the current UTC time as text with seconds, such as `27 November 2026, 14:03:05 UTC`."""
    return format_timestamp(datetime.now(UTC).isoformat(), "%H:%M:%S")
