"""What a service is told of a run, and the one interface that each service has here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
