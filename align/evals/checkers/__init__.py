"""Checks of answers by rules: what a task or a row asks for under `check:`, and whether an answer has it."""

from align.evals.checkers.build import KINDS, check_turns, checker, checks_of
from align.evals.checkers.checked import Accuracy, Checked, Checker, Part, accuracy

__all__ = ["KINDS", "Accuracy", "Checked", "Checker", "Part", "accuracy", "check_turns", "checker", "checks_of"]
