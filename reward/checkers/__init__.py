"""Rule-based checks of answers, which tasks and rows describe under `check:`."""

from align.reward.checkers.build import (
    IFEVAL,
    KINDS,
    build_checker,
    build_checkers,
    check_answers_of_turns,
    get_check_spec,
)
from align.reward.checkers.checked import Accuracy, Checker, CheckResult, Part, compute_accuracy

__all__ = [
    "IFEVAL",
    "KINDS",
    "Accuracy",
    "CheckResult",
    "Checker",
    "Part",
    "build_checker",
    "build_checkers",
    "check_answers_of_turns",
    "compute_accuracy",
    "get_check_spec",
]
