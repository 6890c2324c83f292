"""Weights & Biases. Without a key in the environment it writes files beside ours, which `wandb sync` sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.files import read_text
from align.mirrors import COLLECTIONS, Artifact, Table, Unmirrored, Watched

TYPES = {"model": "model", "data": "dataset"}


def opened(run: Watched) -> Wandb:
    return Wandb(run)


def begun(folder: Path, **given: Any) -> Any:
    """A wandb run that writes below `folder`; offline unless a key is configured, so that nothing waits for a login."""
    mode: Any = mode_of()
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it asks its server even so
    import wandb

    # The manifest has the commit and the difference, masked; its own copy of the code would not be.
    own = {"disable_git": True, "disable_code": True}
    return wandb.init(dir=str(folder.resolve()), mode=mode, reinit="finish_previous", settings=own, **given)


def mode_of() -> str:
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


class Wandb:
    """A run at wandb. Offline, each process that works on the run writes a folder of its own under the run's one id."""

    def __init__(self, run: Watched) -> None:
        resume = "allow" if run.resumed and mode_of() == "online" else None  # offline it takes no such word
        name = run.ref.replace(":", "/", 1)
        self._run = begun(
            run.folder, project=run.project, name=name, id=run.id, resume=resume, config=run.settings
        )  # fmt: skip
        self._reached = run.folder / "wandb" / f"{run.id}.step"  # offline, wandb does not read what it wrote
        self.last = int(read_text(self._reached, "track")) if run.resumed and self._reached.is_file() else -1

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        import wandb

        shown = {n: wandb.Table(columns=list(t.columns), data=[[*row] for row in t.rows]) for n, t in tables.items()}
        self._run.log({**figures, **shown}, step=step)
        self._reached.parent.mkdir(exist_ok=True)
        self._reached.write_text(str(step))

    def publish(self, artifact: Artifact) -> None:
        self._run.log_artifact(referred(artifact), aliases=[artifact.alias])

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=int(failed))


def referred(artifact: Artifact) -> Any:
    """wandb's own object for an artifact: the place and the hash of each file, and none of their contents."""
    import wandb

    made = wandb.Artifact(COLLECTIONS[artifact.kind], TYPES[artifact.kind], metadata=artifact.metadata)
    assert artifact.folder is not None
    made.add_reference(artifact.folder.resolve().as_uri())
    return made


def named(project: str, root: Path, alias: str, artifact: Artifact | None) -> None:
    """A run of one artifact with the alias: to wandb the same files are the same version."""
    if artifact is None:
        raise Unmirrored("wandb takes an alias away only on its own page")
    run = begun(root, project=project, name=f"@{alias}", job_type="promote")
    run.log_artifact(referred(artifact), aliases=[artifact.alias, alias])
    run.finish()
