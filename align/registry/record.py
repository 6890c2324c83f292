"""What is known of a run, under names that can be asked for.

A record is plain JSON. `record_of` says what a run's own folder knows; `joined` adds what follows from other runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from align.config.stages import STAGES
from align.core.errors import InputError
from align.core.files import open_binary
from align.run.figures import collapse_verdict, read_figures, suite_collapse
from align.run.files import json_object
from align.run.manifest import Input, Manifest
from align.run.stale import stale_in
from align.track import read_rows

Record = dict[str, Any]

SCORES = {
    "sft": ("loss_after",), "full": ("loss_after",), "reward": ("accuracy",), "dpo": ("win_rate", "accuracy"),
    "kto": ("win_rate", "accuracy", "auc"),
    "ppo": ("win_rate", "held_out_score_after", "last_score"), "eval": ("win_rate", "difference", "judge_agreement"),
    "export": ("kl",), "data": ("train_rows",), "sample": ("answers",),
    "annotate": ("rankings",), "serve": ("requests",), "verify": (),
}  # fmt: skip
"""Stage → its main figure: the first of these that a run has. A policy that was evaluated has its win rate."""
MOVED = ("kl_interval", "published_kl", "last_kl", "kl")
"""How far the run moved from its start, or its export from what was trained."""
ENDED = ("failed", "interrupted")
A_ROW = 8192
"""Bytes at the end of a stream in which its last row lies."""
ADAPTERS = "adapters.jsonl"
"""The log of what a server's names stand for, beside its manifest."""
UNREADABLE = "unreadable"
"""The status of a folder whose manifest nobody can read."""


def record_of(folder: Path, manifest: Manifest) -> Record:
    """What a run's own folder knows of it.

    Args:
        folder: of the run, whose adapter's configuration and whose `stale.json` are read too.
    """
    config, times, read = manifest.config, manifest.times, manifest.inputs.get("data")
    base, stale = manifest.base, stale_in(folder)
    figures = read_figures(folder, manifest)
    metrics = dict(figures.metrics)
    sources = ", ".join(name.removeprefix("sources.") for name in manifest.inputs if name.startswith("sources."))
    return finite({
        "stage": manifest.stage, "name": manifest.name, "run": manifest.ref, "status": manifest.status,
        "error": error_in(manifest.error),
        "folder": f"{manifest.stage}/{manifest.name}", "stale": stale and stale.since,
        "altered": f"{manifest.ref}: {figures.altered}" if figures.altered else None,
        "started": times.get("first_started", times.get("started")), "finished": times.get("finished"),
        "base": base and {"id": base.id, "revision": base.revision, "digest": base.digest},
        "digest": manifest.digest or None, "method": method_of(folder, manifest),
        "dtype": manifest.hardware.get("dtype", config.get("dtype")),
        "data": data_of(config.get("data", {}), read, metrics, sources) if read or "root" in metrics else None,
        "project": config.get("project") if "project" in STAGES[manifest.stage].reads else None,
        "reward": reward_of(config, manifest.inputs), "seed": manifest.seed, "metrics": metrics,
        "published": manifest.published,
        "cost": cost_of(folder, manifest, metrics),
        "inputs": {name: of_input(given) for name, given in manifest.inputs.items()},
        **(served_in(folder) if manifest.stage == "serve" else {}),
        "config": settings_in(config, manifest.stage), "code": manifest.code or None, "commit": manifest.commit or None,
    })  # fmt: skip


def served_in(folder: Path) -> Record:
    """What a server's names stand for since its log's last line, and every adapter that it has loaded."""
    states = [row["names"] for row in read_rows(folder / ADAPTERS) if isinstance(row.get("names"), Mapping)]
    arms = [arm for names in states for arms in names.values() if isinstance(arms, list) for arm in arms]
    known = [arm["adapter"] for arm in arms if isinstance(arm, Mapping) and isinstance(arm.get("adapter"), str)]
    return {"serves": states[-1] if states else {}, "loaded": list(dict.fromkeys(known))}


def error_in(said: str) -> str | None:
    """Why a run failed, without the class of the error where the rest says it all."""
    if said.startswith("KeyboardInterrupt"):
        return "interrupted"
    return said.removeprefix("InputError: ") or None


def settings_in(config: Mapping[str, Any], stage: str) -> Record:
    """The settings of a run that its stage reads, those of its base and method left to their own keys."""
    parts = {"stage", *STAGES[stage].reads_with(config.get("stage"))} - {"model", "method"}
    return {part: config[part] for part in sorted(parts) if isinstance(config.get(part), Mapping)}


def finite(value: Any) -> Any:
    """The same as JSON that everybody reads: a number that is not finite is null, half a character is written out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {finite(str(key)): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unreadable(folder: Path, error: str) -> Record:
    """The record of a folder whose manifest cannot be read."""
    stage, name = folder.parent.name, folder.name
    return {"stage": stage, "name": name, "run": f"{stage}:{name}", "status": UNREADABLE, "error": finite(error),
            "folder": f"{stage}/{name}", "inputs": {}, "metrics": {}}  # fmt: skip


def cost_of(folder: Path, manifest: Manifest, metrics: Mapping[str, Any]) -> Record:
    """What a run took, from its last start; of one that ended early, up to the last step that it logged."""
    minutes, memory = took(manifest.times) if manifest.done else None, metrics.get("peak_rss_mb")
    if manifest.status in ENDED:
        row = last_row(folder / "timing.jsonl")
        seconds, memory = number(row.get("elapsed_s")), number(row.get("peak_rss_mb"))
        minutes = None if seconds is None else round(seconds / 60, 2)
    return {
        "minutes": minutes, "peak_memory_mb": memory, "tokens": metrics.get("train_tokens"),
        "device": manifest.hardware.get("device"),
    }  # fmt: skip


def last_row(path: Path) -> Record:
    """The last object of a stream; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        with open_binary(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - A_ROW))
            last = json.loads(file.read().rstrip(b"\n").rpartition(b"\n")[2])
    except (OSError, ValueError, RecursionError):
        return {}
    return last if isinstance(last, dict) else {}


def took(times: Mapping[str, str]) -> float | None:
    """Minutes from the last start to the end; None where the times say nothing, or a clock was set back."""
    try:
        began, ended = (datetime.fromisoformat(times[key]) for key in ("started", "finished"))
    except (KeyError, ValueError):
        return None
    minutes = (ended - began).total_seconds() / 60
    return round(minutes, 2) if minutes >= 0 else None


def method_of(folder: Path, manifest: Manifest) -> Record | None:
    """How weights were trained, and of an adapter its shape, as its own configuration has it; None of a run that is on
    no base."""
    if manifest.base is None or "method" not in STAGES[manifest.stage].reads:
        return None
    name = manifest.config["method"].get("name")
    found: Record = {"name": name, "quantisation": "nf4" if name == "qlora" else None}
    try:
        shape = json_object(folder / "artifact" / "adapter_config.json", "adapter_config.json", "")
    except InputError:
        return found
    targets = shape.get("target_modules")
    return found | {
        "r": shape.get("r"), "alpha": shape.get("lora_alpha"),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "dora": bool(shape.get("use_dora")), "rslora": bool(shape.get("use_rslora")),
    }  # fmt: skip


def data_of(config: Mapping[str, Any], read: Input | None, metrics: Mapping[str, Any], sources: str) -> Record:
    """What a run was given: the name that it was given by, its fingerprints, its rows.

    Args:
        sources: of a data set, the names of its own ones.
    """
    given = sources or config.get("path") or config.get("name")
    return {
        "name": (read.project or read.ref if read else "") or given, "project": (read.project if read else "") or None,
        "digest": read.digest if read else None,
        "root": metrics.get("data_root", metrics.get("root")),
        "ids_root": metrics.get("data_ids_root", metrics.get("ids_root")),
        "rows": next((metrics[key] for key in ("train_rows", "pairs", "prompts", "rows") if key in metrics), None),
    }  # fmt: skip


def reward_of(config: Mapping[str, Any], inputs: Mapping[str, Input]) -> str | None:
    """The reward model that was read, or what scored in place of one."""
    models = [given.run for name, given in inputs.items() if name.partition(".")[0] == "reward" and given.stage]
    if models:
        return ", ".join(dict.fromkeys(models))
    reward = config.get("reward", {})
    stage = config.get("stage", {}).get("name")
    scored = stage in ("ppo", "eval") or config.get("stage", {}).get("best_of") is not None
    return reward.get("fn") or reward.get("name") if scored else None


def of_input(given: Input) -> Record:
    """An input, as later runs are joined to it: `run` of one that a run made."""
    made = {"run": given.run} if given.stage else {"path": given.ref or given.path}
    root = {"root": given.details["root"]} if isinstance(given.details.get("root"), str) else {}
    votes = {"project": given.project, "seq": given.seq} if given.project else {}
    alias = {"alias": given.details["alias"]} if isinstance(given.details.get("alias"), Mapping) else {}
    server = {"server": given.details["server"]} if isinstance(given.details.get("server"), str) else {}
    return {**made, "digest": given.digest, **root, **votes, **alias, **server}


def digests_of(record: Mapping[str, Any], outputs: Mapping[str, str]) -> set[str]:
    """What later runs know this one's artifact by: its weights; where it has none, a data set's fingerprint and the
    files of its artifact."""
    if record["digest"]:
        return {record["digest"]}
    files = {digest for path, digest in outputs.items() if path.startswith("artifact/")}
    return files | {root for root in (record["metrics"].get("root"),) if isinstance(root, str)}


def edges_of(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(input, digest, run that made it or empty) of whatever a run read; its base, and what a server loaded later,
    among them."""
    found = {
        name: (str(given.get("root") or given["digest"]), given.get("run", ""))
        for name, given in record["inputs"].items()
    }
    if base := record.get("base"):
        found["base"] = (base["digest"], "")
    found |= {f"loaded.{i}": (digest, "") for i, digest in enumerate(record.get("loaded", ()))}
    return [(name, *edge) for name, edge in found.items()]


def noted_in(record: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(alias, number, hash) of each change of an alias that a run found an input by."""
    changes = (given.get("alias") for given in record["inputs"].values())
    return [
        (str(change.get("name")), change["seq"], str(change.get("hash")))
        for change in changes
        if isinstance(change, Mapping) and isinstance(change.get("seq"), int) and abs(change["seq"]) < 2**62
    ]


def joined(own: Record, parents: Iterable[tuple[str, bool]], children: Iterable[Record]) -> Record:
    """A record with what follows from the runs around it.

    Args:
        parents: each run that it was made from, and whether that is there.
        children: their own records, each with `through`, the input that they read this run as.
    """
    known, children = dict(parents), list(children)
    exports = [one for one in children if one["stage"] == "export" and one["through"] == "artifact"]
    verdict = evaluation_among(children)
    found = own | {
        "parents": [*known], "gone": [run for run, there in known.items() if not there],
        "children": sorted({child["run"] for child in children}), "exports": [one["run"] for one in exports],
        "servers": sorted({one["run"] for one in children if one["stage"] == "serve"}),
        "evaluation": verdict and verdict["run"], "aliases": [], "replaced": None,
    }  # fmt: skip
    if verdict:  # what was measured of the artifact later; its own figures come first
        found["metrics"] = {**verdict["metrics"], **own["metrics"]}
        found["altered"] = "; ".join(filter(None, (own.get("altered"), verdict.get("altered")))) or None
    collapse = suite_collapse_among(children)
    if collapse and collapse_verdict(found["metrics"]) != "collapsed":
        found["metrics"] = {**found["metrics"], "collapse": collapse}
    found["score"] = score_of(found)
    found["kl"] = next((value for key in MOVED if (value := number(found["metrics"].get(key))) is not None), None)
    return found


def evaluation_among(children: Iterable[Record]) -> Record | None:
    """The newest finished evaluation of an artifact, one by a proxy only where there is no other."""
    found = [
        child for child in children
        if child["stage"] == "eval" and child["status"] == "done" and child["through"] == "artifact"
    ]  # fmt: skip
    return max(found, key=lambda one: (one["metrics"].get("judge_is") != "proxy", *publication(one)), default=None)


def suite_collapse_among(children: Iterable[Record]) -> Mapping[str, Any] | None:
    """Return the verdict of the newest finished evaluation of several systems on whether an artifact collapsed. None if
    none measured it."""
    measured = [
        (publication(child), collapse)
        for child in children
        if child["stage"] == "eval"
        and child["status"] == "done"
        and (collapse := suite_collapse(child["metrics"], child["through"]))
    ]
    return max(measured, key=lambda one: one[0])[1] if measured else None


def altered_in(record: Mapping[str, Any]) -> str:
    """Return why the figures of a record are not known to be the published ones; empty if they are."""
    return "; ".join(str(why) for key in ("altered", "replaced") if (why := record.get(key)))


def forgets(record: Mapping[str, Any]) -> bool:
    """Whether a run is a data set without rows that another one had: it is made from that one, and has nothing of what
    went."""
    config = record.get("config", {}).get("stage", {})
    return record["stage"] == "data" and config.get("action") == "forget"


def publication(record: Mapping[str, Any]) -> tuple[int, str]:
    """What done runs are ordered by, as `Manifest.publication`."""
    return record["published"], record["finished"] or ""


def score_of(record: Mapping[str, Any]) -> Record | None:
    """The first figure of `SCORES` that a run has, with its interval where it has one."""
    for name in SCORES.get(record["stage"], ()):
        figure = record["metrics"].get(name)
        if (value := number(figure)) is not None:
            bounds = {key: number(figure.get(key)) for key in ("low", "high")} if isinstance(figure, Mapping) else {}
            return {"name": name, "value": value, **bounds}
    return None


def number(figure: Any) -> float | None:
    """The number that a figure is, without its interval; None of anything else."""
    value = figure.get("value") if isinstance(figure, Mapping) else figure
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
