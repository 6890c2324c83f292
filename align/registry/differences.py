"""Differences between two runs of one stage: results, settings, inputs, training rows, code and hardware."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.config.identity import select_identity
from align.core.errors import CorruptFile, InputError, require
from align.core.files import require_readable
from align.registry.formatting import clean_text, format_cell, iter_leaves
from align.registry.record import UNREADABLE, Record
from align.report.figure_labels import sort_metric_names
from align.report.figure_text import flatten_metrics, pluralize
from align.run.manifest import Manifest, read_manifest

TRAINED = "trained_ids.parquet"
DATA = "data"
METRICS = 12
"""Largest number of differing metrics that are printed; the output only counts further ones."""
RUNS = "stage.runs"


def find_differences(folders: tuple[Path, Path], records: tuple[Record, Record]) -> dict[str, Any]:
    """Return the differences between two runs of one stage, such as in settings, data and metrics, as plain JSON.

    The most important differences come first. Each is a pair of the two runs' values.

    Args:
        folders: those of the two runs.
        records: their records, see `align.registry.record`.

    Raises:
        InputError: The runs are of two stages, or one of them cannot be read.
    """
    first, second = records
    for record in records:
        if record["status"] == UNREADABLE:
            raise InputError(RUNS, record["run"], f"cannot be read: {record['error']}", "Name another run.")
    remedy = "Name two runs of one stage."
    require(
        first["stage"] == second["stage"],
        RUNS,
        f"{first['run']}, {second['run']}",
        "belong to different stages",
        remedy,
    )
    manifests = tuple(map(read_manifest, folders))
    settings = tuple(map(get_settings, manifests))
    configs = tuple(dict(iter_leaves(manifest.config)) for manifest in manifests)
    identity_keys = {*settings[0], *settings[1]}
    scores = {record["score"]["name"] for record in records if record.get("score")}
    metrics = pair_differences(*map(get_metrics, records))
    outcome_keys = ("status", "error", "altered", "replaced", "kl")
    return {
        "runs": [first["run"], second["run"]],
        "outcome": pair_differences(*({key: record.get(key) for key in outcome_keys} for record in records)),
        "score": {name: pair for name, pair in metrics.items() if name in scores},
        "metrics": {name: pair for name, pair in metrics.items() if name not in scores},
        "settings": pair_differences(*settings),
        "inputs": pair_differences(*map(describe_inputs, records)),
        "data": count_row_changes(folders, records),
        "code": pair_differences(*map(describe_code, manifests)),
        "packages": pair_differences(*(manifest.packages for manifest in manifests)),
        "hardware": pair_differences(*(manifest.hardware for manifest in manifests)),
        "cost": pair_differences(*(record["cost"] for record in records)),
        "other_settings": {
            key: pair
            for key, pair in pair_differences(*configs).items()
            if key not in identity_keys and not is_reference_key(key)
        },
    }


def pair_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return key → [first value, second value] for each key whose values differ, with None for a missing key."""
    keys = dict.fromkeys((*first, *second))
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def get_settings(manifest: Manifest) -> dict[str, Any]:
    """Return dotted key → value for the settings that determine a run's result, without its inputs."""
    inputs: Collection[str] = {*manifest.inputs, *(["base"] if manifest.base else [])}
    return dict(iter_leaves(select_identity(manifest.stage, manifest.config, inputs)))


def is_reference_key(key: str) -> bool:
    """Return whether a configuration key names an input, which is compared by its digest, or the run itself."""
    return key in ("init", "artifact", "data.path", "model.path", "reward.ref", "run.name", "run.root")


def get_metrics(record: Record) -> dict[str, Any]:
    """Return dotted key → number or interval for a run's metrics, without Merkle roots of data."""
    return {key: value for key, value in flatten_metrics(record["metrics"]) if not key.endswith("root")}


def describe_inputs(record: Record) -> dict[str, str]:
    """Return input name → text such as `sft:one (0123456789ab)`, a run or file with its digest, including the base
    model."""
    texts = {
        name: f"{input.get('run') or input['path']} ({input['digest'][:12]})"
        for name, input in record["inputs"].items()
        if name != "base"
    }
    if base := record.get("base"):
        texts["base"] = f"{base['id']} ({base['digest'][:12]})"
    return texts


def describe_code(manifest: Manifest) -> dict[str, Any]:
    """Return the digest of a run's code, its commits, and the diff of its uncommitted changes."""
    git = manifest.git or {}
    return {"code": manifest.code, "commit": manifest.commit, "checkout": git.get("commit"), "changes": git.get("diff")}


def count_row_changes(folders: tuple[Path, Path], records: tuple[Record, Record]) -> dict[str, int] | None:
    """Count the training rows that were added and removed between two runs, by their content ids.

    Returns None if a run did not record its rows. `unknown` counts the rows of both runs that have no id.
    """
    old = read_content_ids(folders[0], records[0]["stage"])
    new = read_content_ids(folders[1], records[1]["stage"])
    if old is None or new is None:
        return None
    return {
        "before": old.counts.total() + old.rows_without_id,
        "after": new.counts.total() + new.rows_without_id,
        "added": (new.counts - old.counts).total(),
        "removed": (old.counts - new.counts).total(),
        "unknown": old.rows_without_id + new.rows_without_id,
    }


class ContentIds(NamedTuple):
    """The number of training rows for each content id, and of rows without one.

    Attributes:
        counts: content id → number of rows that have it.
        rows_without_id: number of rows without an id.
    """

    counts: Counter[bytes]
    rows_without_id: int


def read_content_ids(folder: Path, stage: str) -> ContentIds | None:
    """Count the content ids of the rows that a run trained on, or that a data set has for training, from Parquet files.

    Returns None if the run did not record them.

    Raises:
        CorruptFile: A file of ids cannot be read.
    """
    files = sorted((folder / "artifact").glob("train-*.parquet")) if stage == DATA else [folder / TRAINED]
    if not files or not all(path.is_file() for path in files):
        return None
    import pyarrow as pa  # takes a second, so only here
    import pyarrow.parquet as pq

    counts = Counter[bytes]()
    rows_without_id = 0
    for path in files:
        require_readable(path, "file")
        try:
            table = pq.read_table(path, columns=["content_id"])
        except (pa.ArrowException, OSError) as error:
            remedy = "Restore the file; the other differences can be read in the two manifests."
            raise CorruptFile("file", str(path), f"cannot be read ({error})", remedy) from error
        ids = table["content_id"].to_pylist()
        rows_without_id += ids.count(None)
        counts.update(id for id in ids if id is not None)
    return ContentIds(counts, rows_without_id)


def as_lines(differences: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between two runs as lines of text, shortened to about one screen."""
    yield " → ".join(map(clean_text, differences["runs"]))
    yield from iter_pair_lines(differences["score"])
    yield from iter_pair_lines(differences["outcome"])
    shared = {name: pair for name, pair in differences["metrics"].items() if None not in pair}
    yield from iter_section_lines("figures", {name: shared[name] for name in sort_metric_names(shared)[:METRICS]})
    if more := len(differences["metrics"]) - min(len(shared), METRICS):
        yield f"  and {more:,} more, which only one has or matter less: stage.format=json"
    yield from iter_section_lines("settings", differences["settings"])
    yield from iter_section_lines("made from", differences["inputs"])
    if data := differences["data"]:
        is_same = not data["added"] and not data["removed"] and not data["unknown"]
        change = "the same rows" if is_same else f"{data['added']:,} added, {data['removed']:,} removed"
        unknown = f"; for {pluralize(data['unknown'], 'row')} this is unknown" if data["unknown"] else ""
        yield f"rows to train on  {data['before']:,} → {data['after']:,}: {change}{unknown}"
    code = {key: [summarize_change(value) for value in pair] for key, pair in differences["code"].items()}
    yield from iter_section_lines("code", code)
    for name in ("packages", "hardware", "cost"):
        yield from iter_section_lines(name, differences[name])
    yield from iter_section_lines("other settings, which do not affect the result", differences["other_settings"])


def summarize_change(value: Any) -> Any:
    """Return a text of several lines as its number of lines, such as `12 lines`, and any other value unchanged."""
    return pluralize(len(value.splitlines()), "line") if isinstance(value, str) and "\n" in value else value


def iter_section_lines(head: str, pairs: Mapping[str, Any]) -> Iterator[str]:
    if pairs:
        yield head
        yield from (f"  {line}" for line in iter_pair_lines(pairs))


def iter_pair_lines(pairs: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, pairs), default=0)
    for key, (before, after) in pairs.items():
        yield f"{clean_text(key).ljust(width)}  {format_cell(before)} → {format_cell(after)}"
