"""The report page of a data set, and its printed summary: where every row went, the mixture, lengths and scores."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.report.bars import draw_horizontal_bars, draw_vertical_bars
from align.report.figure_text import format_figure, format_percent, pluralize
from align.report.page import Report
from align.report.run_view import PageSections, RunView

TEMPLATE = "data_set.html"
SIDES = ("train", "test")
PURPOSES = ("to train on", "to measure on")
"""Phrases for the purposes of the rows of the train and the test split, in the order of SIDES."""


def count_read_rows(source: Mapping[str, Any]) -> int:
    """Return the number of rows read from a source, including unreadable rows and pairs without a decision."""
    counts = source["counts"]
    return counts["read"] + counts.get("skipped_rows", 0) + counts.get("dropped_undecided", 0)


def iter_drop_counts(source: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (reason, number of rows) for the rows of a source that are not in the data set, in order of processing.

    A number may be 0.
    """
    counts = source["counts"]
    yield "refused", counts.get("skipped_rows", 0)
    yield "undecided", counts.get("dropped_undecided", 0)
    yield CLEANING, counts["read"] - counts["kept"]
    remaining = counts["kept"]
    for step, (reason, _) in REMOVAL_STEPS.items():
        if step in counts:
            yield reason, remaining - counts[step]
            remaining = counts[step]
    forgotten = source.get("forgotten", 0)
    yield "forgotten", forgotten
    in_data_set = sum(source["splits"][side]["distinct"] for side in SIDES)
    reason = "only measured on" if source["weight"] == 0 else "not in the mixture"
    yield reason, remaining - forgotten - in_data_set


CLEANING = "dropped in cleaning"
MAX_EXAMPLE_CHARACTERS = 160
"""Maximum number of characters of an example in a printed warning."""
REMOVAL_STEPS = {
    "refused": ("rows that cannot be read", "data.on_bad_row=skip leaves them out"),
    "undecided": ("pairs without a decision", "their answers are equal, tied or alone"),
    "after_score": ("dropped by score", "stage.score.keep, stage.score.least and stage.score.most cut there"),
    "after_decontamination": (
        "like evaluation rows",
        "stage.contamination.action=report keeps them, stage.contamination.near says how similar they are",
    ),
    "after_exact_dedup": (
        "exact duplicates",
        "stage.duplicates.exact=false keeps them, stage.duplicates.over says of what",
    ),
    "after_near_dedup": (
        "near-duplicates",
        "stage.duplicates.near=null keeps them, a higher stage.duplicates.near those that are less similar",
    ),
    "after_caps": ("over the cap", "the source's cap in stage.sources"),
    "after_test_decontamination": ("like test rows", "stage.contamination.test=false keeps them"),
}
"""Processing step → a phrase for the rows that it removes, and one on the settings that decide it."""


def describe_large_drop(drop: Mapping[str, Any]) -> str:
    """Return a warning that a processing step removed a large share of a source's rows, with the setting to change.

    Args:
        drop: the step, the source, the number of rows removed, and examples of them.
    """
    step = drop["step"]
    if step.startswith("clean: "):
        what = f"step {step.removeprefix('clean: ')} of stage.clean"
        setting = "loosen the step, or take it out of stage.clean"
    else:
        what, setting = REMOVAL_STEPS[step]
    share = format_percent(drop["removed"] / drop["of"])
    return (
        f"warning: {drop['source']}: {what} removed {drop['removed']:,} of {drop['of']:,} rows ({share}). "
        f"Setting: {setting}"
    )


def list_drop_warning_lines(drop: Mapping[str, Any]) -> list[str]:
    """Return a warning that a step removed many rows of a source, followed by a line per example of a removed row.

    Args:
        drop: see `describe_large_drop`.
    """
    return [describe_large_drop(drop), *(f"  for example: {shorten_example(text)}" for text in drop["examples"])]


def shorten_example(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_EXAMPLE_CHARACTERS else f"{line[: MAX_EXAMPLE_CHARACTERS - 1]}…"


DRAWN_SOURCES = 6
"""Maximum number of sources drawn in a chart. If there are more, the last entry is the sum of all others."""


def add_bars(
    report: Report,
    names: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    unit: str,
    title: str,
    caption: str,
    alt: str,
) -> None:
    """Add a chart of horizontal stacked bars to the report page, with the total of each bar in its alt text.

    Args:
        names: one per bar.
        parts: label of a part → its size in each bar.
        unit: label of the axis.
        alt: beginning of the alt text.
    """
    totals = zip(names, map(sum, zip(*parts.values(), strict=True)), strict=True)
    summary = "; ".join(f"{name} {total:,}" for name, total in totals)
    report.plot(draw_horizontal_bars(names, parts, unit, title), caption, f"{alt}: {summary}.")


def add_removed_rows(report: Report, sources: Sequence[Mapping[str, Any]]) -> None:
    """Add a bar chart to the report page of the number of rows that each step removed, by source."""
    removed = {source["name"]: count_removed_rows(source) for source in sources}
    steps = [
        step
        for step in dict.fromkeys(itertools.chain(*removed.values()))
        if any(counts[step] for counts in removed.values())
    ]
    if steps:
        parts = merge_others({name: [counts[step] for step in steps] for name, counts in removed.items()})
        alt = "Bars of the rows that each step removed, by source"
        caption = "Rows that each step removed, by source."
        add_bars(report, steps, parts, "rows", "What each step removed", caption, alt)


def count_removed_rows(source: Mapping[str, Any]) -> Counter[str]:
    """Return a Counter from processing step to the number of a source's rows it removed, with cleaning steps apart."""
    counts = Counter[str]()
    for reason, count in iter_drop_counts(source):
        if reason == CLEANING and source["clean"]:
            for step in source["clean"]:
                counts[f"clean: {step['step']}"] += step["dropped"]
        else:
            counts[reason] += count
    return counts


def add_source_sizes(report: Report, data: Mapping[str, Any]) -> None:
    """Add bar charts to the report page of the numbers of rows and of characters of each source in the data set."""
    sources = data["sources"]
    names = [source["name"] for source in sources]
    rows = {
        purpose: [source["splits"][side]["rows"] for source in sources]
        for side, purpose in zip(SIDES, PURPOSES, strict=True)
    }
    alt = "Bars of the rows of each source"
    add_bars(report, names, rows, "rows", "Rows of each source", "Rows of each source.", alt)
    characters = data.get("lengths", {}).get("characters")
    if characters is not None:  # they are unknown once rows were forgotten
        parts = {"characters": [characters[name] for name in names]}
        caption = "Characters of each source, system prompts left out."
        alt = "Bars of the characters of each source"
        add_bars(report, names, parts, "characters", "Text of each source", caption, alt)


def add_length_histogram(report: Report, lengths: Mapping[str, Any]) -> None:
    """Add a histogram to the report page of the lengths of rows in characters, by source.

    Args:
        lengths: edges of the bins, and the counts of each source.
    """
    totals = [sum(counts) for counts in zip(*lengths["counts"].values(), strict=True)]
    filled = [i for i, total in enumerate(totals) if total]
    if not filled:
        return
    shown_bins = range(filled[0], filled[-1] + 1)
    edges = lengths["edges"][filled[0] : filled[-1] + 2]
    parts = merge_others({name: [counts[i] for i in shown_bins] for name, counts in lengths["counts"].items()})
    picture = draw_vertical_bars([f"{edge:,}" for edge in edges], parts, "characters", "rows", "How long rows are")
    summary = "; ".join(
        f"{totals[i]:,} from {lengths['edges'][i]:,} to {lengths['edges'][i + 1] - 1:,}" for i in filled
    )
    alt = f"Histogram of the characters of rows, by source: {summary}."
    report.plot(picture, "Rows by their characters; each bar spans twice the one before.", alt)


def merge_others(parts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the counts by source with at most DRAWN_SOURCES entries: the last one sums up all remaining sources."""
    sources = [(name, [*counts]) for name, counts in parts.items()]
    if len(sources) <= DRAWN_SOURCES:
        return dict(sources)
    first = sources[: DRAWN_SOURCES - 1]
    remaining = sources[DRAWN_SOURCES - 1 :]
    sums = [sum(column) for column in zip(*(counts for _, counts in remaining), strict=True)]
    return dict([*first, (f"{len(remaining)} others", sums)])


SCORE_LABELS = {"loss": "loss, nats a token", "reward": "score"}
"""Kind of score, `loss` or `reward` → label of the axis."""


def describe_unscored(data: Mapping[str, Any]) -> str:
    """Return a phrase on the number of a data set's rows without a score, or an empty text if none exist.

    Also empty if rows were not scored.
    """
    count = sum(source["unscored"] for source in data.get("scores", {}).get("sources", {}).values())
    reason = "without a score, because it has nothing to score or is longer than the model's context: kept"
    return f"{pluralize(count, 'row')} {reason}" if count else ""


def add_scores(report: Report, data: Mapping[str, Any], view: RunView) -> None:
    """Add a table, histograms and examples of the rows' scores to the report page, if the rows were scored."""
    scores = data.get("scores")
    if not scores:
        return
    report.add("scores", scores, template=TEMPLATE)
    add_score_histograms(report, scores)
    report.add("scored_rows", view.read_stream("scores.jsonl"), template=TEMPLATE)


def format_kept_range(source: Mapping[str, Any]) -> str:
    """Format the range of scores that a source's kept rows have, such as `0.2 to 0.9`, or `none` if none is kept."""
    bounds = (source["kept_from"], source["kept_to"])
    return "none" if None in bounds else " to ".join(map(format_figure, bounds))


def add_score_histograms(report: Report, scores: Mapping[str, Any]) -> None:
    """Add a histogram of the rows' scores to the report page for each of the first DRAWN_SOURCES sources."""
    edges = scores["edges"]
    sources = [(name, source) for name, source in scores["sources"].items() if source["rows"]]
    for name, source in sources[:DRAWN_SOURCES]:
        lowest, _, median, _, highest = source["quantiles"]
        bounds = ((source["kept_from"], lowest), (source["kept_to"], highest))
        cuts = [bound for bound, extreme in bounds if bound not in (None, extreme)]
        dashed = f" Dashed: {' and '.join(map(format_figure, cuts))}, the limits of the kept scores." if cuts else ""
        outer = f"The outer bars hold what lies beyond {format_figure(edges[0])} and {format_figure(edges[-1])} too."
        spread = f"from {format_figure(lowest)} to {format_figure(highest)}, half of them below {format_figure(median)}"
        alt = (
            f"Histogram of the scores of {name}: {source['rows']:,} rows {spread}; {source['dropped']:,} are dropped, "
            f"and what lies from {format_kept_range(source)} is kept."
        )
        parts = {"kept": source["kept"]}
        if any(source["left_out"]):
            parts["dropped"] = source["left_out"]
        positions = [(cut - edges[0]) / (edges[1] - edges[0]) for cut in cuts]
        labels = [*map(format_figure, edges)]
        picture = draw_vertical_bars(labels, parts, SCORE_LABELS[scores["by"]], "rows", name, positions)
        report.plot(picture, f"Scores of {name}.{dashed} {outer}", alt)
    if len(sources) > DRAWN_SOURCES:
        report.text(f"Drawn are the first {DRAWN_SOURCES} of {len(sources)} sources.")


FILTER_LABELS = {
    "contaminated": "like evaluation rows",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "shared_with_test": "like test rows",
}
MANY = 0.05
"""Share of training rows similar to test rows above which a note explains how to keep them."""


def iter_summary_lines(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines printed at the end of a data set's run: warnings, a line per source, notes, and the totals.

    Args:
        data: the content of the data set's `data.json`.
        settings: the configuration under `stage`.
    """
    yield from (f"  {describe_large_drop(loss)}" for loss in data.get("losses", ()))
    is_weighted = has_shares(data, settings)
    for source in data["sources"]:
        losses = [f"{reason} {n:,}" for reason, n in iter_drop_counts(source) if n]
        train = source["splits"]["train"]
        test = source["splits"]["test"]
        distinct = f" ({train['distinct']:,} different ones)" if train["distinct"] != train["rows"] else ""
        share = (
            f"; {format_percent(source['got'])} of the mixture, {format_percent(source['asked'])} asked"
            if is_weighted
            else ""
        )
        rows = f"{train['rows']:,} to train on{distinct}, {test['rows']:,} to measure on{share}"
        yield f"  {source['name']}: {', '.join([f'{count_read_rows(source):,} read', *losses])} → {rows}"
    for source in data["sources"]:
        if source["metadata"]:
            yield f"  {source['name']}: columns kept as metadata: {', '.join(source['metadata'])}"
    yield from iter_notes(data, settings)
    splits = data["splits"]
    totals = " and ".join(
        f"{pluralize(splits[side]['rows'], 'row')} {purpose}" for side, purpose in zip(SIDES, PURPOSES, strict=True)
    )
    yield f"{totals}; root {data['root'][:12]}"


def format_shapes(name: str, shapes: Mapping[str, Any]) -> str:
    """Return a line for the console on the row formats and columns that were detected in a source's first rows.

    Args:
        name: the source.
        shapes: see `align.data.sets.source.detect_row_shapes`.
    """
    return f"  {name}: {describe_shapes(shapes)}, columns {', '.join(shapes['columns'])}"


def has_shares(data: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether the mixture has target shares for the sources, from their weights or from `mix.temperature`."""
    has_weights = any(source["weight"] is not None for source in data["sources"])
    return has_weights or settings["mix"]["temperature"] is not None


def iter_notes(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on duplicates and test leaks that are only reported, unanswered conversations and missing rows."""
    found_counts = data["found"]
    sources = data["sources"]
    in_train = data["splits"]["train"]["rows"]
    for part in ("duplicates", "contamination"):
        if settings[part]["action"] == "report":
            keys = (
                ("exact_duplicates", "near_duplicates")
                if part == "duplicates"
                else ("contaminated", "shared_with_test")
            )
            counts = ", ".join(f"{FILTER_LABELS[key]} {found_counts[key]:,}" for key in keys)
            yield f"  only reported, and kept (stage.{part}.action=report): {counts}"
    like_test = found_counts["shared_with_test"]
    if settings["contamination"]["action"] == "remove" and like_test > MANY * (in_train + like_test):
        yield (
            f"  {like_test:,} rows ask what a row to measure on asks, or share 13 words in a row or nearly all words "
            "with one, and are left out: stage.contamination.test=false keeps them"
        )
    if unanswered := sum(source["counts"]["unanswered"] for source in sources):
        yield (
            f"  {pluralize(unanswered, 'conversation')} without an answer: questions are taken of them, and supervised "
            "training leaves them out (stage.clean=[…, roles] drops them here)"
        )
    if note := describe_unscored(data):
        yield f"  {note}"
    if not data["splits"]["test"]["rows"]:
        yield "  there is no row to measure on"
    if data["limited_by"] and any(dict(iter_drop_counts(source)).get("not in the mixture") for source in sources):
        yield f"  {data['limited_by']} bounds the mixture: a higher stage.mix.repeat lets its rows be seen more often"


def summarize_data_set(view: RunView) -> str:
    """Return sentences on the numbers of train and test rows of a data set, and of rows left out, by reason."""
    sources = view.read_json("artifact/data.json").get("sources", ())
    metrics = view.metrics
    n_distinct = metrics["train_distinct"]
    distinct = f" ({n_distinct:,} different ones)" if n_distinct != metrics["train_rows"] else ""
    train_rows = pluralize(metrics["train_rows"], "row")
    test_rows = pluralize(metrics["test_rows"], "row")
    losses = Counter[str]()
    for source in sources:
        for reason, count in iter_drop_counts(source):
            losses[reason] += count
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in losses.items() if count)
    left_out = f" Of {sum(map(count_read_rows, sources)):,} read, left out: {reasons}." if reasons else ""
    return f"{train_rows} to train on{distinct}, and {test_rows} to measure on.{left_out}"


def add_data_set_body(report: Report, view: RunView) -> None:
    """Add the sections on sources, sizes, lengths, scores and examples to the report page of a data set."""
    data = view.read_json("artifact/data.json")
    if not data:
        return
    settings = view.settings
    remarks = [
        *map(describe_large_drop, data.get("losses", ())),
        *(note.strip() for note in iter_notes(data, settings)),
    ]
    sources = data["sources"]
    report.add("remarks", data.get("replaces"), remarks, template=TEMPLATE)
    add_sources(report, sources)
    shapes = [describe_shapes(source["read_as"]) for source in sources if "read_as" in source]
    report.add("mix", sources, shapes, has_shares(data, settings), template=TEMPLATE)
    add_source_sizes(report, data)
    report.add("contamination", data["evaluations"], template=TEMPLATE)
    add_lengths(report, data)
    add_scores(report, data, view)
    for section in ("cleaning", "refused"):
        report.add(section, sources, template=TEMPLATE)
    for section, file in (("clusters", "duplicates.jsonl"), ("dropped", "dropped.jsonl")):
        if rows := view.read_stream(file):
            report.add(section, rows, template=TEMPLATE)
    if rows := view.read_stream("rows.jsonl"):
        report.add("rows", rows, view.manifest.base, template=TEMPLATE)


def add_sources(report: Report, sources: Sequence[Mapping[str, Any]]) -> None:
    """Add a table to the report page with the rows read, dropped by each step and kept, one column per source."""
    names = [source["name"] for source in sources]
    losses = [dict(iter_drop_counts(source)) for source in sources]
    rows: list[tuple[Any, ...]] = [("read", *map(count_read_rows, sources))]
    for reason in dict.fromkeys(reason for counts in losses for reason in counts):
        row_counts = [counts.get(reason, 0) for counts in losses]
        if any(row_counts):
            rows.append((reason, *(-count for count in row_counts)))
    for side, purpose in zip(SIDES, PURPOSES, strict=True):
        rows.append((purpose, *(source["splits"][side]["rows"] for source in sources)))
    train_splits = [source["splits"]["train"] for source in sources]
    if any(split["distinct"] != split["rows"] for split in train_splits):
        rows.append(("different ones to train on", *(split["distinct"] for split in train_splits)))
    report.heading("Where every row went")
    add_removed_rows(report, sources)
    report.table(("rows", *names), rows, "Where every row went")


def describe_shapes(read_as: Mapping[str, Any]) -> str:
    """Return the detected row formats of a source as text, with the number of rows of each if there are several."""
    shapes = read_as["shapes"]
    if len(shapes) < 2:
        return ", ".join(shapes) or "–"
    counts = ", ".join(f"{name} {n:,}" for name, n in shapes.items())
    return f"{counts} (of the first {read_as['rows']:,} rows)"


def add_lengths(report: Report, data: Mapping[str, Any]) -> None:
    """Add a histogram and a table of the lengths of rows in characters to the report page, by source."""
    if "lengths" not in data:  # they are unknown once rows were forgotten
        return
    counts = data["lengths"]["counts"]
    rows = []
    for i, (start, end) in enumerate(itertools.pairwise(data["lengths"]["edges"])):
        row = [source_counts[i] for source_counts in counts.values()]
        if any(row):
            rows.append((f"{start:,} to {end - 1:,}", *row))
    report.heading("How long rows are")
    add_length_histogram(report, data["lengths"])
    report.table(("characters", *counts), rows, "How long rows are")


PAGE_SECTIONS = PageSections(summarize_data_set, add_data_set_body)
