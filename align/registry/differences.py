"""What differs between two runs of a stage: what came of them, and what they were made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.config.identity import identifying
from align.core.errors import CorruptFile, InputError, require
from align.core.files import check_readable
from align.registry.formatting import cell, clean, leaves
from align.registry.record import UNREADABLE, Record
from align.report.figure_labels import by_weight
from align.report.figure_text import counted, flattened
from align.run.manifest import Manifest, read_manifest

TRAINED, DATA = "trained_ids.parquet", "data"
METRICS = 12
"""Figures that are printed; the others are counted."""
RUNS = "stage.runs"


def differences(folders: tuple[Path, Path], records: tuple[Record, Record]) -> dict[str, Any]:
    """What differs, most important first, as plain JSON: each value as those of the two runs.

    Args:
        folders: of the two runs.
        records: theirs, see `align.registry.record`.

    Raises:
        InputError: the runs are of two stages, or one of them cannot be read.
    """
    one, other = records
    for found in records:
        if found["status"] == UNREADABLE:
            raise InputError(RUNS, found["run"], f"cannot be read: {found['error']}", "Name another run.")
    remedy = "Name two runs of one stage."
    require(one["stage"] == other["stage"], RUNS, f"{one['run']}, {other['run']}", "are of two stages", remedy)
    manifests = tuple(map(read_manifest, folders))
    ours = tuple(settings_of(manifest) for manifest in manifests)
    whole = tuple(dict(leaves(manifest.config)) for manifest in manifests)
    decided, scores = {*ours[0], *ours[1]}, {found["score"]["name"] for found in records if found.get("score")}
    figures = unlike(*(figures_of(found) for found in records))
    return {
        "runs": [one["run"], other["run"]],
        "outcome": unlike(
            *({key: found.get(key) for key in ("status", "error", "altered", "replaced", "kl")} for found in records)
        ),
        "score": {name: pair for name, pair in figures.items() if name in scores},
        "metrics": {name: pair for name, pair in figures.items() if name not in scores},
        "settings": unlike(*ours),
        "inputs": unlike(*(made_from(found) for found in records)),
        "data": rows_between(folders, records),
        "code": unlike(*(code_of(manifest) for manifest in manifests)),
        "packages": unlike(*(dict(manifest.packages) for manifest in manifests)),
        "hardware": unlike(*(dict(manifest.hardware) for manifest in manifests)),
        "cost": unlike(*(found["cost"] for found in records)),
        "other_settings": {key: pair for key, pair in unlike(*whole).items() if key not in decided and not is_ref(key)},
    }


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key → its two values, of those that differ; null where one has none."""
    keys = dict.fromkeys((*one, *other))
    return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Dotted key → value of the configuration that decides what a run makes; inputs are known by their digests."""
    known: Collection[str] = {*manifest.inputs, *(["base"] if manifest.base else [])}
    return dict(leaves(identifying(manifest.stage, manifest.config, known)))


def is_ref(key: str) -> bool:
    """Whether a key names an input, which differs by its digest or not at all; or the run itself."""
    return key in ("init", "artifact", "data.path", "model.path", "reward.ref", "run.name", "run.root")


def figures_of(record: Record) -> dict[str, Any]:
    """Dotted key → figure, an interval being one; without fingerprints, which the rows are compared by."""
    return {key: value for key, value in flattened(record["metrics"]) if not key.endswith("root")}


def made_from(record: Record) -> dict[str, str]:
    """Input → the run or the file that it is, with the beginning of its digest; its base among them."""
    found = {
        name: f"{given.get('run') or given['path']} ({given['digest'][:12]})"
        for name, given in record["inputs"].items()
        if name != "base"
    }
    base = record.get("base")
    return found | ({"base": f"{base['id']} ({base['digest'][:12]})"} if base else {})


def code_of(manifest: Manifest) -> dict[str, Any]:
    git = manifest.git or {}
    return {"code": manifest.code, "commit": manifest.commit, "checkout": git.get("commit"), "changes": git.get("diff")}


def rows_between(folders: tuple[Path, Path], records: tuple[Record, Record]) -> dict[str, int] | None:
    """How many rows to train on only one run has, by content ids, as often as each has them; None where one does not
    say which rows it had. `unknown` are rows whose ids nobody can compute any more, on either side."""
    both = [ids_in(folder, record["stage"]) for folder, record in zip(folders, records, strict=True)]
    if both[0] is None or both[1] is None:
        return None
    (before, no_id), (after, none) = both[0], both[1]
    added, removed = (after - before).total(), (before - after).total()
    return {"before": before.total() + no_id, "after": after.total() + none, "added": added, "removed": removed,
            "unknown": no_id + none}  # fmt: skip


def ids_in(folder: Path, stage: str) -> tuple[Counter[bytes], int] | None:
    """The content ids of rows to train on, each as often as it is seen, and how many rows have none."""
    files = sorted((folder / "artifact").glob("train-*.parquet")) if stage == DATA else [folder / TRAINED]
    if not files or not all(path.is_file() for path in files):
        return None
    import pyarrow as pa  # a second, which only this question takes
    import pyarrow.parquet as pq

    found, without = Counter[bytes](), 0
    for path in files:
        check_readable(path, "file")
        try:
            table = pq.read_table(path, columns=["content_id"])
        except (pa.ArrowException, OSError) as error:
            remedy = "Restore the file; the other differences can be read in the two manifests."
            raise CorruptFile("file", str(path), f"cannot be read ({error})", remedy) from error
        ids = table["content_id"].to_pylist()
        without += ids.count(None)
        found.update(id for id in ids if id is not None)
    return found, without


def as_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same for eyes: on a screen where not everything differs."""
    one, other = map(clean, found["runs"])
    yield f"{one} → {other}"
    yield from rows(found["score"])
    yield from rows(found["outcome"])
    both = {name: pair for name, pair in found["metrics"].items() if None not in pair}
    yield from part("figures", {name: both[name] for name in by_weight(both)[:METRICS]})
    if more := len(found["metrics"]) - min(len(both), METRICS):
        yield f"  and {more:,} more, which only one has or matter less: stage.format=json"
    yield from part("settings", found["settings"])
    yield from part("made from", found["inputs"])
    if data := found["data"]:
        same = not data["added"] and not data["removed"] and not data["unknown"]
        said = "the same rows" if same else f"{data['added']:,} added, {data['removed']:,} removed"
        unknown = f"; of {counted(data['unknown'], 'row')} nobody knows which" if data["unknown"] else ""
        yield f"rows to train on  {data['before']:,} → {data['after']:,}: {said}{unknown}"
    code = {key: [changed(value) for value in pair] for key, pair in found["code"].items()}
    yield from part("code", code)
    for name in ("packages", "hardware", "cost"):
        yield from part(name, found[name])
    yield from part("other settings, which decide nothing", found["other_settings"])


def changed(value: Any) -> Any:
    """Of changes that nobody committed, how many lines."""
    return counted(len(value.splitlines()), "line") if isinstance(value, str) and "\n" in value else value


def part(head: str, pairs: Mapping[str, Any]) -> Iterator[str]:
    if pairs:
        yield head
        yield from (f"  {line}" for line in rows(pairs))


def rows(pairs: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, pairs), default=0)
    for key, (before, after) in pairs.items():
        yield f"{clean(key).ljust(width)}  {cell(before)} → {cell(after)}"
