"""Everything that was made from something that is to be forgotten, in the order in which it is made again, with the
commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.root import DEFAULT_ROOT
from align.core.errors import InputError
from align.registry.index import Index
from align.registry.record import UNREADABLE, Record, forgets
from align.registry.selection import MAY_HAVE
from align.run.artifacts import replacement
from align.run.folder import unused
from align.run.manifest import read_manifest

Words = Callable[[Mapping[str, Any], Mapping[str, str]], Iterable[str]]
"""The words of a command line, out of a configuration and of where its inputs lie."""
WITHOUT = ("run.", "store.url")


@dataclass(frozen=True, slots=True)
class Made:
    """A run that is to be made again.

    Attributes:
        because: why it is stale.
        again: the run that takes its place, `stage:name`; empty where nobody can say how it is made.
        command: that makes it again; of a data set whose rows go none, for it is made as they go.
        problem: why there is no command.
    """

    run: str
    because: str
    again: str = ""
    command: str = ""
    problem: str = ""


def downstream(index: Index, read: Mapping[str, str], sets: Iterable[str], words: Words, store: str) -> list[Made]:
    """The runs that read what is to be forgotten, and those that were made from them, each behind what it is made
    from.

    Args:
        read: run → why it is stale.
        sets: the data sets whose rows go.
        store: the words that name the annotation store.
    """
    records, because = reached(index, read)
    ordered, again, taken = list(in_order(records)), dict[str, str](), set[Path]()
    found = []
    for run in ordered:
        stage, _, name = run.partition(":")
        by = replaced_by(index.root / records[run]["folder"]) if stage == "data" else ""
        again[run] = by or f"{stage}:{free_name(index.root / stage, name, taken)}"
        if by or run in sets:
            found.append(Made(run, because[run], again[run]))
            continue
        line, problem = command(index, records[run], again, words, store)
        found.append(Made(run, because[run], again[run] if line else "", line, problem))
    return found


def reached(index: Index, read: Mapping[str, str]) -> tuple[dict[str, Record], dict[str, str]]:
    """The records of these runs and of all that was made from them, and why each is stale: what is certain counts
    before what may be."""
    records, because = dict[str, Record](), dict[str, str]()

    def uncertain(run: str) -> bool:
        return read.get(run, MAY_HAVE).startswith(MAY_HAVE)

    for first in sorted(read, key=uncertain):
        if first in because:
            continue
        because[first] = read[first]
        for run in (waiting := [first]):  # grows while we walk it
            if (record := index.record(run)) is None:
                continue
            records[run] = record
            for child in record.get("children", ()):
                known = index.record(child)
                if child not in because and uncertain(child) and known is not None:
                    if forgets(known) and run == first:  # which has nothing of the rows that went
                        continue
                    because[child] = f"made from {run}"
                    waiting.append(child)
    return records, because


def free_name(parent: Path, name: str, taken: set[Path]) -> str:
    """A name that no run has, nor one of this plan."""
    free = unused(parent, name)
    while parent / free in taken:
        free += "-2"
    taken.add(parent / free)
    return free


def in_order(records: Mapping[str, Record]) -> Iterator[str]:
    """The runs, each behind those that it was made from; a circle is entered where it is met."""
    seen = set[str]()
    for first in sorted(records, key=lambda run: (str(records[run].get("started")), run)):
        path = [(first, iter(sorted(records[first].get("parents", ()))))] if first not in seen else []
        seen.add(first)
        while path:
            run, parents = path[-1]
            parent = next((one for one in parents if one in records and one not in seen), None)
            if parent is None:
                path.pop()
                yield run
            else:
                seen.add(parent)
                path.append((parent, iter(sorted(records[parent].get("parents", ())))))


def replaced_by(folder: Path) -> str:
    """The data set that took a data set's place; empty where none did."""
    try:
        said = replacement(folder / "artifact", "data.path")
    except InputError:
        return ""
    return str(said["by"]) if said and said.get("by", "").startswith("data:") else ""


def command(
    index: Index, record: Record, again: Mapping[str, str], words: Words, store: str
) -> tuple[str, str]:  # fmt: skip
    """The command that makes a run again under its new name, from what is made again before it; and why there is none.

    Args:
        again: run → the one that takes its place.
    """
    if record["status"] == UNREADABLE:
        return "", "its manifest cannot be read"
    manifest = read_manifest(index.root / record["folder"])
    if record["stage"] == "export" and manifest.config["export"].get("name") == "check":
        return "", "it measured another export: measure the one that takes its place (export=check)"
    refs, votes = dict[str, str](), False
    for name, given in record["inputs"].items():
        made = index.maker(str(given.get("root") or given["digest"]), given.get("run", "")) or given.get("run", "")
        if made:
            refs[name] = again.get(made, made)
        votes |= bool(given.get("project"))
    if not refs.get("data", "data:").startswith("data:"):
        del refs["data"]  # a file of a run: it is named by its path
    try:
        line = [word for word in words(manifest.config, refs) if not word.startswith(WITHOUT)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return "", f"its settings say something that this version does not read ({type(error).__name__})"
    for run, by in again.items():  # what is read by its path
        old, new = (f"{index.root.absolute() / one.replace(':', '/', 1)}/" for one in (run, by))
        line = [word.replace(old, new) for word in line]
    if base := record.get("base"):
        made = index.maker(base["digest"], "")
        if made in again:
            folder = index.root.absolute() / again[made].replace(":", "/", 1) / "artifact"
            line = [word for word in line if not word.startswith("model.path=")] + [f"model.path={folder}"]
    name = again[record["run"]].partition(":")[2]
    root = [] if index.root == Path(DEFAULT_ROOT) else [f"run.root={index.root}"]
    votes = votes or record["stage"] in ("sample", "annotate")
    return shlex.join(
        ["python", "-m", "align", *line, *([store] if votes and store else []), *root, f"run.name={name}"]
    ), ""
