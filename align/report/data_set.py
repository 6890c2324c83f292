"""A data set in lines and tables: what became of every row, the mixture, duplicates, and what was left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from align.report.data_counts import SIDES, lost, read
from align.report.data_losses import headline
from align.report.data_pictures import draw_lengths, draw_removed, draw_sources
from align.report.data_scores import note_of, scores_shown
from align.report.page import Part, Report
from align.report.seen import Seen
from align.report.words import counted, percent

PURPOSES = ("to train on", "to measure on")
FOUND = {
    "contaminated": "like evaluation rows", "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates", "shared_with_test": "like test rows",
}  # fmt: skip
RENDERED = (
    "The first ones of each source as the chat template of `{}` writes them, decoded from the token ids that training "
    "reads."
)
NOT_RENDERED = (
    "The first ones of each source, turn by turn. With `model=hub model.path=ORG/NAME` beside the sources they stand "
    "here as the chat template of that model writes them, token by token."
)
MANY = 0.05
"""The share of rows from which on a line says why they are left out, and how to keep them."""


def lines_of(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """What is printed of a data set: steps that removed much, a line a source, what one has to know, and a line on the
    whole.

    Args:
        settings: of the stage.
    """
    yield from (f"  {headline(loss)}" for loss in data.get("losses", ()))
    weighed = mixed(data, settings)
    for source in data["sources"]:
        told = [f"{why} {n:,}" for why, n in lost(source) if n]
        train, test = (source["splits"][side] for side in SIDES)
        again = f" ({train['distinct']:,} different ones)" if train["distinct"] != train["rows"] else ""
        share = f"; {percent(source['got'])} of the mixture, {percent(source['asked'])} asked" if weighed else ""
        kept = f"{train['rows']:,} to train on{again}, {test['rows']:,} to measure on{share}"
        yield f"  {source['name']}: {', '.join([f'{read(source):,} read', *told])} → {kept}"
    for source in data["sources"]:
        if source["metadata"]:
            yield f"  {source['name']}: columns kept as metadata: {', '.join(source['metadata'])}"
    yield from notes(data, settings)
    splits = data["splits"]
    rows = " and ".join(
        f"{counted(splits[side]['rows'], 'row')} {what}" for side, what in zip(SIDES, PURPOSES, strict=True)
    )
    yield f"{rows}; root {data['root'][:12]}"


def line_of_shapes(name: str, found: Mapping[str, Any]) -> str:
    """What the first rows of a source are taken for, printed before all of them are read.

    Args:
        found: see `align.data.sets.source.recognised`.
    """
    return f"  {name}: {read_as(found)}, columns {', '.join(found['columns'])}"


def mixed(data: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether shares were asked for."""
    weights = any(source["weight"] is not None for source in data["sources"])
    return weights or settings["mix"]["temperature"] is not None


def notes(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """What somebody who made a data set has to know."""
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
    if note := note_of(data):
        yield f"  {note}"
    if not data["splits"]["test"]["rows"]:
        yield "  there is no row to measure on"
    if data["limited_by"] and any(dict(lost(source)).get("not in the mixture") for source in sources):
        yield f"  {data['limited_by']} bounds the mixture: a higher stage.mix.repeat lets its rows be seen more often"


def verdict(seen: Seen) -> str:
    """What there is, and what was left out on the way."""
    data, metrics = seen.mapping("artifact/data.json"), seen.metrics
    distinct = metrics["train_distinct"]
    again = f" ({distinct:,} different ones)" if distinct != metrics["train_rows"] else ""
    trained, measured = counted(metrics["train_rows"], "row"), counted(metrics["test_rows"], "row")
    gone: dict[str, int] = {}
    for source in data.get("sources", ()):
        for why, count in lost(source):
            gone[why] = gone.get(why, 0) + count
    told = ", ".join(f"{why} {count:,}" for why, count in gone.items() if count)
    everything = sum(map(read, data.get("sources", ())))
    lines = f" Of {everything:,} read, left out: {told}." if told else ""
    return f"{trained} to train on{again}, and {measured} to measure on.{lines}"


def shown(report: Report, seen: Seen) -> None:
    """The body of the page."""
    data = seen.mapping("artifact/data.json")
    if not data:
        return
    if replaces := data.get("replaces"):
        report.text(
            f"It replaces the data set with the root {replaces['root'][:12]}, without "
            f"{counted(replaces['count'], 'row')}: {replaces['reason']}. Examples, which may show these, are not shown."
        )
    for loss in data.get("losses", ()):
        line = headline(loss)
        report.text(line[0].upper() + line[1:] + ".")
    for note in notes(data, seen.settings):
        report.text(note.strip()[0].upper() + note.strip()[1:] + ".")
    sources_shown(report, data, seen.settings)
    draw_sources(report, data)
    contamination_shown(report, data)
    lengths_shown(report, data)
    scores_shown(report, data, seen)
    cleaning_shown(report, data)
    refused_shown(report, data)
    clusters_shown(report, seen)
    dropped_shown(report, seen)
    rows_shown(report, seen)


def rows_shown(report: Report, seen: Seen) -> None:
    """The first rows of each source as they are trained on, with a legend."""
    rows, base = seen.evidence("rows.jsonl"), seen.manifest.base
    if not rows:
        return
    report.heading("Rows to train on").text(RENDERED.format(base.id) if base else NOT_RENDERED)
    special = [Part("special token", trained=False, special=True)] if base else []
    legend = [plain("read"), plain("  "), Part("the loss is taken on it", trained=True, special=False), plain("  ")]
    report.tokens("What the colours mean", [*legend, *special])
    for row in rows:
        name = f"{row['row']}, {row['what']}" if row["what"] else row["row"]
        if "tokens" in row:
            name += f": {counted(row['tokens'], 'token')}, the loss is taken on {row['trained']:,} of them"
        if "refused" in row:
            name += f": not rendered, {row['refused']}"
        report.tokens(name, [Part(**part) for part in row["parts"]])


def sources_shown(report: Report, data: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Where every row went, a source a column; and the mixture."""
    sources = data["sources"]
    names = [source["name"] for source in sources]
    gone = [dict(lost(source)) for source in sources]
    rows: list[tuple[Any, ...]] = [("read", *map(read, sources))]
    rows += [(why, *(-of[why] for of in gone)) for why in gone[0] if any(of[why] for of in gone)]
    for side, what in zip(SIDES, PURPOSES, strict=True):
        rows.append((what, *(source["splits"][side]["rows"] for source in sources)))
    if any(source["splits"]["train"]["distinct"] != source["splits"]["train"]["rows"] for source in sources):
        rows.append(("different ones to train on", *(source["splits"]["train"]["distinct"] for source in sources)))
    report.heading("Where every row went")
    draw_removed(report, data)
    report.table(("rows", *names), rows, "Where every row went")
    about: list[tuple[Any, ...]] = [("licence", *(source["licence"] or "not said" for source in sources))]
    if mixed(data, settings):
        about.append(("share asked", *(percent(source["asked"]) for source in sources)))
    about.append(("share of what is trained on", *(percent(source["got"]) for source in sources)))
    about.append(("sha256", *(source["digest"][:12] for source in sources)))
    if any(source["metadata"] for source in sources):
        about.append(("kept as metadata", *(", ".join(source["metadata"]) or "–" for source in sources)))
    if any("read_as" in source for source in sources):
        about.insert(0, ("read as", *(read_as(source["read_as"]) for source in sources)))
        about.insert(1, ("columns", *(", ".join(source["read_as"]["columns"]) or "–" for source in sources)))
    report.heading("Sources and their mix").table(("source", *names), about, "Sources and their mix")


def read_as(found: Mapping[str, Any]) -> str:
    """The shapes of a source's first rows."""
    shapes = found["shapes"]
    told = ", ".join(shapes) if len(shapes) < 2 else ", ".join(f"{name} {n:,}" for name, n in shapes.items())
    return f"{told} (of the first {found['rows']:,} rows)" if len(shapes) > 1 else told or "–"


def contamination_shown(report: Report, data: Mapping[str, Any]) -> None:
    """How many rows each evaluation set found, by rule."""
    found = [of for of in data["evaluations"] if of["hits"]]
    if found:
        rules = sorted({rule for of in found for rule in of["hits"]})
        rows = [(of["set"], *(of["hits"].get(rule, 0) for rule in rules)) for of in found]
        report.heading("Rows like rows of evaluation sets").text(
            "`ngram`: 8 to 13 words in a row are the same. `question`: it asks the same. `exact`: a short row has the "
            "same words. `contained`: a whole question stands in it. `near`: nearly all 3-grams are the same. "
            "`changed`: a whole question stands in it, but for one word."
        )
        report.table(("evaluation set", *rules), rows, "Rows like rows of evaluation sets")


def refused_shown(report: Report, data: Mapping[str, Any]) -> None:
    """Rows that could not be read, by cause."""
    rows = [
        (source["name"], cause["problem"], cause["count"], cause["field"])
        for source in data["sources"] for cause in source["bad_rows"]
    ]  # fmt: skip
    if rows:
        report.heading("Rows that were refused")
        report.table(("source", "why", "rows", "the first one"), rows, "Rows that were refused")


def lengths_shown(report: Report, data: Mapping[str, Any]) -> None:
    """How long rows are, by source."""
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


def cleaning_shown(report: Report, data: Mapping[str, Any]) -> None:
    """What each cleaning step changed, dropped and counted, where it did anything."""
    rows = [
        (source["name"], step["step"], step["changed"], step["dropped"],
         ", ".join(f"{what}: {count:,}" for what, count in {**step["reasons"], **step["notes"]}.items()))
        for source in data["sources"] for step in source["clean"]
        if step["changed"] or step["dropped"] or step["notes"]
    ]  # fmt: skip
    if rows:
        report.heading("Cleaning").table(("source", "step", "changed", "dropped", "what it found"), rows, "Cleaning")


def clusters_shown(report: Report, seen: Seen) -> None:
    """The largest clusters of duplicates: the row that stays, and some of the others."""
    found = seen.evidence("duplicates.jsonl")
    if not found:
        return
    report.heading("The largest clusters of duplicates")
    for cluster in found:
        kept = cluster["kept"]
        report.tokens(f"{counted(cluster['size'], 'row')}; {kept['row']} stays", [plain(kept["text"])])
        for other in cluster["others"]:
            report.tokens(f"{other['row']}, Jaccard {other['jaccard']:.2f}", [plain(other["text"])])


def dropped_shown(report: Report, seen: Seen) -> None:
    """Examples of what was left out, by reason."""
    found = seen.evidence("dropped.jsonl")
    if not found:
        return
    report.heading("Examples of what was left out or changed").text("The first ones of each step.")
    for line in found:
        detail = f" ({line['detail']})" if line.get("detail") else ""
        report.tokens(f"{line['source']}, {line['step']}: {line['reason']}{detail}", [plain(line["text"])])
        if line.get("after"):
            report.tokens("becomes", [plain(line["after"])])


def plain(text: str) -> Part:
    return Part(text, trained=False, special=False)
