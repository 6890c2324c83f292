"""The sweeps that `-m` made: which runs each of them is, noted beside its page in `compare/` of the folder of runs."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from align.core.errors import CorruptFile, MissingArtifact, require_schema_version
from align.core.outputs import refuse_foreign_file
from align.run.files import json_object, write_json

FOLDER = "compare"
SCHEMA = 1
FIELD = "stage.sweep"
LATEST = "latest"


def note_sweep(root: Path, name: str, runs: list[str]) -> None:
    """Keep which runs a sweep is.

    Args:
        runs: each as `stage:name`.
    """
    path = root / FOLDER / f"{name}.json"
    refuse_foreign_file(path, "run.root", is_note)
    write_json(path, {"schema_version": SCHEMA, "runs": runs})


def is_note(data: bytes) -> bool:
    """Return whether the bytes are those of a note as `note_sweep` writes it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == {"schema_version", "runs"}


def runs_of(root: Path, given: str) -> list[str]:
    """The runs of a sweep.

    Args:
        given: its name, or `latest`.

    Raises:
        MissingArtifact: there is no such sweep; the message has the nearest name.
        InputError: another version wrote its note.
        CorruptFile: its note names no runs.
    """
    noted = {path.stem: path for path in (root / FOLDER).glob("*.json") if path.is_file()}
    newest = max(noted, key=lambda name: (noted[name].stat().st_mtime_ns, name), default=None)
    name = newest if given == LATEST else given
    if name is None or name not in noted:
        close = difflib.get_close_matches(given, noted, n=1)
        remedy = f"Did you mean {close[0]}? " if close else ""
        problem = f"is no sweep under {root}"
        raise MissingArtifact(FIELD, given, problem, f"{remedy}A sweep (-m) of two runs that are done leaves one.")
    found = json_object(noted[name], FIELD, "Name its runs by stage.runs.")
    require_schema_version(found.get("schema_version"), SCHEMA, FIELD, str(noted[name]), "Name its runs by stage.runs.")
    runs = found.get("runs")
    if not isinstance(runs, list) or not all(isinstance(r, str) for r in runs):
        raise CorruptFile(FIELD, given, f"{noted[name]} does not say which runs it is of", "Name them by stage.runs.")
    return runs
