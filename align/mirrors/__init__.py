"""Services that show runs beside the runs' own files: one file a service, one interface, and nothing depends on any.

The files of a run are the truth. A mirror that fails is told to people once and is off from then on: it stops no
training and undoes no promotion. Everything that goes to a service is masked first, see `align.redaction`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from align.distribution import require_extra
from align.mirrors.mirror import Artifact, Mirror, Table, Unmirrored, Watched
from align.redaction import masked_tree, redacted

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
