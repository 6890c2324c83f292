"""A run's `report.html`: one self-contained file, readable anywhere, safe to open.

A report is built from blocks, each a method that returns the report, so that a stage reads as a list of what it shows:

    Report("PPO", "pocket-qlora-1a2b3c4d").figures_table(metrics).plot(curves(rows, ["kl"]), "KL", alt).write(path)

Model text is untrusted: every string is escaped, images are embedded, and a content security policy forbids scripts and
anything remote, so an answer that contains `<script>` is shown and never run. No torch in here.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.errors import StorageError
from align.ops.calibration import Bin
from align.ops.intervals import FEW

# Okabe and Ito's palette, distinguishable without red-green vision; line styles repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#333333", "#d9d9d9"

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d1f23; --paper: #ffffff; --faint: #5c6370; --line: #d9dce1; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --paper: #16181c; --faint: #a2a8b4; --line: #363a43; --card: #1f2228; }
  .plot img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.25rem 1rem 3rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 1.25rem 0 0; font-size: 1.2rem; }
main { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
main > * { flex: 1 1 100%; min-width: 0; margin: 0; }
main > .plot { flex: 1 1 24rem; max-width: 40rem; }
header p, caption, figcaption, dt { color: var(--faint); font-size: 0.9rem; }
header p { margin: 0.25rem 0 0; }
p { margin: 0 0 0.6rem; } ul { margin: 0 0 0.6rem; padding-left: 1.25rem; }
code { font: 0.9em ui-monospace, monospace; background: var(--card); padding: 0.1em 0.3em; border-radius: 3px; }
.plot img { display: block; width: 100%; height: auto; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: pre-wrap; min-width: 5rem; }
thead th { color: var(--faint); font-weight: 600; font-size: 0.9rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.transcript dl { margin: 0.3rem 0 0; padding: 0.75rem 1rem; background: var(--card); border-radius: 6px; }
dd { margin: 0 0 0.6rem; white-space: pre-wrap; } dd:last-child { margin-bottom: 0; }
""".strip()

# Nothing may run and nothing may be fetched, whatever a model wrote.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Report:
    """An HTML page that grows block by block.

    Args:
        title: the page's one `h1`.
        subtitle: a line under it, such as the run's name.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._blocks: list[str] = []

    def heading(self, text: str) -> Report:
        """A second-level heading over what follows."""
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, markdown: str) -> Report:
        """Paragraphs parted by blank lines; `- ` makes a list; `**bold**` and backticks work, nothing else does."""
        return self._add(f"<div>{''.join(_paragraphs(markdown))}</div>")

    def figures_table(self, figures: Mapping[str, Any], caption: str = "") -> Report:
        """Name and value, one figure a row; nested mappings are flattened, `{value, low, high}` becomes an interval;
        below the table it says which of these have few observations."""
        self.table(("figure", "value"), list(_flatten(figures)), caption)
        warning = too_few(figures)
        return self.text(f"{warning[0].upper()}{warning[1:]}.") if warning else self

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Report:
        """A table that scrolls inside itself on a narrow screen.

        Args:
            headers: one a column.
            rows: cells; text stands left and keeps its line breaks, anything else is a figure, formatted and set right.

        Raises:
            ValueError: a row has more or fewer cells than there are headers.
        """
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers")

        def cell(tag: str, value: Any, figure: bool) -> str:
            text = escape(value if isinstance(value, str) else format_figure(value))
            return f"<{tag} class=number>{text}</{tag[:2]}>" if figure else f"<{tag}>{text}</{tag[:2]}>"

        figures = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]
        head = "".join(cell("th scope=col", h, figures[i]) for i, h in enumerate(headers))
        body = "".join(f"<tr>{''.join(cell('td', v, not isinstance(v, str)) for v in row)}</tr>" for row in rows)
        label = f"<caption>{escape(caption)}</caption>" if caption else ""
        # A region that scrolls must be reachable by keyboard, hence the tabindex.
        return self._add(
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption or "table")}">'
            f"<table>{label}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def plot(self, figure: Figure, caption: str, alt: str, format: Literal["svg", "png"] = "svg") -> Report:
        """A figure embedded in the page; neighbours stand side by side where there is room.

        Args:
            alt: what the plot shows, for whoever cannot see it; must not be empty.
        """
        if not alt.strip():
            raise ValueError(f"the plot {caption!r} has no alt text")
        data = base64.b64encode(render(figure, format)).decode("ascii")
        source = f"data:image/{'svg+xml' if format == 'svg' else 'png'};base64,{data}"
        label = f"<figcaption>{escape(caption)}</figcaption>"
        return self._add(f'<figure class="plot"><img alt="{escape(alt)}" src="{source}">{label}</figure>')

    def transcript(self, turns: Sequence[tuple[str, str]], caption: str = "") -> Report:
        """A conversation: (who, what) a turn, line breaks kept."""
        body = "".join(f"<dt>{escape(who)}</dt><dd>{escape(what)}</dd>" for who, what in turns)
        label = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return self._add(f'<figure class="transcript">{label}<dl>{body}</dl></figure>')

    def html(self) -> str:
        """The whole page."""
        subtitle = f"<p>{escape(self.subtitle)}</p>" if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}</header>\n<main>\n"
            + "\n".join(self._blocks)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page at once: a reader sees the old file or the new one, never a half.

        Raises:
            StorageError: the folder is missing or cannot be written, or the disk is full.
        """
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            # Lone surrogates, which a broken tokenizer can emit, have no UTF-8 form: they become references.
            part.write_bytes(self.html().encode("utf-8", "xmlcharrefreplace"))
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise StorageError(
                "report", str(path), f"cannot be written ({error.strerror})", "Free space or choose another run.root."
            ) from error
        return path

    def _add(self, block: str) -> Report:
        self._blocks.append(block)
        return self


def escape(text: Any) -> str:
    """Text made inert inside an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def format_figure(value: Any) -> str:
    """A figure as a person reads it: four significant digits, thousands parted, an interval as `0.62 [0.55, 0.69]`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    if _is_interval(value):
        count = f" (n={value['n']:,}{few(value['n'])})" if "n" in value else ""
        large = 1e3 <= abs(value["value"]) < 1e9
        return f"{in_words(value, ',.0f' if large else '.4g')}{count}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_figure(v) for v in value)
    return str(value)


def in_words(figure: Mapping[str, Any], digits: str = ".3f") -> str:
    """`0.812 [0.760, 0.856]` of `{value, low, high}`; an interval may be missing."""
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:{digits}} (no interval)"
    return f"{figure['value']:{digits}} [{figure['low']:{digits}}, {figure['high']:{digits}}]"


def few(n: int) -> str:
    """What stands behind a number of observations that is too small for its interval to say much."""
    return f", fewer than {FEW}" if n < FEW else ""


def too_few(figures: Mapping[str, Any]) -> str:
    """A sentence that names the figures with few observations behind them; empty where there are none."""
    found = [f"{name} ({v['n']})" for name, v in _flatten(figures) if _is_interval(v) and v.get("n", FEW) < FEW]
    return f"fewer than {FEW} observations, so that the interval says little: {', '.join(found)}" if found else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and not _is_interval(value):
            yield from _flatten(value, f"{label} ")
        else:
            yield label, value


def _paragraphs(markdown: str) -> Iterator[str]:
    """Escape first, then mark up: the marks are ours, whatever stands between them stays inert."""

    def inline(text: str) -> str:
        coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", coded)

    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("- ") for line in lines):
            yield f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>"
        else:
            yield f"<p>{inline(' '.join(lines))}</p>"


# Plots: Figure objects only, since pyplot keeps global state, which threads and tests would share.


def render(figure: Figure, format: Literal["svg", "png"] = "svg") -> bytes:
    """The figure's bytes, the same for the same figure: no date, and ids from a fixed salt."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=format, dpi=160, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def axes(xlabel: str, ylabel: str, title: str = "") -> tuple[Figure, Axes]:
    """An empty plot in the house style: small enough that its text is legible 390 px wide."""
    figure = Figure(figsize=(4.8, 3.0), layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=INK, length=0)
    # A `$` in a label is a dollar: parsed as mathematics, an odd name would raise or come out in italics.
    ax.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    ax.set_xlabel(xlabel, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(ylabel, fontsize=9, color=INK, parse_math=False)
    return figure, ax


def curves(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], x: str = "step", title: str = "") -> Figure:
    """Lines of `keys` over `x`, from the objects of a `metrics.jsonl`.

    Rows that lack a key (a figure not logged every step) are passed over; values that are not finite leave a gap.
    """
    figure, ax = axes(x, keys[0] if len(keys) == 1 else "", title)
    for i, key in enumerate(keys):
        points = [(row[x], row[key]) for row in rows if _is_number(row.get(x)) and _is_number(row.get(key))]
        xs, ys = [p[0] for p in points], [p[1] if math.isfinite(p[1]) else math.nan for p in points]
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)], "linewidth": 1.6}
        ax.plot(xs, ys, marker="o" if len(points) == 1 else "", label=key, **look)
    if len(keys) > 1:
        _legend(ax)
    return figure


def reliability(bins: Sequence[Bin], title: str = "") -> Figure:
    """Predicted against observed share with 95 % intervals, the diagonal of perfect calibration, and counts."""
    figure, ax = axes("predicted P(win)", "observed share", title)
    ax.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1.2)
    shares = [b.observed for b in bins]
    spread = [[b.observed - b.low for b in bins], [b.high - b.observed for b in bins]]
    ax.errorbar([b.predicted for b in bins], shares, yerr=spread, fmt="o-", color=COLOURS[0], markersize=4, capsize=2.5)
    for b in bins:
        place = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center"}
        ax.annotate(str(b.count), (b.predicted, b.low), fontsize=7, color=INK, **place)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.12, 1.05)  # room for the counts under the lowest interval
    return figure


def histogram_pair(
    first: Sequence[float], second: Sequence[float], labels: tuple[str, str], xlabel: str, title: str = ""
) -> Figure:
    """Two samples over the same bins, as shares, so that samples of different size compare."""
    figure, ax = axes(xlabel, "share", title)
    samples = [[float(v) for v in sample if math.isfinite(v)] for sample in (first, second)]
    pooled = samples[0] + samples[1]
    if pooled:
        low, width = min(pooled), (max(pooled) - min(pooled) or 1.0) / 24
        if width > 1 / 24 and all(v.is_integer() for v in pooled):  # unequal numbers of integers would show stripes
            low, width = low - 0.5, math.ceil((max(pooled) - low + 1) / 24)
        edges = [low + width * i for i in range(25)]
        for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
            weights = [1 / len(sample)] * len(sample) if sample else None
            ax.hist(sample, edges, weights=weights, color=COLOURS[i], alpha=0.55, label=label)
        _legend(ax)
    return figure


def bars(
    figures: Mapping[str, Mapping[str, float]], ylabel: str = "", baseline: float | None = None, title: str = ""
) -> Figure:
    """One bar a name with whiskers from `{value, low, high}`, and a dashed line at `baseline` (½ for a win rate)."""
    figure, ax = axes("", ylabel, title)
    places, values = range(len(figures)), [f["value"] for f in figures.values()]
    whiskers = [
        [max(0.0, f["value"] - f.get("low", f["value"])) for f in figures.values()],
        [max(0.0, f.get("high", f["value"]) - f["value"]) for f in figures.values()],
    ]
    ax.bar(places, values, yerr=whiskers, color=COLOURS[0], alpha=0.85, width=0.6, capsize=3, ecolor=INK)
    ax.set_xticks(places, list(figures), parse_math=False)
    if baseline is not None:
        ax.axhline(baseline, color=INK, linestyle="--", linewidth=1)
    return figure


def _legend(ax: Axes) -> None:
    legend = ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
