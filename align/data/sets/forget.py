"""Removal of rows from a data set: it is written again without them, and the old data set is deleted.

Each removed row is replaced by a tombstone, a random leaf. So every other row keeps its place, and the new root differs
from the old one. `replaces` in the new `data.json` has the old root, which runs that trained on it have recorded.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.core.errors import RunBusy, require
from align.core.files import has_file, parse_user_path, read_text
from align.core.merkle import compute_root
from align.data.read.files import DATA_SET_FILE, SHARD_NAME
from align.data.sets.ids import SHA256, IdKind, read_id_kinds
from align.data.sets.published import TOMBSTONE, DataSet, ShardWriter, compute_data_set_root, load_data_set
from align.data.sets.splits import SPLITS
from align.data.sources import DataSource, build_data_input
from align.run.artifacts import REPLACED, read_replacement, require_not_replaced
from align.run.digests import file_digest
from align.run.files import write_json
from align.run.folder import lock_folder
from align.run.manifest import FILE as RUN
from align.run.manifest import Input, read_manifest
from align.run.stale import FILE as STALE

FIELD = "stage.forget"
ERASED = "erased"
REASONS = {True: "rows whose votes the annotation store no longer has", False: "rows that were to be forgotten"}
"""Reason for the removal by a flag that the setting is `erased`."""
KEPT_FILES = (RUN, "config.yaml", "metrics.json", "metrics.jsonl", "timing.jsonl", STALE)
"""Names of the files of a run without content of rows. They are kept, like its `data.json`."""
Masks = Mapping[str, ndarray]
"""Name of a split → whether each of its rows is to be removed, bool (N)."""
Counts = Mapping[str, Counter[tuple[str, int, str]]]
"""Name of a split → source, row and content id → number of times that the row is in the split."""
LoadActiveVotes = Callable[[IdKind], Collection[int] | None]
"""A function that returns the active votes of a project, or None if it was erased, see
`align.data.sets.source.load_active_votes`."""
RowPredicate = Callable[[pa.Table], Iterable[bool]]
"""A function that returns whether each row of a table is selected, by its columns beside the content."""


@dataclass(frozen=True, slots=True)
class RowRemoval:
    """A plan for removing rows from a data set: its folder, the masks of the rows, and the reason.

    Attributes:
        old: folder of the data set.
        masks: rows to remove; empty if the data set was replaced by another one already.
        reason: reason in words.
    """

    old: Path
    masks: Masks
    reason: str

    @property
    def name(self) -> str:
        """Name of the data set: the name of its run, or of its folder if no run made it."""
        return self.old.parent.name if self.old.name == "artifact" else self.old.name


def load_content_ids(setting: Any) -> frozenset[bytes]:
    """Parse content ids from a setting: a list of ids in hex, a single id, or a file with an id on each line.

    Raises:
        InputError: An entry is no content id, or there is no such file.
    """
    entries = setting if isinstance(setting, list | tuple) else [setting]
    if isinstance(setting, str) and not is_content_id(setting):
        path = parse_user_path(setting, FIELD)
        remedy = "Write content ids of 64 hex digits, a file with one a line, or stage.forget=erased."
        require(has_file(path, FIELD, remedy), FIELD, setting, "is neither an id nor a file of ids", remedy)
        entries = read_text(path, FIELD, remedy).split()
    for id in entries:
        require(is_content_id(id), FIELD, id, "is no content id", "An id has 64 hex digits; quote it.")
    require(bool(entries), FIELD, setting, "names no row", "Write content ids of 64 hex digits.")
    return frozenset(bytes.fromhex(id) for id in entries)


def is_content_id(value: Any) -> bool:
    """Return whether a value is a content id as text, which has 64 hex digits."""
    return isinstance(value, str) and len(value) == 64 and not {*value.lower()} - {*"0123456789abcdef"}


def select_masks(dataset: DataSet, setting: Any, load_active_votes: LoadActiveVotes) -> Masks:
    """Return for each split a mask of the rows that the setting `stage.forget` removes from a data set.

    Args:
        setting: `erased`, or content ids, see `load_content_ids`.

    Raises:
        InputError: The setting is invalid, or is `erased` and no source is an annotation project.
    """
    if setting != ERASED:
        ids = {id.hex() for id in load_content_ids(setting)}
        return build_masks(dataset, lambda id: id in ids, "content_id")
    kinds = {name: kind for name, kind in read_id_kinds(dataset.data).items() if kind != SHA256}
    problem = "none of its sources is an annotation project"
    require(bool(kinds), FIELD, ERASED, problem, "Name content ids: stage.forget=[…].")
    active_votes = {name: load_active_votes(kind) or () for name, kind in kinds.items()}

    def is_gone(source: str, id: str) -> bool:
        return source in active_votes and int(id.partition(":")[0]) not in active_votes[source]

    return build_masks(dataset, is_gone, "source", "id")


def build_masks(dataset: DataSet, should_remove: Callable[..., bool], *columns: str) -> Masks:
    """Return for each split a mask of the rows to remove, which a predicate selects by their values in `columns`.

    Args:
        should_remove: decides by the values of `columns`.
    """
    rows = {
        split: [
            should_remove(*values)
            for table in dataset.iter_tables(split, columns)
            for values in zip(*(table[name].to_pylist() for name in columns), strict=True)
        ]
        for split in SPLITS
    }
    return {split: np.array(flags, bool) for split, flags in rows.items()}


def check_masks(dataset: DataSet, setting: Any, masks: Masks) -> None:
    """Raise InputError if there is no row to remove, or if one of the ids in the setting belongs to no row."""
    if setting == ERASED:
        problem = "the votes and items of all its rows are still there"
        require(has_rows_to_remove(masks), FIELD, setting, problem, "There is nothing to forget.")
        return
    missing = {id.hex() for id in load_content_ids(setting)}
    total = len(missing)
    for split in SPLITS:
        for mask, table in iter_masked_tables(dataset, split, masks[split], ["content_id"]):
            missing.difference_update(table["content_id"].filter(pa.array(mask)).to_pylist())
    problem = f"{len(missing)} of {total} ids belong to no row of it (any more)"
    require(not missing, FIELD, min(missing, default=""), problem, "Look for it in the column content_id.")


def has_rows_to_remove(masks: Masks) -> bool:
    """Return whether masks select any row for removal."""
    return any(mask.any() for mask in masks.values())


def plan_row_removal(folder: Path, setting: Any, load_active_votes: LoadActiveVotes) -> tuple[RowRemoval, Input]:
    """Plan the removal of rows from a data set, and return the plan and the data set as an input of the run.

    Args:
        folder: folder of the data set.
        setting, load_active_votes: see `select_masks`.

    Raises:
        InputError: The setting matches no rows, or the data set was replaced by another one that still has such rows.
    """
    reason = REASONS[setting == ERASED]
    replacement = read_replacement(folder, "data.path")
    if replacement is None:
        dataset = load_data_set(folder)
        masks = select_masks(dataset, setting, load_active_votes)
        check_masks(dataset, setting, masks)
        return RowRemoval(folder, masks, reason), build_data_input(DataSource("manifest", str(folder)))
    new_run = Path(replacement["folder"])  # of this command, which was interrupted or has ended before
    if read_manifest(new_run).done and has_rows_to_remove(
        select_masks(load_data_set(new_run / "artifact"), setting, load_active_votes)
    ):
        require_not_replaced(folder, "data.path")
    record = Input(replacement["digest"], path=str(folder), details={"root": replacement["root"]})
    return RowRemoval(folder, {}, reason), record


def rewrite_without_rows(folder: Path, dataset: DataSet, masks: Masks, reason: str, removed_at: str) -> dict[str, Any]:
    """Write a copy of a data set to a new folder, with random leaves (tombstones) in place of the rows to remove.

    Args:
        masks: rows to remove.
        reason, removed_at: reason and time, for `replaces`.

    Returns:
        The content of the new `data.json`.
    """
    kept: Counts = {split: Counter() for split in SPLITS}
    removed: Counts = {split: Counter() for split in SPLITS}
    for split in SPLITS:
        for mask, table in iter_masked_tables(dataset, split, masks[split], ["source", "row", "content_id"]):
            rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
            for is_removed, row in zip(mask.tolist(), rows, strict=True):
                (removed if is_removed else kept)[split][row] += 1
    removed_ids = {id for rows in removed.values() for *_, id in rows}
    kept_ids = {id for rows in kept.values() for *_, id in rows}
    heads = {id: secrets.token_hex(32) for id in removed_ids - kept_ids}  # new names of clusters
    splits: dict[str, dict[str, Any]] = {}
    shards: dict[str, str] = {}
    for split in SPLITS:
        writer = ShardWriter(folder, split, int((~masks[split]).sum()))
        write_split(writer, dataset, split, masks[split], heads)
        writer.distinct = len(kept[split])
        splits[split] = writer.close()
        shards |= {path.name: file_digest(path) for path in writer.paths}
    earlier = {"replaces": dataset.data["replaces"]} if "replaces" in dataset.data else {}
    count = sum(map(len, removed.values()))
    # Without figures that include the removed rows.
    kept_fields = {key: value for key, value in dataset.data.items() if key not in ("lengths", "scores")}
    data = {
        **kept_fields,
        "sources": [subtract_removed(source, removed) for source in dataset.data["sources"]],
        "splits": splits,
        "root": compute_data_set_root(splits),
        "ids_root": compute_root(bytes.fromhex(id) for id in sorted(kept_ids)),
        "shards": shards,
        "replaces": {"root": dataset.data["root"], "reason": reason, "count": count, "at": removed_at, **earlier},
    }
    write_json(folder / DATA_SET_FILE, data)
    return data


def iter_masked_tables(
    dataset: DataSet, split: str, mask: ndarray, columns: list[str]
) -> Iterator[tuple[ndarray, pa.Table]]:
    """Yield (mask, table) for each Parquet row group of a split, with the part of `mask` for its rows."""
    first = 0
    for table in dataset.iter_tables(split, columns):
        yield mask[first : first + table.num_rows], table.select(columns)
        first += table.num_rows


def write_split(writer: ShardWriter, dataset: DataSet, split: str, mask: ndarray, heads: Mapping[str, str]) -> None:
    """Write one split of a data set with random leaves (tombstones) in place of the rows to remove. Earlier tombstones
    are kept.

    Args:
        mask: rows to remove, bool (N).
        heads: content id of a removed row → new name of its cluster.
    """
    first = 0
    for piece in dataset.iter_sequence(split):
        if isinstance(piece, bytes):
            writer.add_tombstone(piece)
            continue
        clusters = pa.array([heads.get(id, id) for id in piece["cluster"].to_pylist()], pa.string())
        piece = piece.set_column(piece.column_names.index("cluster"), "cluster", clusters)
        piece_mask = mask[first : first + piece.num_rows]
        first += piece.num_rows
        place = 0
        for is_removed, run in groupby(piece_mask.tolist()):
            rows = sum(1 for _ in run)
            if is_removed:
                for _ in range(rows):
                    writer.add_tombstone(secrets.token_bytes(TOMBSTONE))
            else:
                writer.add(piece.slice(place, rows))
            place += rows


def subtract_removed(source: Mapping[str, Any], removed: Counts) -> dict[str, Any]:
    """Return a source's entry in `data.json` with the removed rows subtracted from its counts."""
    splits = dict[str, dict[str, int]]()
    forgotten = source.get("forgotten", 0)
    for split, counts in source["splits"].items():
        times = [count for (name, *_), count in removed[split].items() if name == source["name"]]
        splits[split] = {"rows": counts["rows"] - sum(times), "distinct": counts["distinct"] - len(times)}
        forgotten += len(times)
    return {**source, "splits": splits, "forgotten": forgotten}


def iter_replaced_roots(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the Merkle roots of the data sets that a data set replaces, the newest first, from its `data.json`."""
    while "replaces" in data:
        data = data["replaces"]
        yield data["root"]


def delete_replaced_data_set(artifact: Path, replacement: Mapping[str, Any]) -> None:
    """Mark a data set as replaced by another one, and delete its shards and all files of its run with content of rows.
    A call after an interruption continues.

    Args:
        replacement: description of the replacement, see `align.run.artifacts.require_not_replaced`.
    """
    write_json(artifact / REPLACED, replacement)
    for path in artifact.iterdir():
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()
    folder = artifact.parent
    if artifact.name == "artifact" and (folder / RUN).is_file():
        for path in folder.iterdir():
            if path.is_dir() and path != artifact:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in KEPT_FILES:
                path.unlink()


@contextmanager
def lock_data_set(old: Path) -> Iterator[None]:
    """Hold a lock on a data set against concurrent removals, or raise RunBusy. Two removals at once would each keep the
    rows that the other one removes.

    Raises:
        RunBusy: Another command holds the lock.
    """
    folder = old.parent if old.name == "artifact" else old
    try:
        descriptor = lock_folder(folder)
    except RunBusy as error:
        problem = "another command is forgetting rows of it, or makes it"
        raise RunBusy("data.path", str(old), problem, "Wait for it, and name the data set that it makes.") from error
    try:
        yield
    finally:
        os.close(descriptor)
