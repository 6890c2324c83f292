"""A run as every rank but the first has it: it reads what the first rank wrote, and what it writes itself is thrown
away."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.ranks import NOTES, RUN, tell_launcher
from align.run.folder import Run
from align.run.manifest import Manifest

NO_LOCK = -1


class Following(Run):
    """Attributes:
    folder: a temporary one, removed in the end, so that a stage may write there as the first rank does.
    """

    def __init__(self, shared: Path, manifest: Manifest, resumed: bool) -> None:
        scratch = tempfile.mkdtemp(prefix="align-rank-", dir=os.environ.get(NOTES))
        super().__init__(Path(scratch), manifest, NO_LOCK, resumed)
        self._shared = shared
        tell_launcher(RUN, str(shared))

    @property
    def shared(self) -> Path:
        return self._shared

    def _write(self, **values: Any) -> None:
        self.manifest = replace(self.manifest, **values)

    def begin(self, config_yaml: str) -> None:
        pass

    def publish(self, metrics: Mapping[str, Any], hardware: Mapping[str, Any] | None = None) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
