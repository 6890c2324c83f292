"""A data set in lines, tables and pictures: what became of every row, the mixture, scores, and what was left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.report.bars import lying_bars, upright_bars
from align.report.figure_text import counted, format_figure, percent
from align.report.page import Part, Report
from align.report.run_view import RunView

SIDES = ("train", "test")
STEPS = {
    "after_score": "dropped by score",
    "after_decontamination": "like evaluation rows", "after_exact_dedup": "exact duplicates",
    "after_near_dedup": "near-duplicates", "after_caps": "over the cap", "after_test_decontamination": "like test rows",
}  # fmt: skip
"""Step of the funnel → what it leaves out."""


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
    for step, why in STEPS.items():
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


def draw_removed(report: Report, data: Mapping[str, Any]) -> None:
    """Draw how many rows of each source each step removed."""
    sources = data["sources"]
    removed = {source["name"]: count_removed(source) for source in sources}
    steps = [*dict.fromkeys(step for counts in removed.values() for step in counts)]
    steps = [step for step in steps if any(counts[step] for counts in removed.values())]
    if not steps:
        return
    parts = merge_others({name: [counts[step] for step in steps] for name, counts in removed.items()})
    picture = lying_bars(steps, parts, "rows", "What each step removed")
    summary = "; ".join(f"{step} {sum(counts[step] for counts in removed.values()):,}" for step in steps)
    alt = f"Bars of the rows that each step removed, by source: {summary}."
    report.plot(picture, "Rows that each step removed, by source.", alt)


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
        f"to {what}": [source["splits"][side]["rows"] for source in sources]
        for side, what in zip(SIDES, ("train on", "measure on"), strict=True)
    }
    summary = "; ".join(
        f"{name} {sum(rows):,}" for name, rows in zip(names, zip(*sides.values(), strict=True), strict=True)
    )
    picture = lying_bars(names, sides, "rows", "Rows of each source")
    report.plot(picture, "Rows of each source.", f"Bars of the rows of each source: {summary}.")
    characters = data.get("lengths", {}).get("characters")
    if characters is None:  # rows were forgotten since
        return
    parts = {"characters": [characters[name] for name in names]}
    picture = lying_bars(names, parts, "characters", "Text of each source")
    summary = "; ".join(f"{name} {characters[name]:,}" for name in names)
    alt = f"Bars of the characters of each source: {summary}."
    report.plot(picture, "Characters of each source, system prompts left out.", alt)


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
PLACES = {
    "dropped below the cut": "dropped, just below the lower cut",
    "kept above the cut": "kept, just above the lower cut", "kept below the cut": "kept, just below the upper cut",
    "dropped above the cut": "dropped, just above the upper cut",
}  # fmt: skip


def describe_cut(said: Mapping[str, Any]) -> str:
    """Describe what is cut; empty if all is kept."""
    low, high = said["keep"]
    of = "of each source" if said["within"] == "source" else "of all rows"
    parts = [f"the lowest {percent(low)} {of}"] if low > 0 else []
    parts += [f"the highest {percent(1 - high)} {of}"] if high < 1 else []
    parts += [f"all below {said['least']:g}"] if said["least"] is not None else []
    parts += [f"all above {said['most']:g}"] if said["most"] is not None else []
    return ", ".join(parts)


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
    rule = describe_cut(said)
    report.heading("Scores").text(
        f"By the {said['by']} of `{said['scorer']}`. "
        + (f"Left out: {rule}. " if rule else "Nothing is left out by them. ")
        + "The column `score` of the data set has them."
    )
    rows = [
        (name, of["rows"], of["dropped"], of["unscored"], *map(format_figure, of["quantiles"]), kept_range(of))
        for name, of in said["sources"].items() if of["rows"]
    ]  # fmt: skip
    heads = ("source", "scored", "dropped", "without", "lowest", "5 %", "median", "95 %", "highest", "kept")
    report.table(heads, rows, "Scores of each source")
    draw_scores(report, said)
    for line in seen.evidence("scores.jsonl"):
        what = PLACES.get(line["what"], f"{line['what']}, {'dropped' if line['dropped'] else 'kept'}")
        report.tokens(f"{line['row']}, score {line['score']:.3f}: {what}", [plain(line["text"])])


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
    data, metrics = seen.mapping("artifact/data.json"), seen.metrics
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
    data = seen.mapping("artifact/data.json")
    if not data:
        return
    if replaces := data.get("replaces"):
        report.text(
            f"It replaces the data set with the root {replaces['root'][:12]}, without "
            f"{counted(replaces['count'], 'row')}: {replaces['reason']}. Examples, which may show these, are not shown."
        )
    for loss in data.get("losses", ()):
        line = describe_loss(loss)
        report.text(line[0].upper() + line[1:] + ".")
    for note in iter_notes(data, seen.settings):
        report.text(note.strip()[0].upper() + note.strip()[1:] + ".")
    add_sources(report, data, seen.settings)
    draw_sources(report, data)
    add_contamination(report, data)
    add_lengths(report, data)
    add_scores(report, data, seen)
    add_cleaning(report, data)
    add_refused(report, data)
    add_clusters(report, seen)
    add_dropped(report, seen)
    add_rows(report, seen)


def add_rows(report: Report, seen: RunView) -> None:
    """Add the first rows of each source as they are trained on, with a legend."""
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


def add_sources(report: Report, data: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Add where every row went, a source a column; and the mixture."""
    sources = data["sources"]
    names = [source["name"] for source in sources]
    gone = [dict(list_losses(source)) for source in sources]
    rows: list[tuple[Any, ...]] = [("read", *map(count_read, sources))]
    rows += [(why, *(-of[why] for of in gone)) for why in gone[0] if any(of[why] for of in gone)]
    for side, what in zip(SIDES, PURPOSES, strict=True):
        rows.append((what, *(source["splits"][side]["rows"] for source in sources)))
    if any(source["splits"]["train"]["distinct"] != source["splits"]["train"]["rows"] for source in sources):
        rows.append(("different ones to train on", *(source["splits"]["train"]["distinct"] for source in sources)))
    report.heading("Where every row went")
    draw_removed(report, data)
    report.table(("rows", *names), rows, "Where every row went")
    about: list[tuple[Any, ...]] = [("licence", *(source["licence"] or "not said" for source in sources))]
    if has_shares(data, settings):
        about.append(("share asked", *(percent(source["asked"]) for source in sources)))
    about.append(("share of what is trained on", *(percent(source["got"]) for source in sources)))
    about.append(("sha256", *(source["digest"][:12] for source in sources)))
    if any(source["metadata"] for source in sources):
        about.append(("kept as metadata", *(", ".join(source["metadata"]) or "–" for source in sources)))
    if any("read_as" in source for source in sources):
        about.insert(0, ("read as", *(describe_shapes(source["read_as"]) for source in sources)))
        about.insert(1, ("columns", *(", ".join(source["read_as"]["columns"]) or "–" for source in sources)))
    report.heading("Sources and their mix").table(("source", *names), about, "Sources and their mix")


def describe_shapes(found: Mapping[str, Any]) -> str:
    """Describe the shapes of a source's first rows."""
    shapes = found["shapes"]
    told = ", ".join(shapes) if len(shapes) < 2 else ", ".join(f"{name} {n:,}" for name, n in shapes.items())
    return f"{told} (of the first {found['rows']:,} rows)" if len(shapes) > 1 else told or "–"


def add_contamination(report: Report, data: Mapping[str, Any]) -> None:
    """Add how many rows each evaluation set found, by rule."""
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


def add_refused(report: Report, data: Mapping[str, Any]) -> None:
    """Add the rows that could not be read, by cause."""
    rows = [
        (source["name"], cause["problem"], cause["count"], cause["field"])
        for source in data["sources"] for cause in source["bad_rows"]
    ]  # fmt: skip
    if rows:
        report.heading("Rows that were refused")
        report.table(("source", "why", "rows", "the first one"), rows, "Rows that were refused")


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


def add_cleaning(report: Report, data: Mapping[str, Any]) -> None:
    """Add what each cleaning step changed, dropped and counted, if it did anything."""
    rows = [
        (source["name"], step["step"], step["changed"], step["dropped"],
         ", ".join(f"{what}: {count:,}" for what, count in {**step["reasons"], **step["notes"]}.items()))
        for source in data["sources"] for step in source["clean"]
        if step["changed"] or step["dropped"] or step["notes"]
    ]  # fmt: skip
    if rows:
        report.heading("Cleaning").table(("source", "step", "changed", "dropped", "what it found"), rows, "Cleaning")


def add_clusters(report: Report, seen: RunView) -> None:
    """Add the largest clusters of duplicates: the row that stays, and some of the others."""
    found = seen.evidence("duplicates.jsonl")
    if not found:
        return
    report.heading("The largest clusters of duplicates")
    for cluster in found:
        kept = cluster["kept"]
        report.tokens(f"{counted(cluster['size'], 'row')}; {kept['row']} stays", [plain(kept["text"])])
        for other in cluster["others"]:
            report.tokens(f"{other['row']}, Jaccard {other['jaccard']:.2f}", [plain(other["text"])])


def add_dropped(report: Report, seen: RunView) -> None:
    """Add examples of what was left out, by reason."""
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
