"""What a data set's report shows beside its figures: rows that were left out, clusters of duplicates, and rows to train
on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.data.read.content import PARTS, content_of, texts
from align.data.rendered import Render, part
from align.data.sets.columns import CONTENT, named_records
from align.data.sets.contamination import Leaks
from align.data.sets.duplicates import Duplicates
from align.data.sets.scores import examples
from align.data.sets.spool import Rows
from align.run.files import write_text
from align.track import in_turns, line_of
from align.types import Record

Hide = Callable[[str], str]
PARTS_OF_ROWS = [*dict.fromkeys(part for parts in PARTS.values() for part in parts)]
DROPPED, DUPLICATES, ROWS, SCORES = "dropped.jsonl", "duplicates.jsonl", "rows.jsonl", "scores.jsonl"
SHOWN = 3
"""Rows of each source that are shown."""
CLUSTERS, MEMBERS, LEAKED = 8, 3, 3
"""Clusters that are shown, the duplicates shown of each, and the rows shown of each evaluation set."""
SCORED = 3
"""Rows that are shown at each end and each cut of a source's scores."""
EXAMPLES = 4
"""Of each source and step."""
MOST = 400
"""Characters of a record that are shown."""
LONG = 20_000
"""Characters of a record from which on it is not rendered, and cut like that: a template is asked for all of it."""


def as_text(record: Record) -> str:
    """A record for somebody who looks: its turns with who speaks."""
    return row_text(content_of(record))


def cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def shown_rows(rows: Rows, kind: str, names: Sequence[str], numbers: np.ndarray, hide: Hide) -> list[dict[str, Any]]:
    """Some rows: where each is from, and what it says.

    Args:
        hide: takes out of a text what nobody is to see.
    """
    if not len(numbers):
        return []
    table = rows.take(numbers, [*CONTENT[kind], "source", "row"])
    return [{"row": id, "text": cut(hide(as_text(record)))} for id, record in named_records(kind, table, names)]


def write_duplicates(
    folder: Path, rows: Rows, kind: str, names: Sequence[str], found: Duplicates, heads: np.ndarray, hide: Hide
) -> None:
    """`duplicates.jsonl`: the largest clusters, one a line.

    Args:
        heads: see `align.data.sets.duplicates.clusters`.
    """
    lines = []
    for head, size in sorted(Counter(heads.tolist()).items(), key=lambda one: (-one[1], one[0]))[:CLUSTERS]:
        members = np.flatnonzero(heads == head)[:MEMBERS]
        kept, *others = shown_rows(rows, kind, names, np.concatenate([[head], found.dropped[members]]), hide)
        alike = [{**row, "jaccard": float(found.jaccard[i])} for row, i in zip(others, members, strict=True)]
        lines.append({"size": size + 1, "kept": kept, "others": alike})
    write_text(folder / DUPLICATES, "".join(map(line_of, lines)))


def cleaned_away(names: Sequence[str], accounts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each source and step the first records that it dropped, changed or noted, as lines of `dropped.jsonl`.

    Args:
        accounts: of the sources, see `align.data.sets.gather`.
    """
    return [
        {
            "source": name, "step": step["step"], "reason": example["reason"] or "changed", "detail": example["detail"],
            "text": row_text(example["before"]),
            "after": row_text(example["after"]) if example["after"] not in (None, example["before"]) else None,
        }
        for name, account in zip(names, accounts, strict=True)
        for step in account["clean"]
        for example in step["examples"][:EXAMPLES]
    ]  # fmt: skip


def row_text(row: Mapping[str, Any]) -> str:
    """A row of `align.data.read.content.content_of`, for somebody who looks."""
    if "text" in row:
        return row["text"]
    turns = [turn for part in PARTS_OF_ROWS for turn in row.get(part, ())]
    tools = [tool["function"]["name"] for tool in row.get("tools", ())]
    return "\n".join([*([f"tools: {', '.join(tools)}"] if tools else []), in_turns(turns)])


def leaked(
    rows: Rows, kind: str, names: Sequence[str], leaks: Leaks, sets: Sequence[str], hide: Hide
) -> list[dict[str, Any]]:
    """Of each evaluation set the first rows that give it away, as lines of `dropped.jsonl`."""
    found = []
    for number, name in enumerate(sets):
        places = np.flatnonzero(leaks.sets == number)[:LEAKED]
        for place, row in zip(places, shown_rows(rows, kind, names, leaks.rows[places], hide), strict=True):
            reason = f"{leaks.rules[place]}, row {int(leaks.where[place]) + 1} of {name}"
            found.append({"source": row["row"].rpartition(":")[0], "step": "contamination", "reason": reason, **row})
    return found


def write_dropped(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """`dropped.jsonl`: examples of what was left out, and why."""
    write_text(folder / DROPPED, "".join(map(line_of, lines)))


def write_rows(
    folder: Path, rows: Rows, kind: str, names: Sequence[str], source: np.ndarray, wanted: np.ndarray, render: Render,
    hide: Hide,
) -> None:  # fmt: skip
    """`rows.jsonl`: the first rows of each source that are trained on, as training reads them.

    Args:
        source: the number of each row's source.
        wanted: which rows are trained on, bool (N).
        render: see `align.data.rendered`.
    """
    numbers = np.concatenate([np.flatnonzero(wanted & (source == number))[:SHOWN] for number in range(len(names))])
    lines = list[dict[str, Any]]()
    if len(numbers):
        table = rows.take(numbers, [*CONTENT[kind], "source", "row"])
        for id, record in named_records(kind, table, names):
            lines += [{"row": id, **line} for line in as_trained(record, render, hide)]
    write_text(folder / ROWS, "".join(map(line_of, lines)))


def as_trained(record: Record, render: Render, hide: Hide) -> list[dict[str, Any]]:
    """The lines of one record, what nobody is to see taken out of each part."""
    if sum(map(len, texts(record))) > LONG:
        return [
            {"what": "", "parts": [part(cut(hide(as_text(record))))], "refused": "it is too long to be shown whole"}
        ]
    return [
        {**line, "parts": [{**each, "text": hide(each["text"])} for each in line["parts"]]} for line in render(record)
    ]


def write_scores(
    folder: Path, rows: Rows, kind: str, names: Sequence[str], source: np.ndarray, scores: np.ndarray,
    out: np.ndarray, hide: Hide,
) -> None:  # fmt: skip
    """`scores.jsonl`: rows of each source at the ends of their scores and around the cuts.

    Args:
        scores, out: see `align.data.sets.scores.outside`.
    """
    lines = []
    for number, name in enumerate(names):
        mine = np.flatnonzero(source == number)
        for what, places in examples(scores[mine], out[mine], SCORED):
            found = shown_rows(rows, kind, names, mine[places], hide)
            lines += [
                {"source": name, "what": what, "score": float(scores[place]), "dropped": bool(out[place]), **row}
                for place, row in zip(mine[places], found, strict=True)
            ]
    write_text(folder / SCORES, "".join(map(line_of, lines)))


def lengths(characters: np.ndarray, source: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How many rows of each source have how many characters: counts between `edges`, which double; and how many
    characters all of them have.

    Args:
        characters, source: of each row that is in.
    """
    highest = int(characters.max(initial=1))
    edges = [0, *(2**i for i in range(5, max(6, highest.bit_length() + 1)))]
    counts = {name: np.histogram(characters[source == number], edges)[0].tolist() for number, name in enumerate(names)}
    totals = np.bincount(source, characters, len(names)).astype(np.int64).tolist()
    return {
        "unit": "characters",
        "edges": edges,
        "counts": counts,
        "characters": dict(zip(names, totals, strict=True)),
    }
