"""What a data set's report shows: what became of every row of every source, examples of rows that were left out,
clusters of duplicates, steps that removed much, and rows to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from align.core.types import Record
from align.data.chat.shown import Render, part
from align.data.read.content import PARTS, content_of, texts
from align.data.sets.columns import CONTENT, named_records
from align.data.sets.contamination import Leaks
from align.data.sets.duplicates import Duplicates
from align.data.sets.gather import SKIPPED, UNDECIDED
from align.data.sets.mix import Funnel, Mixed
from align.data.sets.scores import examples
from align.data.sets.source import Source
from align.data.sets.spool import Rows
from align.run import Input
from align.run.files import write_text
from align.track import in_turns, line_of

Hide = Callable[[str], str]
"""Takes out of a text what nobody is to see."""
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
MUCH = 0.2
"""The share of a source from which on a step's removals are a loss."""
LOST = 3
"""Rows that are shown of each loss."""
Loss = dict[str, Any]
"""`source`, `step`, `removed` and `of` (rows of the source that came to the step), and `examples` (texts)."""


def account_of(
    sources: Sequence[Source],
    inputs: Mapping[str, Input],
    shapes: Sequence[Mapping[str, Any]],
    accounts: Sequence[Mapping[str, Any]],
    funnel: Funnel,
    test: ndarray,
    train: Mixed,
) -> dict[str, Any]:
    """Return what `data.json` says of the sources and the mixture.

    Args:
        shapes: of each source, see `align.data.sets.source.recognised`.
        accounts: of each source, see `align.data.sets.gather`.
        test: whether each row is measured on.
        train: how often each row stands there that is trained on.
    """
    listed = []
    for i, (source, account) in enumerate(zip(sources, accounts, strict=True)):
        of_it = funnel.source == i
        times = train.times[of_it]
        measured = int((funnel.kept & test & of_it).sum())
        listed.append(
            {
                "name": source.name,
                "given": source.given,
                "digest": inputs[f"sources.{source.name}"].digest,
                "read_as": dict(shapes[i]),
                **source.ids.as_json(),
                "licence": source.licence or ", ".join(account["licences"]) or None,
                "counts": {**account["counts"], **funnel.of(i)},
                "clean": [{key: step[key] for key in step if key != "examples"} for step in account["clean"]],
                # What was refused and why, without what stood there: a data set is handed on.
                "bad_rows": [
                    {key: cause[key] for key in ("field", "problem", "count")} for cause in account["bad_rows"]
                ],
                "metadata": account["metadata"],
                "weight": source.weight,
                "cap": source.cap,
                "asked": train.asked[i],
                "got": train.got[i],
                "splits": {
                    "train": {"rows": int(times.sum()), "distinct": int((times > 0).sum())},
                    "test": {"rows": measured, "distinct": measured},
                },
            }
        )
    return {"sources": listed, "limited_by": None if train.limit is None else sources[train.limit].name}


def found_in(names: Sequence[str], leaks: Leaks) -> list[dict[str, Any]]:
    """Return of each evaluation set how many rows were found, by rule."""
    rules = np.array(leaks.rules, object)
    return [{"set": name, "hits": dict(Counter(rules[leaks.sets == i]))} for i, name in enumerate(names)]


def found_of(duplicates: Duplicates, given_away: Leaks, leaks: Leaks) -> dict[str, int]:
    """Return how many rows were found, whether or not they were left out."""
    exact = int(duplicates.exact.sum())
    return {
        "exact_duplicates": exact,
        "near_duplicates": len(duplicates.dropped) - exact,
        "contaminated": len(given_away.rows),
        "shared_with_test": len(leaks.rows),
    }


def metrics_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headline figures."""
    splits = data["splits"]
    counts = sum((Counter(source["counts"]) for source in data["sources"]), Counter[str]())
    left_out = {key: counts[key] for key in counts if key in (SKIPPED, UNDECIDED)}
    if scores := data.get("scores"):
        each = scores["sources"].values()
        left_out["dropped_by_score"] = sum(of.get("dropped", 0) for of in each)
        left_out["unscored"] = sum(of["unscored"] for of in each)
    return {
        "train_rows": splits["train"]["rows"],
        "train_distinct": splits["train"]["distinct"],
        "test_rows": splits["test"]["rows"],
        "read": counts["read"],
        **left_out,
        "dropped_in_cleaning": counts["read"] - counts["kept"],
        **data["found"],
        "unanswered": counts["unanswered"],
        "root": data["root"],
        "ids_root": data["ids_root"],
    }


def find_read_losses(names: Sequence[str], accounts: Sequence[Mapping[str, Any]], hide: Hide) -> list[Loss]:
    """Return the losses of reading and cleaning.

    Args:
        accounts: of the sources, see `align.data.sets.gather`.
    """
    losses = list[Loss]()
    for name, account in zip(names, accounts, strict=True):
        counts = account["counts"]
        read = counts["read"] + counts[SKIPPED] + counts[UNDECIDED]
        causes = [hide(f"{cause['field']}={cause['value']}: {cause['problem']}") for cause in account["bad_rows"]]
        steps: list[tuple[str, int, int, list[str]]] = [
            ("refused", counts[SKIPPED], read, causes),
            ("undecided", counts[UNDECIDED], read, []),
        ]
        for step in account["clean"]:
            shown = [row_text(example["before"]) for example in step["examples"] if example["after"] is None]
            steps.append((f"clean: {step['step']}", step["dropped"], step["seen"], shown))
        losses += [
            {"source": name, "step": step, "removed": removed, "of": of, "examples": shown[:LOST]}
            for step, removed, of, shown in steps
            if removed > MUCH * of
        ]
    return losses


def find_funnel_losses(funnel: Funnel, step: str, rows: Rows, kind: str, hide: Hide) -> Iterator[Loss]:
    """Yield the losses of the step of the funnel that ended last."""
    for number, (of, left) in enumerate(zip(funnel.before, funnel.steps[step], strict=True)):
        if of - left > MUCH * of:
            removed = funnel.removed[funnel.source[funnel.removed] == number]
            shown = shown_rows(rows, kind, funnel.names, removed[:LOST].astype(np.int64), hide)
            yield {
                "source": funnel.names[number],
                "step": step,
                "removed": of - left,
                "of": of,
                "examples": [row["text"] for row in shown],
            }


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row of `align.data.read.content.content_of`, for somebody who looks: its turns with who speaks."""
    if "text" in row:
        return row["text"]
    turns = [turn for part in PARTS_OF_ROWS for turn in row.get(part, ())]
    tools = [tool["function"]["name"] for tool in row.get("tools", ())]
    return "\n".join([*([f"tools: {', '.join(tools)}"] if tools else []), in_turns(turns)])


def shown_text(record: Record, hide: Hide) -> str:
    text = hide(row_text(content_of(record)))
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def shown_rows(rows: Rows, kind: str, names: Sequence[str], numbers: ndarray, hide: Hide) -> list[dict[str, Any]]:
    """Return some rows: where each is from, and what it says."""
    found = read_rows(rows, kind, names, numbers)
    return [{"row": id, "text": shown_text(record, hide)} for id, record in found]


def read_rows(rows: Rows, kind: str, names: Sequence[str], numbers: ndarray) -> list[tuple[str, Record]]:
    if not len(numbers):
        return []
    return named_records(kind, rows.take(numbers, [*CONTENT[kind], "source", "row"]), names)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(map(line_of, lines)))


def write_duplicates(
    folder: Path, rows: Rows, kind: str, names: Sequence[str], found: Duplicates, heads: ndarray, hide: Hide
) -> None:
    """Write `duplicates.jsonl`: the largest clusters, one a line.

    Args:
        heads: see `align.data.sets.duplicates.clusters`.
    """
    lines = []
    for head, size in sorted(Counter(heads.tolist()).items(), key=lambda entry: (-entry[1], entry[0]))[:CLUSTERS]:
        members = np.flatnonzero(heads == head)[:MEMBERS]
        kept, *others = shown_rows(rows, kind, names, np.append(head, found.dropped[members]), hide)
        alike = [{**row, "jaccard": float(found.jaccard[i])} for row, i in zip(others, members, strict=True)]
        lines.append({"size": size + 1, "kept": kept, "others": alike})
    write_lines(folder / DUPLICATES, lines)


def cleaned_away(names: Sequence[str], accounts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each source and step the first records that it dropped, changed or noted, as lines of `dropped.jsonl`.

    Args:
        accounts: of the sources, see `align.data.sets.gather`.
    """
    return [
        {
            "source": name,
            "step": step["step"],
            "reason": example["reason"] or "changed",
            "detail": example["detail"],
            "text": row_text(example["before"]),
            "after": row_text(example["after"]) if example["after"] not in (None, example["before"]) else None,
        }
        for name, account in zip(names, accounts, strict=True)
        for step in account["clean"]
        for example in step["examples"][:EXAMPLES]
    ]


def leaked(
    rows: Rows, kind: str, names: Sequence[str], leaks: Leaks, sets: Sequence[str], hide: Hide
) -> list[dict[str, Any]]:
    """Return of each evaluation set the first rows that give it away, as lines of `dropped.jsonl`."""
    lines = []
    for number, name in enumerate(sets):
        places = np.flatnonzero(leaks.sets == number)[:LEAKED]
        for place, row in zip(places, shown_rows(rows, kind, names, leaks.rows[places], hide), strict=True):
            reason = f"{leaks.rules[place]}, row {int(leaks.where[place]) + 1} of {name}"
            lines.append({"source": row["row"].rpartition(":")[0], "step": "contamination", "reason": reason, **row})
    return lines


def write_dropped(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write `dropped.jsonl`: examples of what was left out, and why."""
    write_lines(folder / DROPPED, lines)


def write_rows(
    folder: Path,
    rows: Rows,
    kind: str,
    names: Sequence[str],
    source: ndarray,
    wanted: ndarray,
    render: Render,
    hide: Hide,
) -> None:
    """Write `rows.jsonl`: the first rows of each source that are trained on, as training reads them.

    Args:
        source: the number of each row's source.
        wanted: which rows are trained on, bool (N).
        render: see `align.data.chat.shown`.
    """
    numbers = np.concatenate([np.flatnonzero(wanted & (source == number))[:SHOWN] for number in range(len(names))])
    found = read_rows(rows, kind, names, numbers)
    lines = [{"row": id, **line} for id, record in found for line in as_trained(record, render, hide)]
    write_lines(folder / ROWS, lines)


def as_trained(record: Record, render: Render, hide: Hide) -> list[dict[str, Any]]:
    """Return the lines of one record, what nobody is to see taken out of each part."""
    if sum(map(len, texts(record))) > LONG:
        refused = "it is too long to be shown whole"
        return [{"what": "", "parts": [part(shown_text(record, hide))], "refused": refused}]
    return [
        {**line, "parts": [{**each, "text": hide(each["text"])} for each in line["parts"]]} for line in render(record)
    ]


def write_scores(
    folder: Path,
    rows: Rows,
    kind: str,
    names: Sequence[str],
    source: ndarray,
    scores: ndarray,
    out: ndarray,
    hide: Hide,
) -> None:
    """Write `scores.jsonl`: rows of each source at the ends of their scores and around the cuts.

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
    write_lines(folder / SCORES, lines)


def lengths(characters: ndarray, source: ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return how many rows of each source have how many characters: counts between `edges`, which double; and how many
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
