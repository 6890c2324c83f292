"""Services that show runs beside the runs' own files: one file a service, one interface, and nothing depends on any.

The files of a run are the truth. A mirror that fails is told to people once and is off from then on: it stops no
training and undoes no promotion. Everything that goes to a service is masked first, see `align.core.redaction`.
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
from align.core.redaction import masked_tree, redacted
from align.track import Table


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that a run read or made. A mirror refers to it by its folder and its digest, and copies none of it.

    Attributes:
        ref: `stage:name` of the run that made it, or what else it is called.
        kind: `model` or `data`; of an input, what it is to the run.
        folder: where it lies; None where it is no file.
        facts: what else is worth knowing, as JSON.
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
        """By which a service finds it again."""
        return f"sha256-{self.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Watched:
    """A run, as a service is told of it.

    Attributes:
        project: what the service puts runs together by.
        ref: `stage:name`.
        id: the same for as long as the run is, however often it is resumed.
        root, folder: of all runs, and of this one.
        resumed: it was begun by another process.
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
        """The configuration, and what it came to: digests of what was read."""
        read = {name: {"ref": one.ref, "digest": one.digest} for name, one in self.inputs.items()}
        return {**self.config, "inputs": read}


COLLECTIONS = {"model": "models", "data": "data"}
"""Under which a service that has a place for artifacts keeps those of a project, each run's a version."""


class Mirror(Protocol):
    """A run at a service.

    Attributes:
        last: the last step that the service has; -1 of a run that is new to it.
    """

    @property
    def last(self) -> int: ...

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        """What a step came to."""
        ...

    def publish(self, artifact: Artifact) -> None:
        """What the run made."""
        ...

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        """The run is over, with its headline figures."""
        ...


class Unmirrored(Exception):
    """The service cannot be told this; its text says why."""


def flat(values: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted key and a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{front}{key}.")
        else:
            yield f"{front}{key}", value


__all__ = ["Artifact", "Guarded", "Mirror", "Table", "Unmirrored", "Watched", "named", "opened", "require_installed"]


def require_installed(service: str) -> None:
    """Refuse a service whose package is not there, before any work is done.

    Raises:
        InputError: with the command that installs it.
    """
    require_extra(service, "track", service)


def opened(service: str, run: Watched) -> Guarded:
    """The run at a service, where it is begun or continued once there is something to show."""
    inputs = {name: masked_artifact(one) for name, one in run.inputs.items()}
    masked = replace(run, config=masked_tree(run.config, redacted), inputs=inputs)
    return Guarded(service, lambda: importlib.import_module(f"align.mirrors.{service}").opened(masked))


def named(service: str, project: str, root: Path, alias: str, artifact: Artifact | None) -> str:
    """Let an alias mean an artifact at a service too, or nothing any more.

    Returns:
        what came of it, in a line. A service that cannot be told stops nobody.
    """
    try:
        importlib.import_module(f"align.mirrors.{service}").named(project, root, alias, artifact)
    except Unmirrored as error:
        return f"track={service}: @{alias} is not mirrored: {error}"
    except Exception as error:
        return f"track={service}: @{alias} is not mirrored: {as_text(error)}"
    return f"track={service}: @{alias} is mirrored"


def masked_artifact(artifact: Artifact) -> Artifact:
    return replace(artifact, ref=redacted(artifact.ref), facts=masked_tree(artifact.facts, redacted))


def as_text(error: Exception) -> str:
    """An error of a service on one line, masked."""
    return redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


class Guarded:
    """A mirror that stops nothing: it is off after its first failure, and a step that the service has is not sent
    again."""

    def __init__(self, service: str, begin: Callable[[], Mirror]) -> None:
        self.service, self._mirror = service, cast(Mirror | None, None)
        self._begin: Callable[[], Mirror] | None = begin

    def begin(self) -> None:
        """Show the run at the service from now on, if that was not done before. A run whose input is refused is not
        shown."""
        if (begin := self._begin) is not None:
            self._begin = None
            self._tried(lambda: setattr(self, "_mirror", begin()))

    @property
    def last(self) -> int:
        return self._mirror.last if self._mirror else -1

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        self.begin()
        mirror = self._mirror
        if mirror is None or step <= mirror.last:
            return
        shown = {
            name: Table([redacted(column) for column in one.columns], masked_tree(one.rows, redacted))
            for name, one in tables.items()
        }
        told = {redacted(name): value for name, value in masked_tree(figures, redacted).items()}
        self._tried(lambda: mirror.log(step, told, shown))

    def publish(self, artifact: Artifact) -> None:
        self.begin()
        if mirror := self._mirror:
            self._tried(lambda: mirror.publish(masked_artifact(artifact)))

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None:
        if not failed:
            self.begin()
        if mirror := self._mirror:
            self._tried(lambda: mirror.finish(masked_tree(figures, redacted), failed))
        self._mirror = self._begin = None

    def _tried(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            mirror, self._mirror = self._mirror, None
            with suppress(Exception):  # a service that can still be told so does not go on waiting for the run
                if mirror:
                    mirror.finish({}, failed=True)
            problem = f"align: track={self.service} is off from here on: {as_text(error)}"
            print(f"{problem}\nalign: the run goes on; its own files have everything", file=sys.stderr)
