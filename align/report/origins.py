"""What a run was made of: the line that makes it again, base, method, data, rate, machine, and the runs before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from align.report.figure_text import counted, duration, format_figure, is_interval, moment, percent
from align.report.page import Code, Fact, Link
from align.report.run_view import RunView
from align.run.manifest import Base, Input, Manifest
from align.track import truncate_text

METHODS = {
    "qlora": "QLoRA: an adapter on the base in NF4 (4 bits)", "lora": "LoRA: an adapter on the base as it is",
    "full": "every weight trains",
}  # fmt: skip
ROLES = {"init": "Started from", "artifact": "Looks at", "reward": "Reward", "annotations": "Votes", "items": "Items"}
"""An input's name, up to its first dot → what it is called."""
IN_EVAL = " that data.eval_path asks too"
SIDES: tuple[tuple[str, str, str, Mapping[str, str], str], ...] = (
    ("train_rows", "row", " to train on",
     {"dropped_too_long": "", "dropped_unanswered": " without an answer", "dropped_in_eval": IN_EVAL}, "cut"),
    ("pairs", "pair", " to train on", {"dropped": "", "dropped_in_eval": IN_EVAL}, ""),
    ("prompts", "prompt", "", {"dropped": "", "dropped_in_eval": IN_EVAL}, ""),
    ("held_out_prompts", "prompt", " to measure on", {}, ""),
    ("held_out_rows", "row", " held out",
     {"held_out_too_long": "", "held_out_unanswered": " without an answer"}, "held_out_cut"),
    ("held_out_pairs", "pair", " held out", {"held_out_dropped": ""}, ""),
    ("held_out_answers", "answer", " held out", {"held_out_dropped": ""}, ""),
)  # fmt: skip
"""Of each side of the data: the metric that counts what was kept, what it counts, and to what end; the metrics of what
was dropped, and why (empty: it was too long); the metric of what was cut."""
REASONING = {
    "mask": "reasoning is read, and left out of the loss (data.reasoning=mask)",
    "hide": "reasoning is taken out of the rows (data.reasoning=hide)",
}  # fmt: skip
LONGEST_SYSTEM = 200
"""Characters of a system turn that a page shows."""
DIGITS = 12
"""Of a digest or a commit, enough to tell it by."""


def origins(seen: RunView) -> list[tuple[str, list[Fact]]]:
    """Term → what is to be said of it; a term of which nothing is known is left out."""
    manifest = seen.manifest
    found: list[tuple[str, list[Fact]]] = [
        ("Command", [Code(seen.command)] if seen.command else []),
        ("Base", list(about_base(manifest.base, seen.folder))),
        ("Method", list(about_method(seen))),
        *((term, parts) for term, parts in parents(manifest, seen.folder).items()),
        ("Data", list(about_data(seen))),
        ("Learning rate", list(about_rate(seen.settings))),
        ("Batch", list(about_batch(seen.settings))),
        ("Seed", [str(manifest.seed)]),
        ("Started", [moment(first_started(manifest))] if first_started(manifest) else []),
        ("Took", [took(manifest)] if manifest.times.get("finished") else []),
        ("Computed on", [about_machine(manifest, seen.config)]),
        ("Versions", [", ".join(f"{name} {version}" for name, version in manifest.packages.items())]),
        ("Code", list(about_code(manifest))),
    ]
    return [(term, [part for part in parts if part]) for term, parts in found if any(parts)]


def about_base(base: Base | None, folder: Path) -> Iterator[Fact]:
    """What the base is called, or the run that made it, where that lies in the same root; and its digest."""
    if base is None:
        return
    made, digest = Path(base.path).absolute().parent, f"sha256 {base.digest[:DIGITS]}…"
    if Path(base.path).name == "artifact" and made.parent.parent == folder.parent.parent.absolute():
        yield report_of(made.parent.name, made.name, folder)
        yield digest
    else:
        yield f"{base.id}{f', revision {base.revision[:DIGITS]}' if base.revision else ''}, {digest}"


def about_method(seen: RunView) -> Iterator[str]:
    method = seen.config.get("method", {})
    if seen.manifest.base is None or method.get("name") not in METHODS:
        return
    yield METHODS[method["name"]]
    if (
        seen.manifest.stage == "sft" and "r" in method and method["name"] != "full"
    ):  # the others take over what their start has
        chosen = [f"rank {method['r']}", f"alpha {method['alpha']}"]
        chosen += [f"dropout {method['dropout']:g}"] if method.get("dropout") else []
        chosen += [name for key, name in (("rslora", "rsLoRA"), ("dora", "DoRA")) if method.get(key)]
        yield ", ".join(chosen)


def parents(manifest: Manifest, folder: Path) -> dict[str, list[Fact]]:
    """The runs whose artifacts this one read, and what else it read by name."""
    found: dict[str, list[Fact]] = {}
    for name, given in manifest.inputs.items():
        if term := ROLES.get(name.partition(".")[0]):
            found.setdefault(term, []).append(named(given, folder))
    return found


def named(given: Input, folder: Path) -> Fact:
    if given.stage:
        return report_of(given.stage, given.name, folder)
    if given.project:
        until = f", up to row {given.seq:,} of the ledger" if given.seq >= 0 else ""
        return f"project {given.project} of the annotation store{until}"
    return given.ref


def report_of(stage: str, name: str, folder: Path) -> Fact:
    """A link to another run's report, where that lies in the same folder of runs; its name where it does not."""
    there = (folder.parent.parent / stage / name / "report.html").is_file()
    return Link(f"{stage}:{name}", f"../../{stage}/{quote(name)}/report.html") if there else f"{stage}:{name}"


def about_data(seen: RunView) -> Iterator[str]:
    """Where the rows came from; how many were kept and dropped."""
    data, read = seen.config.get("data", {}), seen.manifest.inputs.get("data")
    if read is None:
        return
    if read.project:
        yield str(named(read, seen.folder))
    elif data.get("path"):
        yield f"{read.ref or data['path']}, sha256 {read.digest[:DIGITS]}…"
        if data.get("eval_path"):
            yield f"measured on {data['eval_path']}"
    else:
        yield f"the corpus {data['name']}{', part ' + data['part'] if data.get('part') else ''}"
    yield from about_rendering(data)
    made = ("pairs",) if seen.manifest.stage == "sample" else ()  # by best-of-n, out of the answers
    counts = {key: value for key, value in seen.metrics.items() if key not in made}
    yield from about_rows(counts, data.get("max_length"))


def about_rendering(data: Mapping[str, Any]) -> Iterator[str]:
    """How rows became text, where that is not the default."""
    if data.get("template"):
        yield f"chat template {data['template']}, in place of the model's own"
    if kwargs := data.get("template_kwargs"):
        yield f"arguments of the chat template: {', '.join(f'{name}={value}' for name, value in kwargs.items())}"
    if data.get("system"):
        yield f"system turn where a row has none: {truncate_text(data['system'], LONGEST_SYSTEM)}"
    if said := REASONING.get(data.get("reasoning", "")):
        yield said


def about_rows(metrics: Mapping[str, Any], max_length: int | None) -> Iterator[str]:
    """How many rows were kept and dropped, on either side."""
    limit = f" for being longer than {max_length:,} tokens" if max_length else " for their length"
    if is_interval(metrics.get("win_rate")):
        metrics = {"prompts": metrics["win_rate"]["n"], **metrics}
    if "wanted" in metrics:
        dropped = f"; dropped {metrics['dropped']:,}{limit}" if metrics.get("dropped") else ""
        yield f"{metrics['wanted']:,} wanted and {metrics['unwanted']:,} unwanted answers to train on{dropped}"
    for key, what, then, reasons, cut in SIDES:
        if key in metrics:
            left = [f"{metrics[reason]:,}{why or limit}" for reason, why in reasons.items() if metrics.get(reason)]
            # What the other side asks goes before a limit is drawn, so that it adds up to nothing.
            given = metrics[key] + sum(metrics.get(reason, 0) for reason in reasons if reason != "dropped_in_eval")
            of = f"{metrics[key]:,} of {counted(given, what)}" if given > metrics[key] else counted(given, what)
            dropped = f"; dropped {' and '.join(left)}" if left else ""
            cuts = f"; cut {metrics[cut]:,} at {max_length:,} tokens" if max_length and metrics.get(cut) else ""
            yield f"{of}{then}{dropped}{cuts}"
    if undecided := metrics.get("dropped_undecided"):
        yield f"left out {counted(undecided, 'pair')} whose answers are equal, tied or alone"
    if skipped := metrics.get("skipped_rows"):
        yield f"left out {counted(skipped, 'row')} that could not be kept"
    counts = (("the last answer", "reasoning_lost_last"), ("earlier answers", "reasoning_lost_earlier"))
    if lost := [f"of {which} in {counted(metrics[key], 'row')}" for which, key in counts if metrics.get(key)]:
        yield f"the chat template left out the reasoning {' and '.join(lost)}"


def about_rate(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("lr") is None:
        return
    course = f", {settings['schedule']} schedule" if settings.get("schedule") else ""
    risen = f", warmed up over {percent(settings['warmup'])} of the steps" if settings.get("warmup") else ""
    yield f"{settings['lr']:g}{course}{risen}"
    if settings.get("value_lr") is not None and settings.get("advantage", "gae") == "gae":  # others have no critic
        yield f"{settings['value_lr']:g} for the value"


def about_batch(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("batch_size") is not None:
        size, at_once = settings["batch_size"], settings.get("micro_batch")
        what = "answers an update" if "updates" in settings else "a step"
        each = f", {settings['group_size']:,} to each prompt" if (settings.get("group_size") or 1) > 1 else ""
        yield f"{size:,} {what}{each}" + (f", {at_once:,} at once" if at_once else "")


def first_started(manifest: Manifest) -> str:
    return manifest.times.get("first_started") or manifest.times.get("started", "")


def took(manifest: Manifest) -> str:
    """How long the run took; where it was continued, since its last start."""
    began, ended = (datetime.fromisoformat(manifest.times[key]) for key in ("started", "finished"))
    again = ", since it was continued" if "first_started" in manifest.times else ""
    return duration((ended - began).total_seconds()) + again


def about_machine(manifest: Manifest, config: Mapping[str, Any]) -> str:
    hardware = manifest.hardware
    chosen = [str(hardware.get(key) or config.get(key)) for key in ("device", "dtype") if key in config]
    cpus = f"{format_figure(hardware['cpus'])} processors" if hardware.get("cpus") else ""
    machine = " ".join(str(hardware[key]) for key in ("machine",) if hardware.get(key))
    return ", ".join(part for part in (*(c for c in chosen if c != "auto"), machine, cpus) if part)


def about_code(manifest: Manifest) -> Iterator[str]:
    """The commit of align's checkout, where it is one; that of the folder that the run was started in, where that is
    another one."""
    commit, digest = manifest.commit.rstrip("+"), f"sha256 {manifest.code[:DIGITS]}…" if manifest.code else ""
    if commit:
        changed = ", with changes that were not committed" if manifest.commit.endswith("+") else ""
        yield f"align at git commit {commit[:DIGITS]}{changed}, {digest}"
    else:
        yield digest
    git = manifest.git or {}
    if git.get("commit", commit) != commit:
        changed = ", with changes that were not committed (they are in manifest.json)" if git.get("diff") else ""
        yield f"run in a folder at git commit {git['commit'][:DIGITS]}{changed}"


def written_at() -> str:
    """The time of day, for a page that is written anew."""
    return moment(datetime.now(UTC).isoformat(), "%H:%M:%S")
