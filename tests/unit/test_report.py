"""The report: hostile text stays text, the page is self-contained, and plots match their numbers."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.core.errors import StorageError
from align.ops.calibration import bin_predictions
from align.report import Report, format_figure
from align.report.figure_labels import describe_small_samples
from align.report.figure_text import format_duration, format_percent, format_timestamp
from align.report.page import LONGEST_TEXT, Code, Link, Part
from align.report.plots import (
    MAX_POINTS,
    average_blocks,
    collect_points,
    draw_curves,
    draw_histogram_pair,
    draw_reliability,
    format_tick_labels,
    render_figure,
    smooth_values,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(1)">"\' onload=\'x'


class Page(HTMLParser):
    """Parsed page: its tags with their attributes, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def build_full_report(text: str = "plain") -> Report:
    rows = [{"step": i, text: i * i, "kl": 1 / (i + 1)} for i in range(5)]
    figure = render_figure(draw_curves(rows, {text: text, "kl": "KL"}, text, text))
    return (
        Report(text, text)
        .verdict(text)
        .heading(text)
        .text(f"{text}\n\n- {text}\n- **{text}**\n\n`{text}`")
        .facts([(text, [text, Code(text), Link(text, "../other.html")])])
        .table([text, "n"], [[text, 3]], text)
        .add("transcript", [{"role": text, "content": text}] * 2, [{"label": text, "text": text, "reasoning": text}])
        .add("side_by_side", [{"role": text, "content": text}] * 2, [{"label": text, "text": text, "reasoning": text}])
        .add("tokens", text, [Part(text, False, False), Part(text, True, False), Part(text, True, True)])
        .plot(figure, text, text)
    )


def test_hostile_text_stays_text_in_every_block():
    page = Page(build_full_report(HOSTILE).html())
    plain_page = Page(build_full_report().html())
    assert not page.all("script")
    # Tags and attributes equal those of harmless text: no hostile text became markup.
    assert [t for t, _ in page.tags] == [t for t, _ in plain_page.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in plain_page.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.words).count(HOSTILE) >= 19
    assert [a["alt"] for a in page.all("img")] == [HOSTILE]


def test_nothing_remote_and_scripts_forbidden():
    source = build_full_report().html()
    page = Page(source)
    assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
    assert not page.all("link")
    assert "url(" not in source
    assert "@import" not in source
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_structure_one_h1_language_viewport_alt_and_dark():
    source = build_full_report().html()
    page = Page(source)
    assert len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" and "width=device-width" in (a["content"] or "") for a in page.all("meta"))
    assert all(a["alt"] for a in page.all("img"))
    assert "prefers-color-scheme: dark" in source
    with pytest.raises(ValueError, match="alt text"):
        Report("r").plot(b"<svg/>", "KL", " ")


def test_embedded_images_are_images_and_the_same_each_time():
    rows = [{"step": i, "kl": i / 3} for i in range(9)]
    svg = render_figure(draw_curves(rows, {"kl": "KL"}))
    png = render_figure(draw_curves(rows, {"kl": "KL"}), "png")
    assert svg.lstrip().startswith(b"<?xml")
    assert png.startswith(b"\x89PNG")
    assert svg == render_figure(draw_curves(rows, {"kl": "KL"}))
    assert svg != render_figure(draw_curves(rows[:5], {"kl": "KL"}))
    source = Report("r").plot(svg, "KL", "KL rising").html()
    embedded = re.search(r"data:image/svg\+xml;base64,([^\"]+)", source)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == svg


def test_write_is_atomic_and_its_failure_is_the_users(tmp_path: Path):
    path = build_full_report().write(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == build_full_report().html()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(StorageError, match="cannot be written"):
        build_full_report().write(tmp_path / "missing" / "report.html")
    # A lone surrogate has no UTF-8 form; the report is written all the same.
    Report("half \ud83d").write(path)
    assert "half &#55357;" in path.read_text(encoding="utf-8")


def test_text_marks():
    source = Report("r").text("one\ntwo **three**\n\n- `a`\n- b").html()
    assert "<p>one two <strong>three</strong></p><ul><li><code>a</code></li><li>b</li></ul>" in source


def test_few_observations_are_said_to_be_few():
    figures = {
        "win_rate": {"value": 1.0, "low": 0.7, "high": 1.0, "n": 19},
        "gold": {"difference": {"value": 0.5, "low": None, "high": None, "n": 3}},
        "enough": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20},
    }
    assert format_figure(figures["win_rate"]) == "1 [0.7, 1] (n=19, fewer than 20)"
    assert format_figure(figures["gold"]["difference"]) == "0.5 (no interval) (n=3, fewer than 20)"
    assert format_figure(figures["enough"]) == "0.5 [0.3, 0.7] (n=20)"
    sentence = "Fewer than 20 observations, too few for a reliable interval: Win rate (19), Gain in gold score (3)."
    assert describe_small_samples(figures) == sentence
    assert describe_small_samples({"enough": figures["enough"]}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"value": 0.8164, "low": 0.7654, "high": 0.866, "n": 256}, "82 % [77, 87]"),
        ({"value": 0.8164, "low": 0.811, "high": 0.822, "n": 9999}, "81.6 % [81.1, 82.2]"),
        ({"value": 1.0, "low": None, "high": None, "n": 1}, "100 %"),
        (0.8164, "81.6 %"),
        (1.0, "100 %"),
        (0, "0 %"),
    ],
)
def test_percent(value, text):
    assert format_percent(value).replace("\u00a0", " ") == text


def test_times():
    assert [format_duration(s) for s in (1, 89, 90, 720, 5400, 12_000)] == [
        "1 second",
        "89 seconds",
        "2 minutes",
        "12 minutes",
        "1 h 30 min",
        "3 h 20 min",
    ]
    assert format_timestamp("2026-11-07T04:05:06+00:00") == "7 November 2026, 04:05 UTC"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (12345.678, "12,346"),
        (0.123456, "0.1235"),
        (0.0, "0"),
        (1.5e-7, "1.5e-07"),
        (math.nan, "nan"),
        ([1, 0.5], "1, 0.5"),
        ([], "none"),
        ("text", "text"),
        ({"value": 12345.6, "low": 12000.4, "high": 13000.2, "n": 100}, "12,346 [12,000, 13,000] (n=100)"),
    ],
)
def test_format_figure(value, text):
    assert format_figure(value) == text


def test_a_row_of_tokens_is_marked_by_more_than_a_colour():
    parts = [Part("<s>", False, True), Part("Hi?", False, False), Part("Yes.", True, False), Part("</s>", True, True)]
    source = Report("r").add("tokens", "Row 1", parts).html()
    assert "<code>&lt;s&gt;</code>Hi?<mark>Yes.<code>&lt;/s&gt;</code></mark></p>" in source
    assert re.search(r"\.tokens mark \{[^}]*border-bottom", source)
    assert re.search(r'\.tokens mark::before \{ content: "\[trained: "', source)


def test_a_long_row_is_cut_in_the_middle_and_says_so():
    parts = [Part("a" * 3000, False, False), Part("<|u|>", False, True), Part("b" * 1500, True, False)]
    source = Report("r").add("tokens", "Row 1", parts).html()
    half = LONGEST_TEXT // 2
    note = "<i> … 2,505 characters are left out here … </i>"
    assert f"dir=auto>{'a' * half}{note}<mark>{'b' * half}</mark></p>" in source
    short_row = (
        Report("r").add("tokens", "Row 1", [Part("a" * half, False, False), Part("b" * half, True, False)]).html()
    )
    assert f"dir=auto>{'a' * half}<mark>{'b' * half}</mark></p>" in short_row
    long_row = Report("r").add("tokens", "Row 1", [Part("c" * 2001, True, False)]).html()
    assert long_row.count("1 characters are left out") == 1
    assert long_row.count("c" * half) == 2


def test_table_sets_figures_right_and_checks_its_rows():
    page = Page(Report("r").table(["name", "n"], [["a", 3], ["b", None]], "t").html())
    assert [a.get("class") for a in page.all("td")] == [None, "number", None, "number"]
    assert [a.get("class") for a in page.all("th")] == [None, "number"]
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        Report("r").table(["a", "b"], [["x"]], "t")


def test_curves_pass_over_missing_and_leave_gaps():
    rows = [{"step": 0, "kl": 1.0}, {"step": 1}, {"step": 2, "kl": math.inf}, {"step": 3, "kl": 4}]
    (line,) = draw_curves(rows, {"kl": "KL"}).axes[0].lines
    assert list(line.get_xdata()) == [0, 2, 3]
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, False]
    assert list(line.get_ydata())[-1] == 4


def find_ticks(axis) -> list[float]:
    low, high = sorted(axis.get_view_interval())
    return [t for t in axis.get_ticklocs() if low <= t <= high]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 1000])
def test_steps_are_whole_and_noise_looks_like_noise(steps: int):
    rows = [{"step": i + 1, "kl": 5 + 0.001 * (-1) ** i} for i in range(steps)]
    ax = draw_curves(rows, {"kl": "KL"}, span=2.0).axes[0]
    ticks = find_ticks(ax.xaxis)
    assert ticks
    assert all(t == int(t) for t in ticks)
    assert len(ticks) <= 8
    low, high = ax.get_ylim()
    assert high - low >= 2.0
    assert ax.get_xlim()[1] - ax.get_xlim()[0] <= 1.1 * steps


def test_an_axis_does_not_go_where_the_figure_cannot():
    rows = [{"step": 1, "share": 0.99}, {"step": 2, "share": 1.0}]
    low, high = draw_curves(rows, {"share": "ended"}, span=0.5, within=(0.0, 1.0)).axes[0].get_ylim()
    assert low < 0.8
    assert high < 1.1


def test_short_lines_have_marks_and_long_ones_a_running_mean():
    short = draw_curves([{"step": i, "kl": i} for i in range(5)], {"kl": "KL"}).axes[0].lines
    assert [line.get_marker() for line in short] == ["o"]
    rows = [{"step": i, "kl": float(i % 2)} for i in range(100)]
    raw, mean = draw_curves(rows, {"kl": "KL"}).axes[0].lines
    assert raw.get_alpha() < 0.5
    assert list(raw.get_ydata()) == [float(i % 2) for i in range(100)]
    assert max(mean.get_ydata()[10:-10]) < 0.6
    assert smooth_values([1.0] * 30 + [2.0] * 30)[::59] == [1.0, 2.0]


def test_a_long_run_is_drawn_with_few_points():
    rows = [{"step": i + 1, "kl": float(i % 10)} for i in range(20_000)]
    raw, mean = draw_curves(rows, {"kl": "KL"}).axes[0].lines
    assert len(raw.get_xdata()) == len(mean.get_xdata()) <= MAX_POINTS
    assert raw.get_xdata()[-1] == 20_000
    assert set(map(round, mean.get_ydata())) <= {4, 5}
    assert average_blocks([(1, 2.0), (2, 4.0)]) == [(1, 2.0), (2, 4.0)]
    assert average_blocks([]) == []


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 8e-5, 0.00016], ["0", "8e-5", "1.6e-4"]),
        ([0.0, 0.0005, 0.001], ["0", "0.0005", "0.001"]),
        ([-1.5, 1e-17, 1.5], ["−1.5", "0", "1.5"]),
        ([500.0, 1200.0], ["500", "1,200"]),
        ([0.0, 1e30], ["0", "1e30"]),
        ([], []),
        ([0.0], ["0"]),
    ],
)
def test_numbers_at_an_axis_are_in_one_notation(values: list[float], texts: list[str]):
    assert format_tick_labels(values) == texts


def test_an_axis_of_rates_is_in_one_notation():
    ax = draw_curves([{"step": i, "lr": 0.0002 * (1 - i / 9)} for i in range(10)], {"lr": "rate"}, smooth=False).axes[0]
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) > 3
    assert all("e-" in text for text in labels if text != "0")


def test_marks_beside_a_line():
    rows = [{"step": i, "loss": 4.0} for i in range(1, 9)]
    ax = draw_curves(rows, {"loss": "training"}, marks=[(0, 5.0), (8, 4.5)], marks_label="held out").axes[0]
    assert [list(line.get_xdata()) for line in ax.lines][1] == [0, 8]
    assert ax.get_ylim()[1] > 5
    assert [t.get_text() for t in ax.figure.legends[0].get_texts()] == ["training", "held out"]
    assert collect_points(rows, "loss")[0] == (1, 4.0)


def test_a_dollar_in_a_label_is_a_dollar():
    """The label is invalid as mathematics, and matplotlib would fail to draw it."""
    label = r"$\frac{$ cost"
    rows = [{"step": 1, label: 1, "a$b$": 2}]
    figures = (
        draw_curves(rows, {label: label, "a$b$": "a$b$"}, label, label, label),
        draw_histogram_pair([1.0], [2.0], (label, "x"), label, label),
    )
    assert all(render_figure(figure).rstrip().endswith(b"</svg>") for figure in figures)


def test_bins_of_integers_hold_the_same_number_of_them():
    """24 equal bins over 2 to 24 would leave empty stripes."""
    first = list(range(2, 25))
    second = [2, 2, 24]
    figure = draw_histogram_pair(first, second, ("a", "b"), "tokens")
    heights = [p.get_height() for p in figure.axes[0].patches][:23]
    assert heights == pytest.approx([1 / 23] * 23)
    wide_bars = draw_histogram_pair(list(range(100)), [0], ("a", "b"), "tokens").axes[0].patches[:20]
    assert [p.get_height() for p in wide_bars] == pytest.approx([0.05] * 20)


def test_plots_draw_their_numbers():
    bins = bin_predictions([0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1], bin_count=2)
    ax = draw_reliability(bins).axes[0]
    assert [t.get_text() for t in ax.texts] == ["2", "2"]
    assert [list(line.get_ydata()) for line in ax.lines][1] == [0.5, 1.0]
    render_figure(ax.figure)

    ax = draw_histogram_pair([0.0, 1.0], [1.0, 1.0, 1.0, math.nan], ("ref", "policy"), "gold").axes[0]
    heights = [patch.get_height() for patch in ax.patches]
    assert sum(heights[:24]) == pytest.approx(1)
    assert heights[0] == heights[23] == 0.5
    assert heights[47] == pytest.approx(1)
    render_figure(draw_histogram_pair([], [], ("a", "b"), "x"))
    render_figure(draw_histogram_pair([2.0], [2.0], ("a", "b"), "x"))


def test_intervals_are_put_into_words_in_one_place():
    """Only the listed modules format the ends of an interval, so that intervals of few observations are marked."""
    root = Path(__file__).resolve().parents[2]
    sources = [p for folder in ("align", "annotate", "recipes") for p in (root / folder).rglob("*.py")]
    modules = {
        str(p.relative_to(root)) for p in sources if re.search(r"\{\w*\[?[\"']?low[\"']?\]?:", p.read_text("utf-8"))
    }
    # Each of these modules marks intervals of few observations.
    assert modules == {
        "align/report/figure_text.py",
        "annotate/web/dashboard.py",
        "recipes/check.py",
    }
