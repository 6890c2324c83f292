"""Rows of a data set forgotten: the same data set without them, and nothing left of the one that had them.

In the place of each row is a tombstone, a random leaf. So every other row stays where it was, and the new root differs
from the old one, which `replaces` of the new `data.json` names: runs that trained on the old one know it by that root.
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
from align.data.sets.ids import SHA256, IdKind, kinds_in
from align.data.sets.published import TOMBSTONE, DataSet, Shards, data_set, root_of_sides
from align.data.sets.sides import SIDES
from align.data.sources import DataSource, build_data_input
from align.run.artifacts import REPLACED, check_not_replaced, read_replacement
from align.run.digests import file_digest
from align.run.files import write_json
from align.run.folder import lock_folder
from align.run.manifest import FILE as RUN
from align.run.manifest import Input, read_manifest
from align.run.stale import FILE as STALE

FIELD = "stage.forget"
ERASED = "erased"
REASONS = {True: "rows whose votes the annotation store no longer has", False: "rows that were to be forgotten"}
"""By whether `erased` was asked for."""
KEPT = (RUN, "config.yaml", "metrics.json", "metrics.jsonl", "timing.jsonl", STALE)
"""Files of a run that say nothing of any row. They stay, and so does its `data.json`."""
Masks = Mapping[str, ndarray]
"""Side → whether each of its rows goes, bool (N)."""
Counts = Mapping[str, Counter[tuple[str, int, str]]]
"""Side → source, row and content id → how often the row stands there: one that is repeated more than once."""
Standing = Callable[[IdKind], Collection[int] | None]
"""The votes of a project that stand, see `align.data.sets.source.standing`; None where it was erased."""
Facts = Callable[[pa.Table], Iterable[bool]]
"""Whether each row goes, by its columns beside the content."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What is to be forgotten.

    Attributes:
        old: the folder of the data set.
        masks: which of its rows; empty where another data set took its place already.
        reason: in words.
    """

    old: Path
    masks: Masks
    reason: str

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.old.parent.name if self.old.name == "artifact" else self.old.name


def ids_in(given: Any) -> frozenset[bytes]:
    """Return the content ids of a setting: a list of them, one, or a file with one a line.

    Raises:
        InputError: one is none, or there is no such file.
    """
    listed = given if isinstance(given, list | tuple) else [given]
    if isinstance(given, str) and not is_id(given):
        path = parse_user_path(given, FIELD)
        remedy = "Write content ids of 64 hex digits, a file with one a line, or stage.forget=erased."
        require(has_file(path, FIELD, remedy), FIELD, given, "is neither an id nor a file of ids", remedy)
        listed = read_text(path, FIELD, remedy).split()
    for one in listed:
        require(is_id(one), FIELD, one, "is no content id", "An id has 64 hex digits; quote it.")
    require(bool(listed), FIELD, given, "names no row", "Write content ids of 64 hex digits.")
    return frozenset(bytes.fromhex(one) for one in listed)


def is_id(given: Any) -> bool:
    return isinstance(given, str) and len(given) == 64 and not {*given.lower()} - {*"0123456789abcdef"}


def going(found: DataSet, given: Any, standing: Standing) -> Masks:
    """Return the rows that are to be forgotten, as far as they are there.

    Args:
        given: the setting: `erased`, or see `ids_in`.

    Raises:
        InputError: the setting names no rows.
    """
    if given != ERASED:
        wanted = {id.hex() for id in ids_in(given)}
        return masks_of(found, lambda id: id in wanted, "content_id")
    kinds = {name: kind for name, kind in kinds_in(found.data).items() if kind != SHA256}
    problem = "none of its sources is an annotation project"
    require(bool(kinds), FIELD, ERASED, problem, "Name content ids: stage.forget=[…].")
    stand = {name: standing(kind) or () for name, kind in kinds.items()}

    def is_gone(source: str, id: str) -> bool:
        return source in stand and int(id.partition(":")[0]) not in stand[source]

    return masks_of(found, is_gone, "source", "id")


def masks_of(found: DataSet, goes: Callable[..., bool], *columns: str) -> Masks:
    """Return which rows go, by what they have in some columns."""
    rows = {
        side: [
            goes(*values)
            for table in found.tables(side, columns)
            for values in zip(*(table[name].to_pylist() for name in columns), strict=True)
        ]
        for side in SIDES
    }
    return {side: np.array(going, bool) for side, going in rows.items()}


def check_going(found: DataSet, given: Any, masks: Masks) -> None:
    """Raise InputError if there is nothing to forget, or an id is of no row."""
    if given == ERASED:
        problem = "the votes and items of all its rows are still there"
        require(some(masks), FIELD, given, problem, "There is nothing to forget.")
        return
    missing = {id.hex() for id in ids_in(given)}
    asked = len(missing)
    for side in SIDES:
        for mask, table in masked(found, side, masks[side], ["content_id"]):
            missing.difference_update(table["content_id"].filter(pa.array(mask)).to_pylist())
    problem = f"{len(missing)} of {asked} ids are of no row (any more)"
    require(not missing, FIELD, min(missing, default=""), problem, "Look for it in the column content_id.")


def some(masks: Masks) -> bool:
    """Return whether any row goes."""
    return any(mask.any() for mask in masks.values())


def asked_for(old: Path, given: Any, standing: Standing) -> tuple[Forgetting, Input]:
    """Return what is to be forgotten, and the data set as an input of a run.

    Args:
        old: its folder.
        given, standing: see `going`.

    Raises:
        InputError: the setting names no rows, or another data set with such rows took this one's place.
    """
    reason, before = REASONS[given == ERASED], read_replacement(old, "data.path")
    if before is None:
        found = data_set(old)
        masks = going(found, given, standing)
        check_going(found, given, masks)
        return Forgetting(old, masks, reason), build_data_input(DataSource("manifest", str(old)))
    taken = Path(before["folder"])  # this command was cut off, or has ended
    if read_manifest(taken).done and some(going(data_set(taken / "artifact"), given, standing)):
        check_not_replaced(old, "data.path")
    return Forgetting(old, {}, reason), Input(before["digest"], path=str(old), details={"root": before["root"]})


def forget(folder: Path, found: DataSet, masks: Masks, reason: str, at: str) -> dict[str, Any]:
    """Write a data set again without some rows.

    Args:
        reason, at: why and when, for `replaces`.

    Returns:
        what its `data.json` says.
    """
    left: Counts = {side: Counter() for side in SIDES}
    gone: Counts = {side: Counter() for side in SIDES}
    for side in SIDES:
        for mask, table in masked(found, side, masks[side], ["source", "row", "content_id"]):
            rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
            for goes, row in zip(mask.tolist(), rows, strict=True):
                (gone if goes else left)[side][row] += 1
    ids, kept_ids = ({id for rows in counts.values() for *_, id in rows} for counts in (gone, left))
    heads = {id: secrets.token_hex(32) for id in ids - kept_ids}  # what clusters are called instead
    splits, shards = {}, {}
    for side in SIDES:
        writer = Shards(folder, side, int((~masks[side]).sum()))
        write_side(writer, found, side, masks[side], heads)
        writer.distinct = len(left[side])
        splits[side] = writer.close()
        shards |= {path.name: file_digest(path) for path in writer.paths}
    before = {"replaces": found.data["replaces"]} if "replaces" in found.data else {}
    count = sum(map(len, gone.values()))
    data = {
        **{key: value for key, value in found.data.items() if key not in ("lengths", "scores")},  # of all rows
        "sources": [without_gone(source, gone) for source in found.data["sources"]],
        "splits": splits,
        "root": root_of_sides(splits),
        "ids_root": compute_root(bytes.fromhex(id) for id in sorted(kept_ids)),
        "shards": shards,
        "replaces": {"root": found.data["root"], "reason": reason, "count": count, "at": at, **before},
    }
    write_json(folder / DATA_SET_FILE, data)
    return data


def masked(found: DataSet, side: str, mask: ndarray, columns: list[str]) -> Iterator[tuple[ndarray, pa.Table]]:
    """Yield the rows of a side in their pieces, and which of them go."""
    first = 0
    for table in found.tables(side, columns):
        yield mask[first : first + table.num_rows], table.select(columns)
        first += table.num_rows


def write_side(writer: Shards, found: DataSet, side: str, mask: ndarray, heads: Mapping[str, str]) -> None:
    """Write one side without the rows that go, and with tombstones in their places and in those of earlier ones.

    Args:
        heads: what clusters are called instead of a row that was forgotten.
    """
    first = 0
    for piece in found.pieces(side):
        if isinstance(piece, bytes):
            writer.bury(piece)
            continue
        clusters = pa.array([heads.get(id, id) for id in piece["cluster"].to_pylist()], pa.string())
        piece = piece.set_column(piece.column_names.index("cluster"), "cluster", clusters)
        here = mask[first : first + piece.num_rows]
        first += piece.num_rows
        place = 0
        for goes, run in groupby(here.tolist()):
            rows = sum(1 for _ in run)
            if goes:
                for _ in range(rows):
                    writer.bury(secrets.token_bytes(TOMBSTONE))
            else:
                writer.add(piece.slice(place, rows))
            place += rows


def without_gone(source: Mapping[str, Any], gone: Counts) -> dict[str, Any]:
    """Return what is said of a source, without the rows that went."""
    splits = dict[str, dict[str, int]]()
    forgotten = source.get("forgotten", 0)
    for side, before in source["splits"].items():
        times = [count for (name, *_), count in gone[side].items() if name == source["name"]]
        splits[side] = {"rows": before["rows"] - sum(times), "distinct": before["distinct"] - len(times)}
        forgotten += len(times)
    return {**source, "splits": splits, "forgotten": forgotten}


def roots_before(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the roots that a data set replaces, the newest first."""
    while "replaces" in data:
        data = data["replaces"]
        yield data["root"]


def retire(artifact: Path, said: Mapping[str, Any]) -> None:
    """Take away a data set that another one replaces: first nobody reads it any more, then its files go, and all that
    its run shows of its rows. Cut off, it goes on when it is called again.

    Args:
        said: what took its place, see `align.run.artifacts.check_not_replaced`.
    """
    write_json(artifact / REPLACED, said)
    for path in artifact.iterdir():
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()
    folder = artifact.parent
    if artifact.name == "artifact" and (folder / RUN).is_file():
        for path in folder.iterdir():
            if path.is_dir() and path != artifact:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in KEPT:
                path.unlink()


@contextmanager
def alone_on(old: Path) -> Iterator[None]:
    """Hold a data set against other commands that forget rows of it: each would publish one that lacks its own rows
    alone.

    Raises:
        RunBusy: another one holds it.
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
