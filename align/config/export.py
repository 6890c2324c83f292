"""`stage=export`: an adapter, or a model with it merged in, that others load. The group `export` says which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import Settings
from align.core.errors import require
from align.core.files import user_path


@dataclass
class ExportStageConfig(Settings):
    """An export with its receipt. Its settings are those of the group `export`."""

    AT: ClassVar[str] = "stage"

    name: str = "export"

    def check(self, config: Any) -> None:
        """Raises InputError where a key has no use, or lies among the runs, which are copied and shown to others."""
        given, root = config.export, config.run.folder.resolve()
        problem, remedy = "is for export=check and stage=serve", "Drop it; export.sign=KEY signs."
        require(given.verify is None or given.name == "check", "export.verify", given.verify, problem, remedy)
        inside = given.sign is not None and user_path(given.sign, "export.sign").resolve().is_relative_to(root)
        problem = "lies in the folder of the runs, which is copied and shown to others"
        require(not inside, "export.sign", given.sign, problem, "Keep the key outside of run.root.")
