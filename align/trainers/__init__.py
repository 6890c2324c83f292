"""TRL's trainers, wrapped thinly; and which losses the installed TRL has a trainer for. Imports neither TRL nor
torch."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from align.core.errors import require

EXPERIMENTAL = {"orpo": "orpo", "simpo": "cpo"}
"""Loss → the module of `trl.experimental` that has it. These modules come and go from one version to the next."""
COMPLETE_VERSION = "1.16"
"""A version of TRL that has them all."""


def check_trainer(loss: str) -> None:
    """Raise InputError if the installed TRL lacks the trainer of a loss."""
    if loss not in EXPERIMENTAL:
        return
    module = EXPERIMENTAL[loss]
    package = find_spec("trl")
    is_there = bool(package and package.origin and (Path(package.origin).parent / "experimental" / module).is_dir())
    problem = f"is trained by trl.experimental.{module}, which TRL {version('trl')} does not have"
    remedy = f"Install TRL {COMPLETE_VERSION} (pip install 'trl=={COMPLETE_VERSION}.*'), or use stage.loss=sigmoid."
    require(is_there, "stage.loss", loss, problem, remedy)
