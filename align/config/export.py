"""Settings of `stage=export`, which writes an adapter or a merged model for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import Settings
from align.core.errors import require
from align.core.files import parse_user_path


@dataclass
class ExportStageConfig(Settings):
    """An export with its receipt. Its settings are those of the group `export`."""

    AT: ClassVar[str] = "stage"

    name: str = "export"

    def check(self, config: Any) -> None:
        """Raise InputError if `export.verify` has no effect, or if the private key of `export.sign` is in the folder of
        runs.

        That folder is copied and shown to others.
        """
        verify = config.export.verify
        is_used = verify is None or config.export.name == "check"
        remedy = "Drop it; export.sign=KEY signs."
        require(is_used, "export.verify", verify, "is for export=check and stage=serve", remedy)
        sign = config.export.sign
        root = config.run.folder.resolve()
        is_public = sign is not None and parse_user_path(sign, "export.sign").resolve().is_relative_to(root)
        problem = "lies in the folder of the runs, which is copied and shown to others"
        require(not is_public, "export.sign", sign, problem, "Keep the key outside of run.root.")
