"""trackio. Where the environment names no server it keeps SQLite files in `trackio/` of the folder of all runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from align.mirrors import COLLECTIONS, Artifact, Table, Unmirrored, Watched, flat

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def opened(run: Watched) -> Trackio:
    return Trackio(run)


def local() -> bool:
    return not any(os.environ.get(name) for name in ELSEWHERE)


def trackio_in(root: Path) -> Any:
    """The package, with its folder where the runs are. It reads the variable once, when it is imported."""
    folder = os.environ.setdefault("TRACKIO_DIR", str(root.resolve() / "trackio"))
    import trackio
    from trackio.utils import TRACKIO_DIR

    if str(TRACKIO_DIR) != folder:
        raise Unmirrored(f"this process writes to {TRACKIO_DIR} already")
    return trackio


@contextmanager
def quiet() -> Iterator[None]:
    """What trackio prints is left out: of a local run it says that it uploads. A local run asks nobody: trackio asks
    the hub for the user's name wherever there is a token."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Trackio:
    """A run at trackio, by wandb's own calls. Its name ends with the run's id: trackio resumes runs by their names."""

    def __init__(self, run: Watched) -> None:
        self._trackio = trackio_in(run.root)
        with quiet():
            self._run = self._trackio.init(
                run.project, name=f"{run.ref} {run.id[:8]}", config=run.settings, resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        if local():
            place, project = shlex.quote(os.environ["TRACKIO_DIR"]), shlex.quote(run.project)
            print(f"track=trackio: TRACKIO_DIR={place} trackio show --project {project}", file=sys.stderr)
        self.last = self._run._next_step - 1
        for one in run.inputs.values():
            self._use(one)

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        made = {n: self._trackio.Table(columns=list(t.columns), data=[[*r] for r in t.rows]) for n, t in tables.items()}
        self._run.log({**figures, **made}, step=step)

    def _use(self, artifact: Artifact) -> None:
        """Tie the run to what it read, where trackio has that; the configuration has its digest in any case."""
        for name in COLLECTIONS.values():
            with suppress(ValueError):
                self._run.use_artifact(f"{name}:{artifact.alias}")

    def publish(self, artifact: Artifact) -> None:
        with quiet():
            made = self._trackio.Artifact(COLLECTIONS[artifact.kind], artifact.kind, metadata=artifact.metadata)
            assert artifact.folder is not None
            made.add_reference(f"{artifact.folder.resolve().as_uri()}/")
            self._run.log_artifact(made, aliases=[artifact.alias])

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        with quiet():
            if figures:
                self._run.log({f"result/{name}": value for name, value in flat(figures)})
            self._trackio.finish()  # the run's own would be called once more as the process ends


def named(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """The alias of a version of the project's `models`."""
    if artifact is None:
        raise Unmirrored("trackio takes no alias away, and has it where it was")
    if not local():
        raise Unmirrored("trackio moves aliases in its local folder only")
    storage = trackio_in(root).SQLiteStorage
    found = storage.resolve_artifact_version(project, COLLECTIONS["model"], artifact.alias)
    if found is None:
        raise Unmirrored(f"trackio does not have {artifact.ref}, which was made without track=trackio")
    storage.reassign_alias(project, found["artifact_id"], alias, found["version_id"])
