"""Thin wrappers of TRL's trainers, and a check that the installed TRL has the trainer of a loss. Imports neither TRL
nor torch."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from align.core.errors import require

EXPERIMENTAL = {"orpo": "orpo", "simpo": "cpo"}
"""Losses whose trainer is in `trl.experimental`, mapped to its module there. These modules change from version to
version."""
COMPLETE_VERSION = "1.16"
"""A version of TRL that has the trainers of all losses."""


def require_trl_trainer(loss: str) -> None:
    """Raise InputError if the installed TRL lacks the trainer of a preference loss."""
    if loss not in EXPERIMENTAL:
        return
    module = EXPERIMENTAL[loss]
    package = find_spec("trl")
    has_trainer = bool(package and package.origin and (Path(package.origin).parent / "experimental" / module).is_dir())
    problem = f"is trained by trl.experimental.{module}, which TRL {version('trl')} does not have"
    remedy = f"Install TRL {COMPLETE_VERSION} (pip install 'trl=={COMPLETE_VERSION}.*'), or use stage.loss=sigmoid."
    require(has_trainer, "stage.loss", loss, problem, remedy)
