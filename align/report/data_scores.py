"""The scores of a data set's rows: how they lie, where they were cut, and rows that show what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.report.bars import upright_bars
from align.report.page import Part, Report
from align.report.seen import Seen
from align.report.words import counted, format_figure, percent

DRAWN = 6
"""Sources whose scores are drawn."""
UNITS = {"loss": "loss, nats a token", "reward": "score"}
PLACES = {
    "dropped below the cut": "dropped, just below the lower cut",
    "kept above the cut": "kept, just above the lower cut", "kept below the cut": "kept, just below the upper cut",
    "dropped above the cut": "dropped, just above the upper cut",
}  # fmt: skip


def rule_of(said: Mapping[str, Any]) -> str:
    """What is kept, in words; empty where all is."""
    low, high = said["keep"]
    of = "of each source" if said["within"] == "source" else "of all rows"
    parts = [f"the lowest {percent(low)} {of}"] if low > 0 else []
    parts += [f"the highest {percent(1 - high)} {of}"] if high < 1 else []
    parts += [f"all below {said['least']:g}"] if said["least"] is not None else []
    parts += [f"all above {said['most']:g}"] if said["most"] is not None else []
    return ", ".join(parts)


def note_of(data: Mapping[str, Any]) -> str:
    """What somebody has to know of rows without a score; empty where there are none."""
    count = sum(of["unscored"] for of in data.get("scores", {}).get("sources", {}).values())
    what = "without a score, for nothing in it is to be scored, or it is longer than the model's context: kept"
    return f"{counted(count, 'row')} {what}" if count else ""


def scores_shown(report: Report, data: Mapping[str, Any], seen: Seen) -> None:
    """The scores, where there are any."""
    said = data.get("scores")
    if not said:
        return
    rule = rule_of(said)
    report.heading("Scores").text(
        f"By the {said['by']} of `{said['scorer']}`. "
        + (f"Left out: {rule}. " if rule else "Nothing is left out by them. ")
        + "The column `score` of the data set has them."
    )
    rows = [
        (name, of["rows"], of["dropped"], of["unscored"], *map(format_figure, of["quantiles"]), kept_of(of))
        for name, of in said["sources"].items() if of["rows"]
    ]  # fmt: skip
    heads = ("source", "scored", "dropped", "without", "lowest", "5 %", "median", "95 %", "highest", "kept")
    report.table(heads, rows, "Scores of each source")
    drawn(report, said)
    for line in seen.evidence("scores.jsonl"):
        what = PLACES.get(line["what"], f"{line['what']}, {'dropped' if line['dropped'] else 'kept'}")
        report.tokens(
            f"{line['row']}, score {line['score']:.3f}: {what}", [Part(line["text"], trained=False, special=False)]
        )


def kept_of(of: Mapping[str, Any]) -> str:
    """From where to where the kept scores are."""
    ends = (of["kept_from"], of["kept_to"])
    return "none" if None in ends else " to ".join(map(format_figure, ends))


def drawn(report: Report, said: Mapping[str, Any]) -> None:
    """A histogram of each of the first sources."""
    edges, found = said["edges"], [one for one in said["sources"].items() if one[1]["rows"]]
    for name, of in found[:DRAWN]:
        lowest, _, middle, _, highest = of["quantiles"]
        cuts = [of[end] for end, limit in (("kept_from", lowest), ("kept_to", highest)) if of[end] not in (None, limit)]
        where = f" Dashed: {' and '.join(map(format_figure, cuts))}, where it is cut." if cuts else ""
        beyond = f"The outer bars hold what lies beyond {format_figure(edges[0])} and {format_figure(edges[-1])} too."
        ends = f"from {format_figure(lowest)} to {format_figure(highest)}, half of them below {format_figure(middle)}"
        alt = (
            f"Histogram of the scores of {name}: {of['rows']:,} rows {ends}; {of['dropped']:,} are dropped, and "
            f"what lies from {kept_of(of)} is kept."
        )
        parts = {"kept": of["kept"], "dropped": of["left_out"]} if any(of["left_out"]) else {"kept": of["kept"]}
        places = [(cut - edges[0]) / (edges[1] - edges[0]) for cut in cuts]
        picture = upright_bars([*map(format_figure, edges)], parts, UNITS[said["by"]], "rows", name, places)
        report.plot(picture, f"Scores of {name}.{where} {beyond}", alt)
    if len(found) > DRAWN:
        report.text(f"Drawn are the first {DRAWN} of {len(found)} sources.")
