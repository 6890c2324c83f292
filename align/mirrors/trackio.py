"""trackio. Without a server in the environment it keeps SQLite files in `trackio/` of the folder of all runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from align.mirrors import COLLECTIONS, Artifact, MirroredRun, MirrorUnsupported, Table, iter_flat_items

SERVER_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def open_run(run: MirroredRun) -> Trackio:
    return Trackio(run)


def is_local() -> bool:
    return not any(os.environ.get(name) for name in SERVER_VARIABLES)


def import_trackio(root: Path) -> Any:
    """Import trackio and return it, with its data in `trackio/` below `root` unless `TRACKIO_DIR` is set. trackio reads
    the variable once, at its import. Raises MirrorUnsupported if this process uses another folder already."""
    folder = os.environ.setdefault("TRACKIO_DIR", str(root.resolve() / "trackio"))
    import trackio
    from trackio.utils import TRACKIO_DIR

    if str(TRACKIO_DIR) != folder:
        raise MirrorUnsupported(f"this process writes to {TRACKIO_DIR} already")
    return trackio


@contextmanager
def suppress_output() -> Iterator[None]:
    """Discard what trackio prints in the `with` block, and for local runs prevent its requests to the Hugging Face Hub.
    What it prints about local runs is wrong.

    With a token, trackio asks the hub for the user's name.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or is_local()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


class Trackio:
    """A run at trackio, whose name ends with the run's id, because trackio resumes runs by their names."""

    def __init__(self, run: MirroredRun) -> None:
        self._trackio = import_trackio(run.root)
        with suppress_output():
            self._run = self._trackio.init(
                run.project,
                name=f"{run.ref} {run.id[:8]}",
                config=run.settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        if is_local():
            folder = shlex.quote(os.environ["TRACKIO_DIR"])
            command = f"TRACKIO_DIR={folder} trackio show --project {shlex.quote(run.project)}"
            print(f"track=trackio: {command}", file=sys.stderr)
        self.last = self._run._next_step - 1
        for artifact in run.inputs.values():
            self._use(artifact)

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        trackio_tables = {
            name: self._trackio.Table(columns=list(table.columns), data=[[*row] for row in table.rows])
            for name, table in tables.items()
        }
        self._run.log({**figures, **trackio_tables}, step=step)

    def _use(self, artifact: Artifact) -> None:
        """Link the trackio run to an input artifact, or do nothing if trackio does not have it. The configuration has
        its digest in any case."""
        for name in COLLECTIONS.values():
            with suppress(ValueError):
                self._run.use_artifact(f"{name}:{artifact.alias}")

    def publish(self, artifact: Artifact) -> None:
        with suppress_output():
            reference = self._trackio.Artifact(COLLECTIONS[artifact.kind], artifact.kind, metadata=artifact.metadata)
            assert artifact.folder is not None
            reference.add_reference(f"{artifact.folder.resolve().as_uri()}/")
            self._run.log_artifact(reference, aliases=[artifact.alias])

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        with suppress_output():
            if figures:
                self._run.log({f"result/{name}": value for name, value in iter_flat_items(figures)})
            self._trackio.finish()  # the run's own finish() would be called again at exit


def set_alias(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """Move an alias in the project's collection `models` to the version of an artifact. Raises MirrorUnsupported if no
    artifact is given, if trackio does not have it, or if the runs are on a server."""
    if artifact is None:
        raise MirrorUnsupported("trackio cannot remove an alias, so it keeps the old one")
    if not is_local():
        raise MirrorUnsupported("trackio moves aliases in its local folder only")
    storage = import_trackio(root).SQLiteStorage
    version = storage.resolve_artifact_version(project, COLLECTIONS["model"], artifact.alias)
    if version is None:
        raise MirrorUnsupported(f"trackio does not have {artifact.ref}, which was made without track=trackio")
    storage.reassign_alias(project, version["artifact_id"], alias, version["version_id"])
