"""The report: inert whatever a model wrote, self-contained, and its plots say what the numbers say."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.errors import StorageError
from align.ops.calibration import calibration_bins
from align.report import (
    Report,
    bars,
    curves,
    format_figure,
    histogram_pair,
    reliability,
    render,
    too_few,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(1)">"\' onload=\'x'


class Page(HTMLParser):
    """Every tag with its attributes, and the text between."""

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


def full_report(text: str = "plain") -> Report:
    rows = [{"step": i, text: i * i, "kl": 1 / (i + 1)} for i in range(5)]
    return (
        Report(text, text)
        .heading(text)
        .text(f"{text}\n\n- {text}\n- **{text}**\n\n`{text}`")
        .figures_table({text: text, "kl": 1.5}, text)
        .table([text, "n"], [[text, 3]], text)
        .transcript([(text, text)], text)
        .plot(curves(rows, [text, "kl"], title=text), text, text)
    )


def test_hostile_text_stays_text_in_every_block():
    page, plain = Page(full_report(HOSTILE).html()), Page(full_report().html())
    assert not page.all("script")
    # The tags are those of harmless text, and none grew an attribute: nothing of the hostile text became markup.
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.words).count(HOSTILE) >= 11
    assert [a["alt"] for a in page.all("img")] == [HOSTILE]


def test_nothing_remote_and_scripts_forbidden():
    source = full_report().html()
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
    source = full_report().html()
    page = Page(source)
    assert len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" and "width=device-width" in (a["content"] or "") for a in page.all("meta"))
    assert all(a["alt"] for a in page.all("img"))
    assert "prefers-color-scheme: dark" in source
    with pytest.raises(ValueError, match="alt text"):
        Report("r").plot(curves([], ["kl"]), "KL", " ")


def test_embedded_images_are_images_and_the_same_each_time():
    rows = [{"step": i, "kl": i / 3} for i in range(9)]
    svg, png = render(curves(rows, ["kl"])), render(curves(rows, ["kl"]), "png")
    assert svg.lstrip().startswith(b"<?xml")
    assert png.startswith(b"\x89PNG")
    assert svg == render(curves(rows, ["kl"]))
    assert svg != render(curves(rows[:5], ["kl"]))
    source = Report("r").plot(curves(rows, ["kl"]), "KL", "KL rising").html()
    embedded = re.search(r"data:image/svg\+xml;base64,([^\"]+)", source)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == svg


def test_write_is_atomic_and_its_failure_is_the_users(tmp_path: Path):
    path = full_report().write(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == full_report().html()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(StorageError, match="cannot be written"):
        full_report().write(tmp_path / "missing" / "report.html")
    # A lone surrogate has no UTF-8 form; the report is written all the same.
    Report("half \ud83d").write(path)
    assert "half &#55357;" in path.read_text(encoding="utf-8")


def test_text_marks():
    source = Report("r").text("one\ntwo **three**\n\n- `a`\n- b").html()
    assert "<p>one two <strong>three</strong></p><ul><li><code>a</code></li><li>b</li></ul>" in source


def test_figures_are_flattened_and_formatted():
    source = Report("r").figures_table(
        {"win_rate": {"value": 0.625, "low": 0.5, "high": 0.75, "n": 1200}, "length": {"ref": 3}}
    )
    words = Page(source.html()).words
    assert words[words.index("win rate") + 1] == "0.625 [0.5, 0.75] (n=1,200)"
    assert words[words.index("length ref") + 1] == "3"


def test_few_observations_are_said_to_be_few():
    figures = {
        "win_rate": {"value": 1.0, "low": 0.7, "high": 1.0, "n": 19},
        "gold": {"difference": {"value": 0.5, "low": None, "high": None, "n": 3}},
        "enough": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20},
    }
    words = Page(Report("r").figures_table(figures).html()).words
    assert words[words.index("win rate") + 1] == "1 [0.7, 1] (n=19, fewer than 20)"
    assert words[words.index("gold difference") + 1] == "0.5 (no interval) (n=3, fewer than 20)"
    assert words[words.index("enough") + 1] == "0.5 [0.3, 0.7] (n=20)"
    assert "Fewer than 20 observations, so that the interval says little: win rate (19), gold difference (3)." in words
    assert too_few({"enough": figures["enough"]}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (12345.678, "12,346"),
        (0.123456, "0.1235"),
        (0.0, "0"),
        (1.5e-7, "1.5e-07"),
        (math.nan, "nan"),
        ([1, 0.5], "1, 0.5"),
        ("text", "text"),
        ({"value": 12345.6, "low": 12000.4, "high": 13000.2, "n": 100}, "12,346 [12,000, 13,000] (n=100)"),
    ],
)
def test_format_figure(value, text):
    assert format_figure(value) == text


def test_table_sets_figures_right_and_checks_its_rows():
    page = Page(Report("r").table(["name", "n"], [["a", 3], ["b", None]]).html())
    assert [a.get("class") for a in page.all("td")] == [None, "number", None, "number"]
    assert [a.get("class") for a in page.all("th")] == [None, "number"]
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        Report("r").table(["a", "b"], [["x"]])


def test_curves_pass_over_missing_and_leave_gaps():
    rows = [{"step": 0, "kl": 1.0}, {"step": 1}, {"step": 2, "kl": math.inf}, {"step": 3, "kl": 4}]
    (line,) = curves(rows, ["kl"]).axes[0].lines
    assert list(line.get_xdata()) == [0, 2, 3]
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, False]
    assert list(line.get_ydata())[-1] == 4


def test_a_dollar_in_a_label_is_a_dollar():
    """Read as mathematics, this one would not even be drawn."""
    odd = r"$\frac{$ cost"
    rows = [{odd: 1, "a$b$": 2}]
    figures = (
        curves(rows, [odd, "a$b$"], x=odd, title=odd), bars({odd: {"value": 1.0}}, ylabel=odd, title=odd),
        histogram_pair([1.0], [2.0], (odd, "x"), odd, odd),
    )  # fmt: skip
    assert all(render(figure).rstrip().endswith(b"</svg>") for figure in figures)


def test_bins_of_integers_hold_the_same_number_of_them():
    """24 equal bins over 2 to 24 would leave empty stripes."""
    first, second = list(range(2, 25)), [2, 2, 24]
    figure = histogram_pair(first, second, ("a", "b"), "tokens")
    heights = [p.get_height() for p in figure.axes[0].patches][:23]
    assert heights == pytest.approx([1 / 23] * 23)
    wide = histogram_pair(list(range(100)), [0], ("a", "b"), "tokens").axes[0].patches[:20]
    assert [p.get_height() for p in wide] == pytest.approx([0.05] * 20)


def test_plots_draw_their_numbers():
    bins = calibration_bins([0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1], bins=2)
    ax = reliability(bins).axes[0]
    assert [t.get_text() for t in ax.texts] == ["2", "2"]
    assert [list(line.get_ydata()) for line in ax.lines][1] == [0.5, 1.0]
    render(ax.figure)

    ax = histogram_pair([0.0, 1.0], [1.0, 1.0, 1.0, math.nan], ("ref", "policy"), "gold").axes[0]
    heights = [patch.get_height() for patch in ax.patches]
    assert sum(heights[:24]) == pytest.approx(1)
    assert heights[0] == heights[23] == 0.5
    assert heights[47] == pytest.approx(1)
    render(histogram_pair([], [], ("a", "b"), "x"))
    render(histogram_pair([2.0], [2.0], ("a", "b"), "x"))

    ax = bars({"a": {"value": 0.6, "low": 0.5, "high": 0.8}}, baseline=0.5).axes[0]
    assert ax.patches[0].get_height() == 0.6
    (whisker,) = ax.collections[0].get_segments()
    assert [tuple(p) for p in whisker] == [(0, pytest.approx(0.5)), (0, pytest.approx(0.8))]


def test_intervals_are_put_into_words_in_one_place():
    """Who writes out the ends of one may forget to say that few observations are behind it."""
    root = Path(__file__).resolve().parents[2]
    sources = [p for folder in ("align", "annotate", "recipes") for p in (root / folder).rglob("*.py")]
    wrote = {
        str(p.relative_to(root)) for p in sources if re.search(r"\{\w*\[?[\"']?low[\"']?\]?:", p.read_text("utf-8"))
    }
    assert wrote == {"align/report.py", "annotate/web/dashboard.py", "recipes/check.py"}  # all of which say it
