"""Content of a data set's report: counts of rows by source and step, examples of removed rows, clusters of duplicates,
steps that removed many rows, and training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from align.core.types import Record
from align.data.chat.training_view import Render, build_part
from align.data.dedup.evaluation_overlap import RULES, OverlapMatches
from align.data.dedup.near_duplicates import Duplicates
from align.data.read.content import MESSAGE_ATTRIBUTES, list_texts, to_content_row
from align.data.sets.gather import SKIPPED, UNDECIDED
from align.data.sets.mix import Funnel, Mixture
from align.data.sets.score_cuts import iter_score_examples
from align.data.sets.source import Source
from align.data.sets.spool import SpoolRows
from align.run import Input
from align.run.files import write_text
from align.track import format_conversation, format_row

Hide = Callable[[str], str]
"""A function that returns a text with personal data masked."""
PARTS_OF_ROWS = [*dict.fromkeys(part for parts in MESSAGE_ATTRIBUTES.values() for part in parts)]
DROPPED = "dropped.jsonl"
DUPLICATES = "duplicates.jsonl"
ROWS = "rows.jsonl"
SCORES = "scores.jsonl"
ROWS_SHOWN = 3
"""Number of training rows of each source that are shown."""
CLUSTERS_SHOWN = 8
"""Maximum number of clusters of duplicates that are shown."""
DUPLICATES_SHOWN = 3
"""Maximum number of duplicates of each cluster that are shown."""
LEAKS_SHOWN = 3
"""Maximum number of rows that overlap with each evaluation set that are shown."""
SCORES_SHOWN = 3
"""Maximum number of rows that are shown at each end and each cut of a source's scores."""
EXAMPLES_SHOWN = 4
"""Maximum number of examples of each source and cleaning step."""
MAX_CHARACTERS = 400
"""Maximum characters of a record that are shown."""
MAX_RENDERED = 20_000
"""Number of characters above which a record is cut instead of rendered, because a chat template renders all of it."""
LOSS_SHARE = 0.2
"""Share of a source's rows above which the removals of a step are reported as a loss."""
LOSS_EXAMPLES = 3
"""Maximum number of examples of each loss that are shown."""
StepLoss = dict[str, Any]
"""A step that removed many rows: `source`, `step`, `removed`, `of` (rows of the source before the step), and `examples`
(texts)."""


def describe_sources(
    sources: Sequence[Source],
    inputs: Mapping[str, Input],
    shapes: Sequence[Mapping[str, Any]],
    source_counts: Sequence[Mapping[str, Any]],
    funnel: Funnel,
    is_test: ndarray,
    mixture: Mixture,
) -> dict[str, Any]:
    """Return the fields of `data.json` on a data set's sources: their counts, licences, and shares of the mixture.

    Args:
        shapes: shapes of the rows of each source, see `align.data.sets.source.detect_row_shapes`.
        source_counts: counts of each source's rows, see `align.data.sets.gather`.
        is_test: whether each row is in the test split, bool (N).
        mixture: the mixture of training rows.
    """
    listed = []
    for i, (source, read_counts) in enumerate(zip(sources, source_counts, strict=True)):
        in_source = funnel.source == i
        times = mixture.times[in_source]
        test_rows = int((funnel.kept & is_test & in_source).sum())
        listed.append(
            {
                "name": source.name,
                "given": source.location,
                "digest": inputs[f"sources.{source.name}"].digest,
                "read_as": dict(shapes[i]),
                **source.ids.as_json(),
                "licence": source.licence or ", ".join(read_counts["licences"]) or None,
                "counts": {**read_counts["counts"], **funnel.count_by_step(i)},
                "clean": [{key: step[key] for key in step if key != "examples"} for step in read_counts["clean"]],
                # Without the refused values, because a data set may be passed on.
                "bad_rows": [
                    {key: cause[key] for key in ("field", "problem", "count")} for cause in read_counts["bad_rows"]
                ],
                "metadata": read_counts["metadata"],
                "weight": source.weight,
                "cap": source.cap,
                "asked": mixture.target_shares[i],
                "got": mixture.actual_shares[i],
                "splits": {
                    "train": {"rows": int(times.sum()), "distinct": int((times > 0).sum())},
                    "test": {"rows": test_rows, "distinct": test_rows},
                },
            }
        )
    return {"sources": listed, "limited_by": None if mixture.limit is None else sources[mixture.limit].name}


def count_hits_by_set(names: Sequence[str], leaks: OverlapMatches) -> list[dict[str, Any]]:
    """Return the number of rows that overlap with each evaluation set, by rule, as one mapping (`set`, `hits`) per set.

    Args:
        names: names of the evaluation sets.
    """
    rules = np.array(RULES, object)[leaks.rule]
    return [{"set": name, "hits": dict(Counter(rules[leaks.evaluation == i]))} for i, name in enumerate(names)]


def count_duplicates_and_leaks(
    duplicates: Duplicates, evaluation_leaks: OverlapMatches, split_leaks: OverlapMatches
) -> dict[str, int]:
    """Return the numbers of duplicates and of rows that overlap with evaluation or test rows, whether or not they were
    removed.

    Args:
        evaluation_leaks: rows that overlap with evaluation sets.
        split_leaks: training rows that overlap with test rows.
    """
    exact = int(duplicates.exact.sum())
    return {
        "exact_duplicates": exact,
        "near_duplicates": len(duplicates.dropped) - exact,
        "contaminated": len(evaluation_leaks.text),
        "shared_with_test": len(split_leaks.text),
    }


def build_data_set_metrics(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a `stage=data` run, such as numbers of rows and Merkle roots, from the content of
    `data.json`."""
    splits = data["splits"]
    counts = sum((Counter(source["counts"]) for source in data["sources"]), Counter[str]())
    left_out = {key: counts[key] for key in counts if key in (SKIPPED, UNDECIDED)}
    if scores := data.get("scores"):
        summaries = scores["sources"].values()
        left_out["dropped_by_score"] = sum(summary.get("dropped", 0) for summary in summaries)
        left_out["unscored"] = sum(summary["unscored"] for summary in summaries)
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


def find_read_losses(names: Sequence[str], source_counts: Sequence[Mapping[str, Any]], hide: Hide) -> list[StepLoss]:
    """Return the reading and cleaning steps that removed more than `LOSS_SHARE` of a source's rows, with numbers and
    examples.

    Args:
        names: names of the sources.
        source_counts: counts of each source's rows, see `align.data.sets.gather`.
    """
    losses = list[StepLoss]()
    for name, read_counts in zip(names, source_counts, strict=True):
        counts = read_counts["counts"]
        read = counts["read"] + counts[SKIPPED] + counts[UNDECIDED]
        causes = [hide(f"{cause['field']}={cause['value']}: {cause['problem']}") for cause in read_counts["bad_rows"]]
        steps: list[tuple[str, int, int, list[str]]] = [
            ("refused", counts[SKIPPED], read, causes),
            ("undecided", counts[UNDECIDED], read, []),
        ]
        for step in read_counts["clean"]:
            examples = [format_row_text(example["before"]) for example in step["examples"] if example["after"] is None]
            steps.append((f"clean: {step['step']}", step["dropped"], step["seen"], examples))
        losses += [
            {"source": name, "step": step, "removed": removed, "of": total, "examples": examples[:LOSS_EXAMPLES]}
            for step, removed, total, examples in steps
            if removed > LOSS_SHARE * total
        ]
    return losses


def format_row_text(row: Mapping[str, Any]) -> str:
    """Return a row as text for readers: plain text as it is, and a conversation as its tool names and its turns with
    roles. The row has the form of `align.data.read.content.to_content_row`."""
    if "text" in row:
        return row["text"]
    turns = [turn for part in PARTS_OF_ROWS for turn in row.get(part, ())]
    tools = [tool["function"]["name"] for tool in row.get("tools", ())]
    return "\n".join([*([f"tools: {', '.join(tools)}"] if tools else []), format_conversation(turns)])


def list_cleaning_examples(names: Sequence[str], source_counts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first records that each cleaning step dropped, changed or noted in each source, for `dropped.jsonl`.

    Args:
        names: names of the sources.
        source_counts: counts of each source's rows, see `align.data.sets.gather`.
    """
    return [
        {
            "source": name,
            "step": step["step"],
            "reason": example["reason"] or "changed",
            "detail": example["detail"],
            "text": format_row_text(example["before"]),
            "after": format_row_text(example["after"]) if example["after"] not in (None, example["before"]) else None,
        }
        for name, read_counts in zip(names, source_counts, strict=True)
        for step in read_counts["clean"]
        for example in step["examples"][:EXAMPLES_SHOWN]
    ]


class ExampleWriter:
    """A writer of the example rows that a data set's report shows, as JSON Lines beside the artifact.

    Args:
        folder: folder of the run.
        rows: rows of the spool.
        source: number of each row's source, int (N).
        hide: masks personal data.
    """

    def __init__(self, folder: Path, rows: SpoolRows, source: ndarray, hide: Hide) -> None:
        self.folder = folder
        self.rows = rows
        self.source = source
        self.hide = hide

    def shorten_text(self, record: Record) -> str:
        """Return a record's text with personal data masked, cut to at most `MAX_CHARACTERS` characters."""
        text = self.hide(format_row_text(to_content_row(record)))
        return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"

    def describe_rows(self, numbers: ndarray) -> list[dict[str, Any]]:
        """Return the name (`source:row`) and the shortened text of the rows with these numbers."""
        return [{"row": id, "text": self.shorten_text(record)} for id, record in self.rows.load_records(numbers)]

    def find_losses(self, funnel: Funnel, step: str) -> Iterator[StepLoss]:
        """Yield the sources that lost more than `LOSS_SHARE` of their rows in a funnel's last step, with numbers and
        examples.

        Args:
            step: name of the step.
        """
        for number, (before, after) in enumerate(zip(funnel.before, funnel.steps[step], strict=True)):
            if before - after > LOSS_SHARE * before:
                removed = funnel.removed[self.source[funnel.removed] == number]
                yield {
                    "source": funnel.names[number],
                    "step": step,
                    "removed": before - after,
                    "of": before,
                    "examples": [row["text"] for row in self.describe_rows(removed[:LOSS_EXAMPLES])],
                }

    def describe_leaks(self, leaks: OverlapMatches, sets: Sequence[str]) -> list[dict[str, Any]]:
        """Return the first rows that overlap with each evaluation set, with the rule and the evaluation row, for
        `dropped.jsonl`.

        Args:
            sets: names of the evaluation sets.
        """
        lines = []
        for number, name in enumerate(sets):
            places = np.flatnonzero(leaks.evaluation == number)[:LEAKS_SHOWN]
            for place, row in zip(places, self.describe_rows(leaks.text[places]), strict=True):
                reason = f"{RULES[leaks.rule[place]]}, row {leaks.row[place] + 1} of {name}"
                source = row["row"].rpartition(":")[0]
                lines.append({"source": source, "step": "contamination", "reason": reason, **row})
        return lines

    def write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.folder / name, "".join(map(format_row, lines)))

    def write_duplicates(self, duplicates: Duplicates, heads: ndarray) -> None:
        """Write the largest clusters of duplicates to `duplicates.jsonl`, one on each line.

        Args:
            heads: see `align.data.sets.duplicates.find_cluster_heads`.
        """
        lines = []
        for head, size in sorted(Counter(heads.tolist()).items(), key=lambda entry: (-entry[1], entry[0]))[
            :CLUSTERS_SHOWN
        ]:
            members = np.flatnonzero(heads == head)[:DUPLICATES_SHOWN]
            kept, *dropped = self.describe_rows(np.append(head, duplicates.dropped[members]))
            similar = [
                {**row, "jaccard": float(duplicates.jaccard[i])} for row, i in zip(dropped, members, strict=True)
            ]
            lines.append({"size": size + 1, "kept": kept, "others": similar})
        self.write(DUPLICATES, lines)

    def write_rows(self, mask: ndarray, render: Render) -> None:
        """Write the first training rows of each source to `rows.jsonl`, rendered as in training.

        Args:
            mask: mask of the training rows, bool (N).
        """
        sources = range(len(self.rows.names))
        numbers = [np.flatnonzero(mask & (self.source == number))[:ROWS_SHOWN] for number in sources]
        records = self.rows.load_records(np.concatenate(numbers))
        self.write(ROWS, [{"row": id, **line} for id, record in records for line in self.render_record(record, render)])

    def render_record(self, record: Record, render: Render) -> list[dict[str, Any]]:
        """Return one record as lines of `rows.jsonl`: rendered as in training, with personal data masked. A record of
        more than `MAX_RENDERED` characters is cut instead."""
        if sum(map(len, list_texts(record))) > MAX_RENDERED:
            refused = "it is too long to be shown whole"
            return [{"what": "", "parts": [build_part(self.shorten_text(record))], "refused": refused}]
        return [
            {**line, "parts": [{**entry, "text": self.hide(entry["text"])} for entry in line["parts"]]}
            for line in render(record)
        ]

    def write_scores(self, scores: ndarray, is_dropped: ndarray) -> None:
        """Write rows of each source with the lowest and highest scores, and around the cuts, to `scores.jsonl`.

        Args:
            scores, is_dropped: see `align.data.sets.score_cuts.mask_outside_cuts`.
        """
        lines = []
        for number, name in enumerate(self.rows.names):
            numbers = np.flatnonzero(self.source == number)
            for description, places in iter_score_examples(scores[numbers], is_dropped[numbers], SCORES_SHOWN):
                lines += [
                    {
                        "source": name,
                        "what": description,
                        "score": float(scores[place]),
                        "dropped": bool(is_dropped[place]),
                        **row,
                    }
                    for place, row in zip(numbers[places], self.describe_rows(numbers[places]), strict=True)
                ]
        self.write(SCORES, lines)


def build_length_histograms(characters: ndarray, source: ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return a histogram of the lengths in characters of each source's rows, with bins that double, and their total
    length.

    Args:
        characters, source: number of characters and source of each written row, int (N).
        names: names of the sources.
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
