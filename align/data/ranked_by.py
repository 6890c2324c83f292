"""Rows that a scorer ranked: which runs of best-of-n (`stage=sample stage.best_of=N`) made what a data set holds. What
is trained on it was optimised against those runs' scorers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from align.data.read.files import files_of
from align.errors import InputError
from align.files import user_path
from align.run import Input, known_digest
from align.run.artifacts import readable
from align.run.manifest import FILE, Manifest

RANKED_BY = "ranked_by"
"""What an input's details call these runs."""


def with_rankers(inputs: Mapping[str, Input], root: Path) -> dict[str, Input]:
    """Inputs, of which each that is rows to train on names the runs that ranked them, `sample:NAME`.

    Args:
        root: the folder of runs.
    """
    found = dict(inputs)
    for name, given in inputs.items():
        rows = name == "data" or name.startswith("sources.")
        if rows and given.path and (runs := ranked_by(given, root)):
            found[name] = replace(given, details={**given.details, RANKED_BY: list(runs)})
    return found


def ranked_by(given: Input, root: Path) -> tuple[str, ...]:
    """The runs that ranked the rows of a data set: of files, those that published one of them, wherever it lies now; of
    a data set of `stage=data`, those of its sources."""
    if "root" in given.details:
        made = readable(Path(given.path).parent)
        sources = made.inputs.values() if made else ()
        return tuple(dict.fromkeys(run for source in sources for run in source.details.get(RANKED_BY, ())))
    place = user_path(given.path, "data.path").absolute()
    folders = [path.parent for path in sorted(root.glob(f"sample/*/{FILE}"))]
    folders += [parent for parent in place.parents if (parent / FILE).is_file()]  # of another root than this one
    made = [manifest for folder in folders if (manifest := readable(folder)) and ranks(manifest)]
    known = {digest: manifest.ref for manifest in made for digest in manifest.outputs.values()}
    digests = [given.digest]  # of a file; several have one over all of them
    if known and (place.is_dir() or has_magic(given.path)):
        with suppress(InputError):  # it is a corpus with the name of a folder
            digests += map(known_digest, files_of(given.path))
    return tuple(dict.fromkeys(known[digest] for digest in digests if digest in known))


def ranks(manifest: Manifest) -> bool:
    """Whether a run is a finished one of best-of-n."""
    return manifest.done and manifest.stage == "sample" and manifest.config["stage"].get("best_of") is not None
