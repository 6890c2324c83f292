"""Rule-based checks of answers, which tasks and rows describe under `check:`."""

from align.reward.checkers.build import IFEVAL, KINDS, check_turns, checker, checks_of, spec_of
from align.reward.checkers.checked import Accuracy, Checked, Checker, Part, accuracy

__all__ = [
    "IFEVAL",
    "KINDS",
    "Accuracy",
    "Checked",
    "Checker",
    "Part",
    "accuracy",
    "check_turns",
    "checker",
    "checks_of",
    "spec_of",
]
