"""A data set in lines, tables and pictures: what became of every row, the mixture, scores, and what was left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.report.bars import lying_bars, upright_bars
from align.report.figure_text import counted, format_figure, percent
from align.report.page import Report
from align.report.run_view import RunView

TEMPLATE = "data_set.html"
SIDES = ("train", "test")
PURPOSES = ("to train on", "to measure on")


def count_read(source: Mapping[str, Any]) -> int:
    """Return the rows of a source that were read, with those that gave no record."""
    counts = source["counts"]
    return counts["read"] + counts.get("skipped_rows", 0) + counts.get("dropped_undecided", 0)


def list_losses(source: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield why rows of a source are not in, and how many: step by step, and at last what the mixture leaves out."""
    counts = source["counts"]
    yield "refused", counts.get("skipped_rows", 0)
    yield "undecided", counts.get("dropped_undecided", 0)
    yield "dropped in cleaning", counts["read"] - counts["kept"]
    before = counts["kept"]
    for step, (why, _) in SETTINGS.items():
        if step in counts:
            yield why, before - counts[step]
            before = counts[step]
    yield "forgotten", source.get("forgotten", 0)
    left = before - source.get("forgotten", 0) - sum(source["splits"][s]["distinct"] for s in SIDES)
    yield "only measured on" if source["weight"] == 0 else "not in the mixture", left


WIDTH = 160
"""Characters of an example."""
SETTINGS = {
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
"""Step → what it removes, and the setting that decides."""


def describe_loss(loss: Mapping[str, Any]) -> str:
    """Return the warning without its examples."""
    step = loss["step"]
    if step.startswith("clean: "):
        what = f"step {step.removeprefix('clean: ')} of stage.clean"
        setting = "loosen the step, or take it out of stage.clean"
    else:
        what, setting = SETTINGS[step]
    share = percent(loss["removed"] / loss["of"])
    return (
        f"warning: {loss['source']}: {what} removed {loss['removed']:,} of {loss['of']:,} rows ({share}). "
        f"Setting: {setting}"
    )


def loss_lines(loss: Mapping[str, Any]) -> list[str]:
    """Return the warning, a line an example behind it."""
    return [describe_loss(loss), *(f"  for example: {shorten(text)}" for text in loss["examples"])]


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


DRAWN_SOURCES = 6
"""Sources that have a colour of their own. Where there are more, the last one is all others together."""
CLEANING = "dropped in cleaning"


def draw_bars(
    report: Report,
    names: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    unit: str,
    title: str,
    caption: str,
    alt: str,
) -> None:
    """Draw a horizontal bar for each name, and describe it by the sums of its parts."""
    totals = zip(names, map(sum, zip(*parts.values(), strict=True)), strict=True)
    summary = "; ".join(f"{name} {total:,}" for name, total in totals)
    report.plot(lying_bars(names, parts, unit, title), caption, f"{alt}: {summary}.")


def draw_removed(report: Report, sources: Sequence[Mapping[str, Any]]) -> None:
    """Draw how many rows of each source each step removed."""
    removed = {source["name"]: count_removed(source) for source in sources}
    steps = [
        step for step in dict.fromkeys(itertools.chain(*removed.values())) if any(c[step] for c in removed.values())
    ]
    if steps:
        parts = merge_others({name: [counts[step] for step in steps] for name, counts in removed.items()})
        alt = "Bars of the rows that each step removed, by source"
        caption = "Rows that each step removed, by source."
        draw_bars(report, steps, parts, "rows", "What each step removed", caption, alt)


def count_removed(source: Mapping[str, Any]) -> Counter[str]:
    """Return the rows of a source that each step removed, each cleaning step by its name, in the order of the steps."""
    counts = Counter[str]()
    for why, count in list_losses(source):
        if why == CLEANING and source["clean"]:
            for step in source["clean"]:
                counts[f"clean: {step['step']}"] += step["dropped"]
        else:
            counts[why] += count
    return counts


def draw_sources(report: Report, data: Mapping[str, Any]) -> None:
    """Draw the rows and the characters of each source that are in the data set."""
    sources = data["sources"]
    names = [source["name"] for source in sources]
    sides = {
        what: [source["splits"][side]["rows"] for source in sources] for side, what in zip(SIDES, PURPOSES, strict=True)
    }
    alt = "Bars of the rows of each source"
    draw_bars(report, names, sides, "rows", "Rows of each source", "Rows of each source.", alt)
    characters = data.get("lengths", {}).get("characters")
    if characters is not None:  # no rows were forgotten since
        parts = {"characters": [characters[name] for name in names]}
        caption = "Characters of each source, system prompts left out."
        alt = "Bars of the characters of each source"
        draw_bars(report, names, parts, "characters", "Text of each source", caption, alt)


def draw_lengths(report: Report, lengths: Mapping[str, Any]) -> None:
    """Draw how many rows have how many characters."""
    totals = [sum(counts) for counts in zip(*lengths["counts"].values(), strict=True)]
    used = [i for i, total in enumerate(totals) if total]
    if not used:
        return
    chosen = range(used[0], used[-1] + 1)
    edges = lengths["edges"][used[0] : used[-1] + 2]
    parts = merge_others({name: [counts[i] for i in chosen] for name, counts in lengths["counts"].items()})
    picture = upright_bars([f"{edge:,}" for edge in edges], parts, "characters", "rows", "How long rows are")
    summary = "; ".join(f"{totals[i]:,} from {lengths['edges'][i]:,} to {lengths['edges'][i + 1] - 1:,}" for i in used)
    alt = f"Histogram of the characters of rows, by source: {summary}."
    report.plot(picture, "Rows by their characters; each bar spans twice the one before.", alt)


def merge_others(parts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the counts of at most `DRAWN_SOURCES` sources, the last of them all others where there are more."""
    named = [(name, [*counts]) for name, counts in parts.items()]
    if len(named) <= DRAWN_SOURCES:
        return dict(named)
    others = [sum(column) for column in zip(*(counts for _, counts in named[DRAWN_SOURCES - 1 :]), strict=True)]
    return dict([*itertools.islice(named, DRAWN_SOURCES - 1), (f"{len(named) - DRAWN_SOURCES + 1} others", others)])


UNITS = {"loss": "loss, nats a token", "reward": "score"}


def describe_unscored(data: Mapping[str, Any]) -> str:
    """Describe rows without a score; empty if there are none."""
    count = sum(of["unscored"] for of in data.get("scores", {}).get("sources", {}).values())
    what = "without a score, for nothing in it is to be scored, or it is longer than the model's context: kept"
    return f"{counted(count, 'row')} {what}" if count else ""


def add_scores(report: Report, data: Mapping[str, Any], seen: RunView) -> None:
    """Add the scores, if there are any."""
    said = data.get("scores")
    if not said:
        return
    report.add("scores", said, template=TEMPLATE)
    draw_scores(report, said)
    report.add("scored_rows", seen.evidence("scores.jsonl"), template=TEMPLATE)


def kept_range(of: Mapping[str, Any]) -> str:
    """Return the lowest and the highest kept score, as text."""
    ends = (of["kept_from"], of["kept_to"])
    return "none" if None in ends else " to ".join(map(format_figure, ends))


def draw_scores(report: Report, said: Mapping[str, Any]) -> None:
    """Draw a histogram of each of the first sources."""
    edges, found = said["edges"], [one for one in said["sources"].items() if one[1]["rows"]]
    for name, of in found[:DRAWN_SOURCES]:
        lowest, _, middle, _, highest = of["quantiles"]
        cuts = [of[end] for end, limit in (("kept_from", lowest), ("kept_to", highest)) if of[end] not in (None, limit)]
        where = f" Dashed: {' and '.join(map(format_figure, cuts))}, where it is cut." if cuts else ""
        beyond = f"The outer bars hold what lies beyond {format_figure(edges[0])} and {format_figure(edges[-1])} too."
        ends = f"from {format_figure(lowest)} to {format_figure(highest)}, half of them below {format_figure(middle)}"
        alt = (
            f"Histogram of the scores of {name}: {of['rows']:,} rows {ends}; {of['dropped']:,} are dropped, and "
            f"what lies from {kept_range(of)} is kept."
        )
        parts = {"kept": of["kept"], "dropped": of["left_out"]} if any(of["left_out"]) else {"kept": of["kept"]}
        places = [(cut - edges[0]) / (edges[1] - edges[0]) for cut in cuts]
        picture = upright_bars([*map(format_figure, edges)], parts, UNITS[said["by"]], "rows", name, places)
        report.plot(picture, f"Scores of {name}.{where} {beyond}", alt)
    if len(found) > DRAWN_SOURCES:
        report.text(f"Drawn are the first {DRAWN_SOURCES} of {len(found)} sources.")


FOUND = {
    "contaminated": "like evaluation rows", "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates", "shared_with_test": "like test rows",
}  # fmt: skip
MANY = 0.05
"""The share of rows from which on a line says why they are left out, and how to keep them."""


def summary_lines(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is printed of a data set: steps that removed much, a line a source, what one has to know, and a line
    on the whole.

    Args:
        settings: of the stage.
    """
    yield from (f"  {describe_loss(loss)}" for loss in data.get("losses", ()))
    weighed = has_shares(data, settings)
    for source in data["sources"]:
        told = [f"{why} {n:,}" for why, n in list_losses(source) if n]
        train, test = (source["splits"][side] for side in SIDES)
        again = f" ({train['distinct']:,} different ones)" if train["distinct"] != train["rows"] else ""
        share = f"; {percent(source['got'])} of the mixture, {percent(source['asked'])} asked" if weighed else ""
        kept = f"{train['rows']:,} to train on{again}, {test['rows']:,} to measure on{share}"
        yield f"  {source['name']}: {', '.join([f'{count_read(source):,} read', *told])} → {kept}"
    for source in data["sources"]:
        if source["metadata"]:
            yield f"  {source['name']}: columns kept as metadata: {', '.join(source['metadata'])}"
    yield from iter_notes(data, settings)
    splits = data["splits"]
    rows = " and ".join(
        f"{counted(splits[side]['rows'], 'row')} {what}" for side, what in zip(SIDES, PURPOSES, strict=True)
    )
    yield f"{rows}; root {data['root'][:12]}"


def shapes_line(name: str, found: Mapping[str, Any]) -> str:
    """Return the line on what the first rows of a source are taken for, printed before all of them are read.

    Args:
        found: see `align.data.sets.source.recognised`.
    """
    return f"  {name}: {describe_shapes(found)}, columns {', '.join(found['columns'])}"


def has_shares(data: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether shares were asked for."""
    weights = any(source["weight"] is not None for source in data["sources"])
    return weights or settings["mix"]["temperature"] is not None


def iter_notes(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what somebody who made a data set has to know."""
    found, sources = data["found"], data["sources"]
    in_train = data["splits"]["train"]["rows"]
    for part in ("duplicates", "contamination"):
        if settings[part]["action"] == "report":
            keys = (
                ("exact_duplicates", "near_duplicates")
                if part == "duplicates"
                else ("contaminated", "shared_with_test")
            )
            told = ", ".join(f"{FOUND[key]} {found[key]:,}" for key in keys)
            yield f"  only reported, and kept (stage.{part}.action=report): {told}"
    like = found["shared_with_test"]
    if settings["contamination"]["action"] == "remove" and like > MANY * (in_train + like):
        yield (
            f"  {like:,} rows ask what a row to measure on asks, or share 13 words in a row or nearly all words with "
            "one, and are left out: stage.contamination.test=false keeps them"
        )
    if unanswered := sum(source["counts"]["unanswered"] for source in sources):
        yield (
            f"  {counted(unanswered, 'conversation')} without an answer: questions are taken of them, and supervised "
            "training leaves them out (stage.clean=[…, roles] drops them here)"
        )
    if note := describe_unscored(data):
        yield f"  {note}"
    if not data["splits"]["test"]["rows"]:
        yield "  there is no row to measure on"
    if data["limited_by"] and any(dict(list_losses(source)).get("not in the mixture") for source in sources):
        yield f"  {data['limited_by']} bounds the mixture: a higher stage.mix.repeat lets its rows be seen more often"


def summarize(seen: RunView) -> str:
    """Return what there is, and what was left out on the way."""
    data, metrics = seen.json("artifact/data.json"), seen.metrics
    distinct = metrics["train_distinct"]
    again = f" ({distinct:,} different ones)" if distinct != metrics["train_rows"] else ""
    trained, measured = counted(metrics["train_rows"], "row"), counted(metrics["test_rows"], "row")
    gone: dict[str, int] = {}
    for source in data.get("sources", ()):
        for why, count in list_losses(source):
            gone[why] = gone.get(why, 0) + count
    told = ", ".join(f"{why} {count:,}" for why, count in gone.items() if count)
    everything = sum(map(count_read, data.get("sources", ())))
    lines = f" Of {everything:,} read, left out: {told}." if told else ""
    return f"{trained} to train on{again}, and {measured} to measure on.{lines}"


def add_body(report: Report, seen: RunView) -> None:
    """Add the body of the page."""
    data = seen.json("artifact/data.json")
    if not data:
        return
    settings = seen.settings
    lines = [*map(describe_loss, data.get("losses", ())), *(note.strip() for note in iter_notes(data, settings))]
    sources = data["sources"]
    report.add("remarks", data.get("replaces"), lines, template=TEMPLATE)
    add_sources(report, sources)
    shapes = [describe_shapes(source["read_as"]) for source in sources if "read_as" in source]
    report.add("mix", sources, shapes, has_shares(data, settings), template=TEMPLATE)
    draw_sources(report, data)
    report.add("contamination", data["evaluations"], template=TEMPLATE)
    add_lengths(report, data)
    add_scores(report, data, seen)
    for section in ("cleaning", "refused"):
        report.add(section, sources, template=TEMPLATE)
    for section, file in (("clusters", "duplicates.jsonl"), ("dropped", "dropped.jsonl")):
        if found := seen.evidence(file):
            report.add(section, found, template=TEMPLATE)
    if rows := seen.evidence("rows.jsonl"):
        report.add("rows", rows, seen.manifest.base, template=TEMPLATE)


def add_sources(report: Report, sources: Sequence[Mapping[str, Any]]) -> None:
    """Add where every row went, a source a column."""
    names = [source["name"] for source in sources]
    losses = [dict(list_losses(source)) for source in sources]
    rows: list[tuple[Any, ...]] = [("read", *map(count_read, sources))]
    rows += [(why, *(-of[why] for of in losses)) for why in losses[0] if any(of[why] for of in losses)]
    for side, what in zip(SIDES, PURPOSES, strict=True):
        rows.append((what, *(source["splits"][side]["rows"] for source in sources)))
    trained = [source["splits"]["train"] for source in sources]
    if any(side["distinct"] != side["rows"] for side in trained):
        rows.append(("different ones to train on", *(side["distinct"] for side in trained)))
    report.heading("Where every row went")
    draw_removed(report, sources)
    report.table(("rows", *names), rows, "Where every row went")


def describe_shapes(found: Mapping[str, Any]) -> str:
    """Describe the shapes of a source's first rows."""
    shapes = found["shapes"]
    told = ", ".join(shapes) if len(shapes) < 2 else ", ".join(f"{name} {n:,}" for name, n in shapes.items())
    return f"{told} (of the first {found['rows']:,} rows)" if len(shapes) > 1 else told or "–"


def add_lengths(report: Report, data: Mapping[str, Any]) -> None:
    """Add how long rows are, by source."""
    if "lengths" not in data:  # rows were forgotten since
        return
    edges, counts = data["lengths"]["edges"], data["lengths"]["counts"]
    names = [f"{least:,} to {behind - 1:,}" for least, behind in itertools.pairwise(edges)]
    rows = [
        (name, *(of[i] for of in counts.values()))
        for i, name in enumerate(names)
        if any(of[i] for of in counts.values())
    ]
    report.heading("How long rows are")
    draw_lengths(report, data["lengths"])
    report.table(("characters", *counts), rows, "How long rows are")
