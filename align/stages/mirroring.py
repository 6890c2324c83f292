"""A run at a service: begun with it, told what it made, and ended with it. See `align.mirrors`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from align.config.root import PARTS, Config, plain
from align.config.stages import STAGES
from align.mirrors import Artifact, Guarded, Watched, opened, require_installed
from align.run import Input, Manifest, Run

NONE = "none"
MIRROR: ContextVar[Guarded | None] = ContextVar("MIRROR", default=None)


def check_installed(config: Config) -> None:
    """Raises:
    InputError: the package of the service is missing.
    """
    if config.track.name != NONE:
        require_installed(config.track.name)


@contextmanager
def mirrored(run: Run, config: Config) -> Iterator[None]:
    """Have a run at the service of `track`, if any, for as long as the block takes."""
    if config.track.name == NONE:
        yield
        return
    mirror = opened(config.track.name, watched(run, config))
    token = MIRROR.set(mirror)
    try:
        yield
    except BaseException:
        mirror.finish({}, failed=True)
        raise
    finally:
        MIRROR.reset(token)
    if (made := made_by(run.manifest, run.folder)) is not None:
        mirror.publish(made)
    mirror.finish(run.manifest.metrics, failed=False)


def watched(run: Run, config: Config) -> Watched:
    manifest, every = run.manifest, plain(config)
    unread = {*PARTS} - {"stage", *STAGES[manifest.stage].reads}
    values = {key: value for key, value in every.items() if key not in unread}
    inputs = {name: as_artifact(name, read) for name, read in run.inputs.items()}
    root = run.folder.parent.parent
    return Watched(config.track.project, manifest.ref, id_of(manifest), root, run.folder, values, inputs, run.resumed)


def id_of(manifest: Manifest) -> str:
    """What a run is known by at a service: the same however often it is resumed, and another for a run that is made
    again under the same name."""
    begun = manifest.times.get("first_started", manifest.times["started"])
    return hashlib.sha256(f"{manifest.ref} {begun}".encode()).hexdigest()[:16]


def as_artifact(name: str, read: Input) -> Artifact:
    ref = f"{read.stage}:{read.name}" if read.stage else read.ref
    return Artifact(ref, name, str(read.details.get("root") or read.digest), Path(read.path) if read.path else None, {})


def made_by(manifest: Manifest, folder: Path) -> Artifact | None:
    """What a run published, if it is a model, an adapter or a data set."""
    data = manifest.metrics.get("root") if manifest.stage == "data" else None
    digest = manifest.digest or data
    if not digest:
        return None
    facts: dict[str, Any] = {
        "base": manifest.base and {"id": manifest.base.id, "digest": manifest.base.digest},
        "inputs": {name: read.digest for name, read in manifest.inputs.items()},
        "files": {name: value for name, value in manifest.outputs.items() if name.startswith("artifact/")},
    }
    return Artifact(manifest.ref, "data" if data else "model", digest, folder / "artifact", facts)
