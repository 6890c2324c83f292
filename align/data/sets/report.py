"""What a data set's report shows: what became of every row of every source, examples of rows that were left out,
clusters of duplicates, steps that removed much, and rows to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from align.core.types import Record
from align.data.chat.training_view import Render, part
from align.data.dedup.evaluation_overlap import RULES, Matches
from align.data.dedup.near_duplicates import Duplicates
from align.data.read.content import MESSAGE_ATTRIBUTES, list_texts, to_content_row
from align.data.sets.gather import SKIPPED, UNDECIDED
from align.data.sets.mix import Funnel, Mixed
from align.data.sets.score_cuts import examples
from align.data.sets.source import Source
from align.data.sets.spool import Rows
from align.run import Input
from align.run.files import write_text
from align.track import format_conversation, format_row

Hide = Callable[[str], str]
"""Takes out of a text what nobody is to see."""
PARTS_OF_ROWS = [*dict.fromkeys(part for parts in MESSAGE_ATTRIBUTES.values() for part in parts)]
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


def found_in(names: Sequence[str], leaks: Matches) -> list[dict[str, Any]]:
    """Return of each evaluation set how many rows were found, by rule."""
    rules = np.array(RULES, object)[leaks.rule]
    return [{"set": name, "hits": dict(Counter(rules[leaks.evaluation == i]))} for i, name in enumerate(names)]


def found_of(duplicates: Duplicates, given_away: Matches, leaks: Matches) -> dict[str, int]:
    """Return how many rows were found, whether or not they were left out."""
    exact = int(duplicates.exact.sum())
    return {
        "exact_duplicates": exact,
        "near_duplicates": len(duplicates.dropped) - exact,
        "contaminated": len(given_away.text),
        "shared_with_test": len(leaks.text),
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


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row of `align.data.read.content.to_content_row`, for somebody who looks: its turns with who speaks."""
    if "text" in row:
        return row["text"]
    turns = [turn for part in PARTS_OF_ROWS for turn in row.get(part, ())]
    tools = [tool["function"]["name"] for tool in row.get("tools", ())]
    return "\n".join([*([f"tools: {', '.join(tools)}"] if tools else []), format_conversation(turns)])


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


class Examples:
    """Rows of a data set that its report shows, written as JSON Lines beside the artifact.

    Args:
        folder: of the run.
        source: the number of each row's source, int (N).
    """

    def __init__(self, folder: Path, rows: Rows, source: ndarray, hide: Hide) -> None:
        self.folder = folder
        self.rows = rows
        self.source = source
        self.hide = hide

    def text(self, record: Record) -> str:
        text = self.hide(row_text(to_content_row(record)))
        return text if len(text) <= MOST else f"{text[: MOST - 1]}…"

    def show(self, numbers: ndarray) -> list[dict[str, Any]]:
        """Return some rows: where each is from, and what it says."""
        return [{"row": id, "text": self.text(record)} for id, record in self.rows.records(numbers)]

    def find_losses(self, funnel: Funnel, step: str) -> Iterator[Loss]:
        """Yield the losses of the step of the funnel that ended last."""
        for number, (of, left) in enumerate(zip(funnel.before, funnel.steps[step], strict=True)):
            if of - left > MUCH * of:
                removed = funnel.removed[self.source[funnel.removed] == number]
                shown = [row["text"] for row in self.show(removed[:LOST])]
                yield {"source": funnel.names[number], "step": step, "removed": of - left, "of": of, "examples": shown}

    def leaked(self, leaks: Matches, sets: Sequence[str]) -> list[dict[str, Any]]:
        """Return of each evaluation set the first rows that give it away, as lines of `dropped.jsonl`."""
        lines = []
        for number, name in enumerate(sets):
            places = np.flatnonzero(leaks.evaluation == number)[:LEAKED]
            for place, row in zip(places, self.show(leaks.text[places]), strict=True):
                reason = f"{RULES[leaks.rule[place]]}, row {leaks.row[place] + 1} of {name}"
                source = row["row"].rpartition(":")[0]
                lines.append({"source": source, "step": "contamination", "reason": reason, **row})
        return lines

    def write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.folder / name, "".join(map(format_row, lines)))

    def write_duplicates(self, found: Duplicates, heads: ndarray) -> None:
        """Write `duplicates.jsonl`: the largest clusters, one a line.

        Args:
            heads: see `align.data.sets.duplicates.clusters`.
        """
        lines = []
        for head, size in sorted(Counter(heads.tolist()).items(), key=lambda entry: (-entry[1], entry[0]))[:CLUSTERS]:
            members = np.flatnonzero(heads == head)[:MEMBERS]
            kept, *others = self.show(np.append(head, found.dropped[members]))
            alike = [{**row, "jaccard": float(found.jaccard[i])} for row, i in zip(others, members, strict=True)]
            lines.append({"size": size + 1, "kept": kept, "others": alike})
        self.write(DUPLICATES, lines)

    def write_rows(self, wanted: ndarray, render: Render) -> None:
        """Write `rows.jsonl`: the first rows of each source that are trained on (bool (N)), as training reads them."""
        sources = range(len(self.rows.names))
        numbers = [np.flatnonzero(wanted & (self.source == number))[:SHOWN] for number in sources]
        found = self.rows.records(np.concatenate(numbers))
        self.write(ROWS, [{"row": id, **line} for id, record in found for line in self.as_trained(record, render)])

    def as_trained(self, record: Record, render: Render) -> list[dict[str, Any]]:
        """Return the lines of one record, what nobody is to see taken out of each part."""
        if sum(map(len, list_texts(record))) > LONG:
            refused = "it is too long to be shown whole"
            return [{"what": "", "parts": [part(self.text(record))], "refused": refused}]
        return [
            {**line, "parts": [{**each, "text": self.hide(each["text"])} for each in line["parts"]]}
            for line in render(record)
        ]

    def write_scores(self, scores: ndarray, out: ndarray) -> None:
        """Write `scores.jsonl`: rows of each source at the ends of their scores and around the cuts.

        Args:
            scores, out: see `align.data.sets.score_cuts.outside`.
        """
        lines = []
        for number, name in enumerate(self.rows.names):
            mine = np.flatnonzero(self.source == number)
            for what, places in examples(scores[mine], out[mine], SCORED):
                lines += [
                    {"source": name, "what": what, "score": float(scores[place]), "dropped": bool(out[place]), **row}
                    for place, row in zip(mine[places], self.show(mine[places]), strict=True)
                ]
        self.write(SCORES, lines)


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
