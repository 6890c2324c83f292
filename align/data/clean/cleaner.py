"""Running of cleaning steps over records, with counts and examples of what each step did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from align.core.types import Record
from align.data.clean.outcome import Drop, NotedRecord, Step
from align.data.clean.pii import PersonalDataFilter
from align.data.read.content import to_content_row

EXAMPLE_WIDTH = 600
"""Maximum characters of a text in an example, around its first change."""
EXAMPLE_TURNS = 12
"""Maximum turns of a conversation in an example, beginning two turns before the first change."""


@dataclass
class StepCounts:
    """Counts of the records that one cleaning step saw, changed and dropped, with reasons and examples. `vars` of it
    can be written as JSON.

    Attributes:
        seen: number of records that reached the step.
        changed, dropped: number of these records that the step changed or dropped.
        reasons: reason → number of dropped records.
        notes: note → number of kept records, such as languages and kinds of personal data.
        examples: the first records that the step dropped, changed or noted, by their position `at`. `reason` says why a
            record was dropped, or what was noted; it is empty for a changed record. `detail` is the finding in this
            record. `before` and `after` are its row with long texts shortened, `after` of a dropped record is `None`.
    """

    step: str
    seen: int = 0
    changed: int = 0
    dropped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


class Cleaner:
    """A list of cleaning steps that are run in order, with counts of what they do.

    If a step looks for personal data, all kinds of personal data are masked in the examples of every step.

    Args:
        steps: see `align.data.clean.steps.create_steps`.
        examples: maximum number of examples of each step.
    """

    def __init__(self, steps: Sequence[tuple[str, Step]], examples: int = 10) -> None:
        self.steps = list(steps)
        self.examples = examples
        self.counts = [StepCounts(name) for name, _ in self.steps]
        self._maskers = [
            PersonalDataFilter(regions=step.regions) for _, step in self.steps if isinstance(step, PersonalDataFilter)
        ]

    def clean(self, record: Record, position: int) -> Record | Drop:
        """Run all cleaning steps on a record, and return the record after them, or a Drop from the first step that
        leaves it out. The counts and examples of the steps are updated.

        Args:
            position: its row number in the source. The first records by position become examples, so that they are the
                same however the records are divided among workers.

        Raises:
            InputError: a function of the user fails.
        """
        for (_, step), counts in zip(self.steps, self.counts, strict=True):
            counts.seen += 1
            outcome = step(record)
            if outcome is record:
                continue
            if isinstance(outcome, Drop):
                counts.dropped += 1
                counts.reasons[outcome.reason] += 1
                self._add_example(counts, position, outcome.reason, outcome.detail, record, None)
                return outcome
            notes: tuple[str, ...] = ()
            if isinstance(outcome, NotedRecord):
                notes = outcome.notes
                outcome = outcome.record
            counts.notes.update(notes)
            if outcome is not record:
                counts.changed += 1
                self._add_example(counts, position, "", "", record, outcome)
            elif isinstance(step, PersonalDataFilter):  # languages are noted for every record, and need no examples
                self._add_example(counts, position, ", ".join(notes), "", record, record)
            record = outcome
        return record

    def merge(self, others: Sequence[Mapping[str, Any]]) -> None:
        """Add the counts and examples of another cleaner with the same steps to this cleaner's. The order of merging
        makes no difference.

        Args:
            others: the `vars` of its counts.
        """
        for counts, other in zip(self.counts, others, strict=True):
            counts.seen += other["seen"]
            counts.changed += other["changed"]
            counts.dropped += other["dropped"]
            counts.reasons.update(other["reasons"])
            counts.notes.update(other["notes"])
            self._set_examples(counts, [*counts.examples, *other["examples"]])

    def _set_examples(self, counts: StepCounts, examples: Sequence[dict[str, Any]]) -> None:
        counts.examples = sorted(examples, key=lambda example: example["at"])[: self.examples]

    def _add_example(
        self, counts: StepCounts, position: int, reason: str, detail: str, before: Record, after: Record | None
    ) -> None:
        examples = counts.examples
        if len(examples) >= self.examples and (not examples or position >= examples[-1]["at"]):
            return
        row_before, row_after = self._shorten_rows(
            to_content_row(before), None if after is None else to_content_row(after)
        )
        example = {"at": position, "reason": reason, "detail": detail, "before": row_before, "after": row_after}
        self._set_examples(counts, [*examples, example])

    def _shorten_rows(self, before: Any, after: Any) -> tuple[Any, Any]:
        """Return the row before and after a step as an example shows it, with personal data masked and long texts
        shortened.

        Personal data is masked, texts are shortened around their first change, and conversations to the turns around
        it.

        Args:
            after: None if the row was dropped.
        """
        if isinstance(before, str):
            masked = self.mask_personal_data(before)
            position = find_first_change(before, after if isinstance(after, str) and after != before else masked)
            shortened_after = None
            if isinstance(after, str):
                shortened_after = shorten_around(self.mask_personal_data(after), position)
            return shorten_around(masked, position), shortened_after
        if isinstance(before, dict):
            after_values = after if isinstance(after, dict) else {}
            before_fields = {}
            after_fields = {}
            for name, value in before.items():
                masked_name = self.mask_personal_data(name)  # a name of an argument may have been masked
                after_value = after_values.get(name, after_values.get(masked_name))
                before_fields[masked_name], after_fields[masked_name] = self._shorten_rows(value, after_value)
            return before_fields, after_fields if after else None
        if isinstance(before, list):
            return self._shorten_turns(before, after if isinstance(after, list) else None)
        return before, after

    def _shorten_turns(self, before: list[Any], after: list[Any] | None) -> tuple[list[Any], list[Any] | None]:
        compared = after if after and after != before else [self._shorten_rows(turn, None)[0] for turn in before]
        pairs = zip(before, compared, strict=False)
        first_change = next((i for i, (old, new) in enumerate(pairs) if old != new), 0)
        start = max(0, first_change - 2)
        window = slice(start, start + EXAMPLE_TURNS)
        before_turns = []
        after_turns = []
        for old, new in zip_longest(before[window], (after or [])[window]):
            if old is not None:
                before_turns.append(self._shorten_rows(old, new)[0])
            if new is not None:  # a function of the user may add turns
                after_turns.append(self._shorten_rows(new, None)[0] if old is None else self._shorten_rows(old, new)[1])
        return before_turns, after_turns if after else None

    @property
    def masks_personal_data(self) -> bool:
        """True if a cleaning step looks for personal data, so that examples are masked."""
        return bool(self._maskers)

    def mask_personal_data(self, text: str) -> str:
        """Replace the personal data in a text that is shown to people, if this cleaner has a step that finds personal
        data."""
        for pii in self._maskers:
            text = pii.mask_personal_data(text)
        return text


def find_first_change(text: str, other: str) -> int:
    """Return the position at which two texts first differ, or 0 if they are equal."""
    if text == other:
        return 0
    low = 0
    high = min(len(text), len(other))
    while low < high:  # binary search, since a text may have a hundred million characters
        middle = (low + high + 1) // 2
        if text[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shorten_around(text: str, position: int) -> str:
    """Shorten a text to EXAMPLE_WIDTH characters around a position, with ellipses where it is cut."""
    if len(text) <= EXAMPLE_WIDTH:
        return text
    start = max(0, min(position - EXAMPLE_WIDTH // 2, len(text) - EXAMPLE_WIDTH))
    end = start + EXAMPLE_WIDTH
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
