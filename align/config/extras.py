"""The optional dependency groups (extras) of the package that stages need beyond the default installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.core.distribution import require_extra


@dataclass(frozen=True, slots=True)
class ExtraNeed:
    """An optional dependency group (extra) that a stage needs, and the condition under which it does.

    Attributes:
        stage: the stage's name.
        extra: the extra, as pyproject.toml names it.
        action: the `stage.action` that needs it; None if every action does.
        unless: the key of the stage that, when set, makes the extra unnecessary.
    """

    stage: str
    extra: str
    action: str | None = None
    unless: str | None = None

    def applies_to(self, settings: Any) -> bool:
        """Return whether a stage with these settings needs this optional dependency group."""
        if settings.name != self.stage:
            return False
        if self.action is not None and settings.action != self.action:
            return False
        return self.unless is None or getattr(settings, self.unless) is None


EXTRA_NEEDS = (
    ExtraNeed("data", "data"),
    ExtraNeed("annotate", "annotate"),
    ExtraNeed("sample", "annotate", unless="best_of"),  # its answers go into the annotation store
    ExtraNeed("serve", "serve"),
    ExtraNeed("registry", "annotate", action="serve"),  # its page needs FastAPI and matplotlib
)
"""The optional dependency groups that stages need, checked before a run.

Other choices call `require_extra` where their settings are read: `track`, `export.sign`, tasks of lm-eval,
`data=chitchat`, checks of the kind `json_schema`. Reports are written without pictures if `[plots]` is missing.
"""


def require_stage_extras(settings: Any) -> None:
    """Raise InputError if a stage needs an optional dependency group that is not installed.

    Args:
        settings: the stage's own settings.

    Raises:
        InputError: names the missing modules and the command that installs them.
    """
    for need in EXTRA_NEEDS:
        if need.applies_to(settings):
            field, value = ("stage", need.stage) if need.action is None else ("stage.action", need.action)
            require_extra(need.extra, field, value)
