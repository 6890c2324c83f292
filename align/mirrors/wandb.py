"""Weights & Biases. Without `WANDB_API_KEY` in the environment it writes files to the run's folder, which `wandb sync`
sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.files import read_text
from align.mirrors import COLLECTIONS, Artifact, MirroredRun, MirrorUnsupported, Table

TYPES = {"model": "model", "data": "dataset"}


def open_run(run: MirroredRun) -> Wandb:
    return Wandb(run)


def start_run(folder: Path, **options: Any) -> Any:
    """Start a wandb run that writes below `folder` and return it. It is offline unless `WANDB_MODE` or `WANDB_API_KEY`
    is set, to avoid a login."""
    mode: Any = choose_mode()
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise it connects even offline
    import wandb

    # The manifest holds commit and diff, masked; wandb's copy of the code would not be masked.
    settings = {"disable_git": True, "disable_code": True}
    return wandb.init(dir=str(folder.resolve()), mode=mode, reinit="finish_previous", settings=settings, **options)


def choose_mode() -> str:
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


class Wandb:
    """A run at Weights & Biases, to which metrics, tables and artifacts are logged. Offline, each process that
    continues the run writes a folder of its own under the run's id."""

    def __init__(self, run: MirroredRun) -> None:
        resume = "allow" if run.resumed and choose_mode() == "online" else None  # not supported offline
        name = run.ref.replace(":", "/", 1)
        self._run = start_run(run.folder, project=run.project, name=name, id=run.id, resume=resume, config=run.settings)
        self._step_file = run.folder / "wandb" / f"{run.id}.step"  # offline, wandb does not read its own files
        self.last = int(read_text(self._step_file, "track")) if run.resumed and self._step_file.is_file() else -1

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        import wandb

        wandb_tables = {
            name: wandb.Table(columns=list(table.columns), data=[[*row] for row in table.rows])
            for name, table in tables.items()
        }
        self._run.log({**figures, **wandb_tables}, step=step)
        self._step_file.parent.mkdir(exist_ok=True)
        self._step_file.write_text(str(step))

    def publish(self, artifact: Artifact) -> None:
        self._run.log_artifact(make_reference(artifact), aliases=[artifact.alias])

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=int(failed))


def make_reference(artifact: Artifact) -> Any:
    """Return a wandb artifact with the path and hash of each file of an artifact's folder, without the files'
    contents."""
    import wandb

    reference = wandb.Artifact(COLLECTIONS[artifact.kind], TYPES[artifact.kind], metadata=artifact.metadata)
    assert artifact.folder is not None
    reference.add_reference(artifact.folder.resolve().as_uri())
    return reference


def set_alias(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """Start a short wandb run that logs an artifact with the alias. The same files are the same version to wandb.
    Raises MirrorUnsupported without an artifact."""
    if artifact is None:
        raise MirrorUnsupported("wandb takes an alias away only on its own page")
    run = start_run(root, project=project, name=f"@{alias}", job_type="promote")
    run.log_artifact(make_reference(artifact), aliases=[artifact.alias, alias])
    run.finish()
