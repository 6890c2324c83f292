"""Services that display runs (MLflow, trackio, wandb): one module per service, one interface, all optional.

The files of a run are authoritative. A mirror that fails is reported once and then off: it stops neither a training nor
a promotion. Everything sent to a service is masked first, see `align.core.redaction`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from align.core.distribution import require_extra
from align.core.redaction import mask_tree, redact
from align.track import Table


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model or data set that a run read or made, identified for a metrics service by its folder and digest. Its files
    are not copied.

    Attributes:
        ref: `stage:name` of the run that made it, or another reference.
        kind: `model` or `data`; for an input, its role in the run.
        folder: its folder; None if it has none.
        facts: further values, as JSON.
    """

    ref: str
    kind: str
    digest: str
    folder: Path | None
    facts: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        return {"run": self.ref, "digest": self.digest, **self.facts}

    @property
    def alias(self) -> str:
        """The alias `sha256-…` by which the artifact's version is found at a service, made of the first 16 characters
        of its digest."""
        return f"sha256-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class MirroredRun:
    """A run's name, project, configuration, inputs and folders, as they are sent to a metrics service.

    Attributes:
        project: project of the service that groups runs.
        ref: `stage:name`.
        id: the same over all resumes of the run.
        root, folder: the folder of all runs, and this run's.
        resumed: another process began the run.
    """

    project: str
    ref: str
    id: str
    root: Path
    folder: Path
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    resumed: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The run's configuration with the reference and digest of each input added under `inputs`."""
        inputs = {name: {"ref": input.ref, "digest": input.digest} for name, input in self.inputs.items()}
        return {**self.config, "inputs": inputs}


COLLECTIONS = {"model": "models", "data": "data"}
"""Name of the collection at a service by kind of artifact; each run's artifact is a version in it."""


class Mirror(Protocol):
    """A connection to a metrics service, which gets the metrics and artifacts of one run.

    Attributes:
        last: last step that the service has; -1 for a new run.
    """

    @property
    def last(self) -> int: ...

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """Send the metrics and tables of a step to the service."""
        ...

    def publish(self, artifact: Artifact) -> None:
        """Send a reference to a model or data set that the run made, without its files."""
        ...

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        """End the run at the service as failed or finished, with its final metrics."""
        ...


class MirrorUnsupported(Exception):
    """Exception for a request that a metrics service does not support, with the reason as its text."""


def iter_flat_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping as pairs of a dotted key and a value. An empty mapping counts as a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from iter_flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


__all__ = [
    "Artifact",
    "GuardedMirror",
    "Mirror",
    "MirrorUnsupported",
    "MirroredRun",
    "Table",
    "open_mirror",
    "require_installed",
    "set_alias",
]


def require_installed(service: str) -> None:
    """Raise InputError if the Python package of a metrics service, such as `wandb`, is not installed."""
    require_extra(service, "track", service)


def open_mirror(service: str, run: MirroredRun) -> GuardedMirror:
    """Return the mirror of a run at a metrics service, with secrets in its configuration masked. The service is
    contacted only when the first metrics or artifacts are sent."""
    inputs = {name: mask_artifact(input) for name, input in run.inputs.items()}
    masked_run = replace(run, config=mask_tree(run.config, redact), inputs=inputs)
    return GuardedMirror(service, lambda: importlib.import_module(f"align.mirrors.{service}").open_run(masked_run))


def set_alias(service: str, project: str, root: Path, alias: str, artifact: Artifact | None) -> str:
    """Set an alias to an artifact at a metrics service, or remove it if no artifact is given, and return a line about
    the result.

    A failure of the service raises nothing.
    """
    try:
        importlib.import_module(f"align.mirrors.{service}").set_alias(project, root, alias, artifact)
    except MirrorUnsupported as error:
        return f"track={service}: @{alias} is not mirrored: {error}"
    except Exception as error:
        return f"track={service}: @{alias} is not mirrored: {describe_error(error)}"
    return f"track={service}: @{alias} is mirrored"


def mask_artifact(artifact: Artifact) -> Artifact:
    return replace(artifact, ref=redact(artifact.ref), facts=mask_tree(artifact.facts, redact))


def describe_error(error: Exception) -> str:
    """Return an exception's type and message on one line of at most 300 characters, with secrets masked."""
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


class GuardedMirror:
    """A mirror that catches the service's errors: it prints the first one and then sends nothing more. Steps that the
    service has already are not sent again. Everything is masked before it is sent."""

    def __init__(self, service: str, begin: Callable[[], Mirror]) -> None:
        self.service = service
        self._mirror = cast(Mirror | None, None)
        self._begin: Callable[[], Mirror] | None = begin

    def begin(self) -> None:
        """Begin the run at the service, unless that was tried before.

        It is called late, so that a run whose input is refused is never shown.
        """
        if (begin := self._begin) is not None:
            self._begin = None
            self._try(lambda: setattr(self, "_mirror", begin()))

    @property
    def last(self) -> int:
        return self._mirror.last if self._mirror else -1

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        self.begin()
        mirror = self._mirror
        if mirror is None or step <= mirror.last:
            return
        masked_tables = {
            name: Table([redact(column) for column in table.columns], mask_tree(table.rows, redact))
            for name, table in tables.items()
        }
        masked_figures = {redact(name): value for name, value in mask_tree(figures, redact).items()}
        self._try(lambda: mirror.log(step, masked_figures, masked_tables))

    def publish(self, artifact: Artifact) -> None:
        self.begin()
        if mirror := self._mirror:
            self._try(lambda: mirror.publish(mask_artifact(artifact)))

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        if not failed:
            self.begin()
        if mirror := self._mirror:
            self._try(lambda: mirror.finish(mask_tree(figures, redact), failed))
        self._mirror = self._begin = None

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            mirror = self._mirror
            self._mirror = None
            with suppress(Exception):  # if the service still answers, it should not wait for the run
                if mirror:
                    mirror.finish({}, failed=True)
            problem = f"align: track={self.service} is off until this run is started again: {describe_error(error)}"
            print(f"{problem}\nalign: the run continues; its folder has all data", file=sys.stderr)
