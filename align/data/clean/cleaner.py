"""Steps run over records, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from align.core.types import Record
from align.data.clean.outcome import Drop, Noted, Step
from align.data.clean.pii import Pii
from align.data.read.content import to_content_row

WIDTH = 600
"""Characters of a text that an example shows, around the first that changes."""
TURNS = 12
"""Turns of a conversation that an example shows, from two before the first that changes."""


@dataclass
class StepCounts:
    """What one step did. `vars` of it is JSON.

    Attributes:
        seen: records that came to it; those that no earlier step dropped.
        changed, dropped: of these.
        reasons: why they were dropped.
        notes: what was counted of those that were kept: languages, kinds of personal data.
        examples: the first records in order of `at`, their place, that the step dropped, changed or noted: the `reason`
            why it was dropped, or what was noted, empty if it was changed; in `detail` what was found in this very
            record; and its row `before` and `after`, long texts cut, `after` being None if it was dropped.
    """

    step: str
    seen: int = 0
    changed: int = 0
    dropped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


class Cleaner:
    """Runs steps in their order.

    If a step looks for personal data, the examples of every step are shown without any, of whichever kind.

    Args:
        steps: see `align.data.clean.steps.steps_of`.
        examples: kept of each step.
    """

    def __init__(self, steps: Sequence[tuple[str, Step]], examples: int = 10) -> None:
        self.steps = list(steps)
        self.examples = examples
        self.counts = [StepCounts(name) for name, _ in self.steps]
        self._hiders = [Pii(regions=step.regions) for _, step in self.steps if isinstance(step, Pii)]

    def clean(self, record: Record, at: int) -> Record | Drop:
        """Return the record behind all steps, or why it is left out.

        Args:
            at: its place in the whole. Examples are the first by place, so that they do not depend on who cleaned what.

        Raises:
            InputError: a function of the user's fails.
        """
        for (_, step), counts in zip(self.steps, self.counts, strict=True):
            counts.seen += 1
            outcome = step(record)
            if outcome is record:
                continue
            if isinstance(outcome, Drop):
                counts.dropped += 1
                counts.reasons[outcome.reason] += 1
                self._keep(counts, at, outcome.reason, outcome.detail, record, None)
                return outcome
            kept, notes = (outcome.record, outcome.notes) if isinstance(outcome, Noted) else (outcome, ())
            counts.notes.update(notes)
            if kept is not record:
                counts.changed += 1
                self._keep(counts, at, "", "", record, kept)
            elif isinstance(step, Pii):  # a language of each record is no finding
                self._keep(counts, at, ", ".join(notes), "", record, record)
            record = kept
        return record

    def merge(self, others: Sequence[Mapping[str, Any]]) -> None:
        """Add what a cleaner with the same steps counted, in any order: the `vars` of its counts."""
        for counts, other in zip(self.counts, others, strict=True):
            counts.seen += other["seen"]
            counts.changed += other["changed"]
            counts.dropped += other["dropped"]
            counts.reasons.update(other["reasons"])
            counts.notes.update(other["notes"])
            self._set_examples(counts, [*counts.examples, *other["examples"]])

    def _set_examples(self, counts: StepCounts, examples: Sequence[dict[str, Any]]) -> None:
        counts.examples = sorted(examples, key=lambda example: example["at"])[: self.examples]

    def _keep(
        self, counts: StepCounts, at: int, reason: str, detail: str, before: Record, after: Record | None
    ) -> None:
        kept = counts.examples
        if len(kept) >= self.examples and (not kept or at >= kept[-1]["at"]):
            return
        shown = self._shown(to_content_row(before), None if after is None else to_content_row(after))
        example = {"at": at, "reason": reason, "detail": detail, "before": shown[0], "after": shown[1]}
        self._set_examples(counts, [*kept, example])

    def _shown(self, before: Any, after: Any) -> tuple[Any, Any]:
        """Return two rows, or parts of them, as an example shows them: personal data hidden, each text cut around its
        first change, and conversations to the turns around theirs."""
        if isinstance(before, str):
            hidden = self.hidden(before)
            at = difference(before, after if isinstance(after, str) and after != before else hidden)
            return excerpt(hidden, at), excerpt(self.hidden(after), at) if isinstance(after, str) else None
        if isinstance(before, dict):
            others = after if isinstance(after, dict) else {}
            named = {name: self.hidden(name) for name in before}  # of arguments
            pairs = {name: self._shown(of, others.get(name, others.get(named[name]))) for name, of in before.items()}
            shown = [{named[name]: pair[i] for name, pair in pairs.items()} for i in (0, 1)]
            return shown[0], shown[1] if after else None
        if isinstance(before, list):
            return self._turns_shown(before, after if isinstance(after, list) else None)
        return before, after

    def _turns_shown(self, before: list[Any], after: list[Any] | None) -> tuple[list[Any], list[Any] | None]:
        others = after if after and after != before else [self._shown(turn, None)[0] for turn in before]
        first = next((i for i, (one, other) in enumerate(zip(before, others, strict=False)) if one != other), 0)
        place = slice(max(0, first - 2), max(0, first - 2) + TURNS)
        kept = []
        changed = []
        for one, other in zip_longest(before[place], (after or [])[place]):
            if one is not None:
                kept.append(self._shown(one, other)[0])
            if other is not None:  # a function of the user's may add turns
                changed.append(self._shown(other, None)[0] if one is None else self._shown(one, other)[1])
        return kept, changed if after else None

    @property
    def hides(self) -> bool:
        """Return whether a step looks for personal data."""
        return bool(self._hiders)

    def hidden(self, text: str) -> str:
        """Return a text as people may see it: without personal data, if a step looks for any."""
        for pii in self._hiders:
            text = pii.hidden(text)
        return text


def difference(text: str, other: str) -> int:
    """Return where two texts first differ; 0 if they do not."""
    if text == other:
        return 0
    low = 0
    high = min(len(text), len(other))
    while low < high:  # halves, for a text may have a hundred million characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low


def excerpt(text: str, at: int) -> str:
    """Return so much of a text as an example shows, around the character `at`."""
    if len(text) <= WIDTH:
        return text
    begin = max(0, min(at - WIDTH // 2, len(text) - WIDTH))
    return ("…" if begin else "") + text[begin : begin + WIDTH] + ("…" if begin + WIDTH < len(text) else "")
