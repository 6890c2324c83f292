"""Records of runs: plain JSON with the settings, metrics, inputs and lineage of a run, for queries.

`make_record` reads a run's own folder. `join_records` adds what follows from other runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from align.config.stages import STAGES
from align.core.errors import InputError
from align.core.files import open_binary
from align.data.generated_tasks import TASKS, TASKS_VERSION
from align.run.figures import get_collapse_verdict, get_suite_collapse, read_figures
from align.run.files import read_json_object
from align.run.manifest import Input, Manifest
from align.run.stale import read_stale_mark
from align.track import read_rows

Record = dict[str, Any]

SCORES = {
    "sft": ("loss_after",),
    "full": ("loss_after",),
    "reward": ("accuracy",),
    "dpo": ("win_rate", "accuracy"),
    "kto": ("win_rate", "accuracy", "auc"),
    "ppo": ("win_rate", "held_out_score_after", "last_score"),
    "eval": ("win_rate", "difference", "judge_agreement"),
    "export": ("kl",),
    "data": ("train_rows",),
    "sample": ("answers",),
    "annotate": ("rankings",),
    "serve": ("requests",),
    "verify": (),
}
"""Stage → names of metrics, of which the first one that a run has is its main metric. An evaluated policy has its win
rate."""
MOVED = ("kl_interval", "published_kl", "last_kl", "kl")
"""Names of metrics for the distance from the start of training, or of an export from the trained model, in order of
preference."""
ENDED = ("failed", "interrupted")
A_ROW = 8192
"""Bytes at the end of a stream that are read to find its last row."""
ADAPTERS = "adapters.jsonl"
"""Log of a server's model names and adapters, beside its manifest."""
UNREADABLE = "unreadable"
"""Status of a folder whose manifest cannot be read."""


def make_record(folder: Path, manifest: Manifest) -> Record:
    """Return the record of a run with everything that its own folder and manifest determine, as strict JSON.

    Args:
        folder: the run's; an adapter's configuration and `stale.json` are read from it.
    """
    config = manifest.config
    times = manifest.times
    base = manifest.base
    data = manifest.inputs.get("data")
    stale = read_stale_mark(folder)
    figures = read_figures(folder, manifest)
    metrics = dict(figures.metrics)
    sources = ", ".join(name.removeprefix("sources.") for name in manifest.inputs if name.startswith("sources."))
    record = {
        "stage": manifest.stage,
        "name": manifest.name,
        "run": manifest.ref,
        "status": manifest.status,
        "error": clean_error(manifest.error),
        "folder": f"{manifest.stage}/{manifest.name}",
        "stale": stale and stale.since,
        "altered": f"{manifest.ref}: {figures.altered}" if figures.altered else None,
        "started": times.get("first_started", times.get("started")),
        "finished": times.get("finished"),
        "base": base and {"id": base.id, "revision": base.revision, "digest": base.digest},
        "digest": manifest.digest or None,
        "method": read_method(folder, manifest),
        "dtype": manifest.hardware.get("dtype", config.get("dtype")),
        "data": describe_data(config.get("data", {}), data, metrics, sources) if data or "root" in metrics else None,
        "project": config.get("project") if "project" in STAGES[manifest.stage].reads else None,
        "reward": find_reward(config, manifest.inputs),
        "seed": manifest.seed,
        "metrics": metrics,
        "published": manifest.published,
        "cost": compute_cost(folder, manifest, metrics),
        "inputs": {name: make_input_record(input) for name, input in manifest.inputs.items()},
        **(read_served(folder) if manifest.stage == "serve" else {}),
        "config": select_settings(config, manifest.stage),
        "code": manifest.code or None,
        "commit": manifest.commit or None,
    }
    return to_strict_json(record)


def read_served(folder: Path) -> Record:
    """Return a server's current model names, as `serves`, and the digests of all adapters loaded so far, as `loaded`.

    Both are read from its log.
    """
    states = [row["names"] for row in read_rows(folder / ADAPTERS) if isinstance(row.get("names"), Mapping)]
    arms = [arm for names in states for arms in names.values() if isinstance(arms, list) for arm in arms]
    adapters = [arm["adapter"] for arm in arms if isinstance(arm, Mapping) and isinstance(arm.get("adapter"), str)]
    return {"serves": states[-1] if states else {}, "loaded": list(dict.fromkeys(adapters))}


def clean_error(error: str) -> str | None:
    """Return a run's error message without the prefix `InputError: `, `interrupted` for a KeyboardInterrupt, or None if
    empty."""
    if error.startswith("KeyboardInterrupt"):
        return "interrupted"
    return error.removeprefix("InputError: ") or None


def select_settings(config: Mapping[str, Any], stage: str) -> Record:
    """Return the sections of a configuration that a stage reads, except `model` and `method`."""
    parts = {"stage", *STAGES[stage].reads_with(config.get("stage"))} - {"model", "method"}
    return {part: config[part] for part in sorted(parts) if isinstance(config.get(part), Mapping)}


def to_strict_json(value: Any) -> Any:
    """Return a copy of a value as strict JSON, with `None` for non-finite numbers and escaped lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {to_strict_json(str(key)): to_strict_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_unreadable_record(folder: Path, error: str) -> Record:
    """Return a record with the status `unreadable` and the error, for a folder whose manifest cannot be read."""
    stage = folder.parent.name
    name = folder.name
    return {
        "stage": stage,
        "name": name,
        "run": f"{stage}:{name}",
        "status": UNREADABLE,
        "error": to_strict_json(error),
        "folder": f"{stage}/{name}",
        "inputs": {},
        "metrics": {},
    }


def compute_cost(folder: Path, manifest: Manifest, metrics: Mapping[str, Any]) -> Record:
    """Return the minutes, peak memory (MB), training tokens and device of a run since its last start.

    For a run that failed or was interrupted, minutes and memory are those of its last logged step.
    """
    minutes = compute_minutes(manifest.times) if manifest.done else None
    memory = metrics.get("peak_rss_mb")
    if manifest.status in ENDED:
        row = read_last_row(folder / "timing.jsonl")
        seconds = get_number(row.get("elapsed_s"))
        minutes = None if seconds is None else round(seconds / 60, 2)
        memory = get_number(row.get("peak_rss_mb"))
    return {
        "minutes": minutes,
        "peak_memory_mb": memory,
        "tokens": metrics.get("train_tokens"),
        "device": manifest.hardware.get("device"),
    }


def read_last_row(path: Path) -> Record:
    """Return the last JSON object of a `.jsonl` file, or an empty mapping if it is missing or cannot be read."""
    if not path.is_file():
        return {}
    try:
        with open_binary(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - A_ROW))
            last = json.loads(file.read().rstrip(b"\n").rpartition(b"\n")[2])
    except (OSError, ValueError, RecursionError):
        return {}
    return last if isinstance(last, dict) else {}


def compute_minutes(times: Mapping[str, str]) -> float | None:
    """Return the minutes between `started` and `finished`, or None if one is missing or malformed, or the clock was set
    back."""
    try:
        started = datetime.fromisoformat(times["started"])
        finished = datetime.fromisoformat(times["finished"])
    except (KeyError, ValueError):
        return None
    minutes = (finished - started).total_seconds() / 60
    return round(minutes, 2) if minutes >= 0 else None


def read_method(folder: Path, manifest: Manifest) -> Record | None:
    """Return the training method with the adapter's rank, alpha and target modules, or None if the run has no base
    model.

    Without an adapter configuration, it has only the name and quantisation.
    """
    if manifest.base is None or "method" not in STAGES[manifest.stage].reads:
        return None
    name = manifest.config["method"].get("name")
    method: Record = {"name": name, "quantisation": "nf4" if name == "qlora" else None}
    try:
        adapter = read_json_object(folder / "artifact" / "adapter_config.json", "adapter_config.json", "")
    except InputError:
        return method
    targets = adapter.get("target_modules")
    return method | {
        "r": adapter.get("r"),
        "alpha": adapter.get("lora_alpha"),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "dora": bool(adapter.get("use_dora")),
        "rslora": bool(adapter.get("use_rslora")),
    }


def describe_data(config: Mapping[str, Any], data: Input | None, metrics: Mapping[str, Any], sources: str) -> Record:
    """Return the name, project, digests, Merkle roots and number of rows of the data that a run read.

    Args:
        sources: names of a data set's sources.
    """
    name = sources or config.get("path") or config.get("name")
    if data is not None:
        name = data.project or data.ref or name
    return {
        "name": name,
        "project": data.project or None if data else None,
        "digest": data.digest if data else None,
        "root": metrics.get("data_root", metrics.get("root")),
        "ids_root": metrics.get("data_ids_root", metrics.get("ids_root")),
        "rows": next((metrics[key] for key in ("train_rows", "pairs", "prompts", "rows") if key in metrics), None),
    }


def find_reward(config: Mapping[str, Any], inputs: Mapping[str, Input]) -> str | None:
    """Return the names of a run's reward models, or of the reward function that scored instead, or None if nothing
    scored."""
    models = [input.run for name, input in inputs.items() if name.partition(".")[0] == "reward" and input.stage]
    if models:
        return ", ".join(dict.fromkeys(models))
    reward = config.get("reward", {})
    stage = config.get("stage", {}).get("name")
    has_scores = stage in ("ppo", "eval") or config.get("stage", {}).get("best_of") is not None
    return reward.get("fn") or reward.get("name") if has_scores else None


def make_input_record(input: Input) -> Record:
    """Return an input of a run as plain JSON, with the `run`, `root` or `digest` that identifies the run that
    made it."""
    record: Record = {"run": input.run} if input.stage else {"path": input.ref or input.path}
    record["digest"] = input.digest
    if isinstance(input.details.get("root"), str):
        record["root"] = input.details["root"]
    if input.project:
        record |= {"project": input.project, "seq": input.seq}
    for key, kind in (("alias", Mapping), ("server", str), (TASKS, list), (TASKS_VERSION, str)):
        if isinstance(input.details.get(key), kind):
            record[key] = input.details[key]
    return record


def list_digests(record: Mapping[str, Any], outputs: Mapping[str, str]) -> set[str]:
    """Return the digests by which later runs name a run's artifact as their input.

    That is the digest of its weights, or else a data set's fingerprint and the digests of the artifact's files.

    Args:
        outputs: file → SHA-256, from the run's manifest.
    """
    if record["digest"]:
        return {record["digest"]}
    digests = {digest for path, digest in outputs.items() if path.startswith("artifact/")}
    root = record["metrics"].get("root")
    return digests | {root} if isinstance(root, str) else digests


class InputEdge(NamedTuple):
    """An input of a run: its name, its digest, and the run that made it.

    Attributes:
        input: name of the input.
        digest: digest that it was read by.
        made_by: `stage:name` of the run that made it; empty if no run did.
    """

    input: str
    digest: str
    made_by: str


class AliasReading(NamedTuple):
    """A change of an alias that a run recorded when it found an input by this alias.

    Attributes:
        seq: number of the change.
        hash: hash of its line in the log of aliases.
    """

    alias: str
    seq: int
    hash: str


def list_input_edges(record: Mapping[str, Any]) -> list[InputEdge]:
    """Return one InputEdge for each input of a run, including its base model and the adapters that a server loaded."""
    edges = {
        name: (str(input.get("root") or input["digest"]), input.get("run", ""))
        for name, input in record["inputs"].items()
    }
    if base := record.get("base"):
        edges["base"] = (base["digest"], "")
    edges |= {f"loaded.{i}": (digest, "") for i, digest in enumerate(record.get("loaded", ()))}
    return [InputEdge(name, digest, made_by) for name, (digest, made_by) in edges.items()]


def list_alias_changes(record: Mapping[str, Any]) -> list[AliasReading]:
    """Return the alias changes that a run recorded when it found its inputs by alias."""
    changes = (input.get("alias") for input in record["inputs"].values())
    return [
        AliasReading(str(change.get("name")), change["seq"], str(change.get("hash")))
        for change in changes
        if isinstance(change, Mapping) and isinstance(change.get("seq"), int) and abs(change["seq"]) < 2**62
    ]


def join_records(own: Record, parents: Iterable[tuple[str, bool]], children: Iterable[Record]) -> Record:
    """Return a run's record with what follows from its parents and children, such as its evaluation, score and exports.

    Args:
        own: the run's record, as `make_record` returns it.
        parents: (run, exists) of each run that it was made from.
        children: own records of the runs that read it, each with `through`, the name of that input.
    """
    parent_exists = dict(parents)
    children = list(children)
    evaluation = find_evaluation(children)
    record = own | {
        "parents": [*parent_exists],
        "gone": [run for run, exists in parent_exists.items() if not exists],
        "children": sorted({child["run"] for child in children}),
        "exports": [
            child["run"] for child in children if child["stage"] == "export" and child["through"] == "artifact"
        ],
        "servers": sorted({child["run"] for child in children if child["stage"] == "serve"}),
        "evaluation": evaluation and evaluation["run"],
        "aliases": [],
        "replaced": None,
    }
    if evaluation:  # its metrics are added; the run's own come first
        record["metrics"] = {**evaluation["metrics"], **own["metrics"]}
        record["altered"] = "; ".join(filter(None, (own.get("altered"), evaluation.get("altered")))) or None
    collapse = find_suite_collapse(children)
    if collapse and get_collapse_verdict(record["metrics"]) != "collapsed":
        record["metrics"] = {**record["metrics"], "collapse": collapse}
    record["score"] = find_score(record)
    values = (get_number(record["metrics"].get(key)) for key in MOVED)
    record["kl"] = next((value for value in values if value is not None), None)
    return record


def find_evaluation(children: Iterable[Record]) -> Record | None:
    """Return the newest finished evaluation of an artifact among its child runs, or None if it has none.

    An evaluation by a proxy judge, the reward that the policy was trained against, ranks behind any other.
    """
    evaluations = [
        child
        for child in children
        if child["stage"] == "eval" and child["status"] == "done" and child["through"] == "artifact"
    ]
    return max(
        evaluations,
        key=lambda record: (record["metrics"].get("judge_is") != "proxy", *get_publication(record)),
        default=None,
    )


def find_suite_collapse(children: Iterable[Record]) -> Mapping[str, Any] | None:
    """Return the mode collapse verdict for a run from the newest finished evaluation that compared several models.

    Returns None if no such evaluation measured it.
    """
    verdicts = [
        (get_publication(child), collapse)
        for child in children
        if child["stage"] == "eval"
        and child["status"] == "done"
        and (collapse := get_suite_collapse(child["metrics"], child["through"]))
    ]
    return max(verdicts, key=lambda verdict: verdict[0])[1] if verdicts else None


def describe_alteration(record: Mapping[str, Any]) -> str:
    """Return reasons why a run's metrics may differ from the published ones, as text, or "" if they agree."""
    return "; ".join(str(record[key]) for key in ("altered", "replaced") if record.get(key))


def is_forgetting_run(record: Mapping[str, Any]) -> bool:
    """Return whether a run made a new data set by deleting rows from another one."""
    config = record.get("config", {}).get("stage", {})
    return record["stage"] == "data" and config.get("action") == "forget"


def get_publication(record: Mapping[str, Any]) -> tuple[int, str]:
    """Return (number in the order of publication, finish time) of a finished run, as a key that sorts runs by age."""
    return record["published"], record["finished"] or ""


def find_score(record: Mapping[str, Any]) -> Record | None:
    """Return the name, value and interval of a run's main metric, or None if it has none of the metrics in `SCORES`."""
    for name in SCORES.get(record["stage"], ()):
        figure = record["metrics"].get(name)
        if (value := get_number(figure)) is not None:
            bounds = (
                {key: get_number(figure.get(key)) for key in ("low", "high")} if isinstance(figure, Mapping) else {}
            )
            return {"name": name, "value": value, **bounds}
    return None


def get_number(figure: Any) -> float | None:
    """Return the value of a metric without its interval, or None if it is not a number."""
    value = figure.get("value") if isinstance(figure, Mapping) else figure
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
