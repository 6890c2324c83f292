"""Which losses the installed TRL has a trainer for. Imports neither TRL nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from align.core.errors import require

EXPERIMENTAL: Mapping[str, str] = MappingProxyType({"orpo": "orpo", "simpo": "cpo"})
"""Loss → the module of `trl.experimental` that has it. These modules come and go from one version to the next."""
HAS = "1.16"
"""A version of TRL that has them all."""


def check_trainer(loss: str) -> None:
    """Raises InputError where the installed TRL lacks the trainer of a loss."""
    if loss not in EXPERIMENTAL:
        return
    module, found = EXPERIMENTAL[loss], find_spec("trl")
    there = found is not None and found.origin and Path(found.origin).with_name("experimental").joinpath(module)
    require(
        bool(there) and Path(str(there)).is_dir(), "stage.loss", loss,
        f"is trained by trl.experimental.{module}, which TRL {version('trl')} does not have",
        f"Install TRL {HAS} (pip install 'trl=={HAS}.*'), or use stage.loss=sigmoid.",
    )  # fmt: skip
