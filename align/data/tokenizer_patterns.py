"""Patterns of a tokenizer: regular expressions of the model's, which divide text before it is encoded.

Its library matches by backtracking, and holds the process while it does: on thirty letters a pattern such as `(a+)+b`
takes seconds a letter, or makes the library panic. Tokenizers without a pattern of their own, as most are, cost nothing
here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.probe_pattern import GAVE_UP
from align.errors import require

PATIENCE_S = 20
"""That the texts may take: a pattern that is sound needs milliseconds."""
LENGTH = 300
"""Characters of a run: a pattern that tries every way to divide it has 2^300."""
RUNS = ("a", "A", "1", " ", "\n", "_", ".", "-", "\u00e9", "\u4e2d", "\u0e01", "a ", "a1", "aA", " \n", "a.", "ab")
"""What runs are made of: a character of each class that patterns name, and pairs of them."""
ENDINGS = ("", "!", "\u2603", "\x00", "a", "1", " ", "!1", "!a", "! ")
"""What ends a run, so that a pattern has to try again. There are more, of `!` and each character of the pattern: the
library does not look at a text that lacks one which every match needs."""


def check_patterns(tokenizer: Any) -> None:
    """Let the patterns of a tokenizer divide texts that send a careless one back and forth.

    Raises:
        InputError: they do not end in time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    steps = {name: step_of(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer")}
    patterns = [pattern for step in steps.values() for pattern in patterns_in(step)]
    if not patterns:
        return
    characters = sorted({character for pattern in patterns for character in pattern})[:64]
    letters = [character for character in characters if character.isalnum()]
    endings = [*ENDINGS, *(f"!{character}" for character in characters if not character.isalnum())]
    texts = [run * LENGTH + ending for run in (*RUNS, *letters) for ending in endings]
    words = [sys.executable, "-P", str(Path(__file__).with_name("probe_pattern.py"))]
    asked = json.dumps({**steps, "texts": texts})
    try:
        ran = subprocess.run(words, input=asked, text=True, capture_output=True, timeout=PATIENCE_S, check=False)
        ended = ran.returncode != GAVE_UP
    except subprocess.TimeoutExpired:
        ended = False
    steps_with_patterns = " or ".join(name for name, step in steps.items() if any(patterns_in(step)))
    problem = f"a pattern in its {steps_with_patterns} does not end on short texts"
    remedy = "Take another model, or correct the pattern: it may not repeat what repeats, such as (a+)+."
    require(ended, "tokenizer.json", shortened(patterns), problem, remedy)


def shortened(patterns: list[str]) -> str:
    return " and ".join(pattern if len(pattern) <= 80 else f"{pattern[:79]}…" for pattern in patterns[:3])


def step_of(step: Any) -> Any:
    """Return a step of a tokenizer as JSON; None if there is none."""
    return None if step is None else json.loads(step.__getstate__())


def patterns_in(step: Any) -> Iterator[str]:
    """Yield the regular expressions of a step, and of the steps in it."""
    if isinstance(step, dict):
        if isinstance(step.get("Regex"), str):
            yield step["Regex"]
        for inner in step.values():
            yield from patterns_in(inner)
    elif isinstance(step, list):
        for inner in step:
            yield from patterns_in(inner)
