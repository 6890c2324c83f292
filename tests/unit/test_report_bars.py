"""Bars of a report, read back from their SVG."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from align.report.bars import compute_axis_ticks, draw_horizontal_bars, draw_vertical_bars
from align.report.plots import MAX_NAME_LENGTH

SVG = "{http://www.w3.org/2000/svg}"


def read_bars(picture: bytes, part: int) -> list[tuple[float, float, float, float]]:
    """Return x, y, width and height of each rectangle of a part, without that of the legend."""
    rectangles = ElementTree.fromstring(picture).iter(f"{SVG}rect")
    bars = [bar for bar in rectangles if bar.get("fill") == f"url(#part{part})" and bar.get("height") != "10.0"]
    return [tuple(float(bar.attrib[name]) for name in ("x", "y", "width", "height")) for bar in bars]  # pyright: ignore


def read_words(picture: bytes) -> list[str]:
    return [words.text or "" for words in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_lying_bars_are_as_long_as_their_sizes_and_stand_behind_each_other():
    picture = draw_horizontal_bars(
        ["length", "copies"], {"a": [100, 40], "b": [50, 0]}, "rows", "What each step removed"
    )
    first = read_bars(picture, 0)
    second = read_bars(picture, 1)
    assert [round(bar[2] / first[0][2], 2) for bar in (*first, *second)] == [1, 0.4, 0.5]
    assert second[0][0] == pytest.approx(first[0][0] + first[0][2], abs=0.2)
    assert second[0][1] == first[0][1] < first[1][1]
    assert {"length", "copies", "a", "b", "rows", "What each step removed", "0", "150"} <= {*read_words(picture)}


def test_upright_bars_stand_on_one_line_and_on_each_other():
    picture = draw_vertical_bars(
        ["0", "32", "64"], {"a": [10, 30], "b": [10, 15]}, "characters", "rows", "t", cuts=[0.5]
    )
    first = read_bars(picture, 0)
    second = read_bars(picture, 1)
    assert [round(bar[3] / first[1][3], 2) for bar in (*first, *second)] == [0.33, 1, 0.33, 0.5]
    assert first[0][1] + first[0][3] == pytest.approx(first[1][1] + first[1][3], abs=0.2)
    assert second[1][1] + second[1][3] == pytest.approx(first[1][1], abs=0.2)
    assert first[1][0] == pytest.approx(first[0][0] + first[0][2], abs=0.2)
    lines = [line.attrib for line in ElementTree.fromstring(picture).iter(f"{SVG}path")]
    cut = next(line["d"] for line in lines if "stroke-dasharray" in line)
    assert float(cut[1:].split()[0]) == pytest.approx(first[0][0] + first[0][2] / 2, abs=0.2)


def test_names_are_text_whatever_stands_in_them():
    name = "</text><script>\0 " + "x" * MAX_NAME_LENGTH
    words = read_words(draw_horizontal_bars([name], {name: [1], "b": [0]}, "rows", "t"))
    assert sum(word.startswith("</text><script>� x") and word.endswith("…") for word in words) == 2


@pytest.mark.parametrize("largest", [0, 1, 3, 5, 7, 99, 100, 101, 4_999, 123_456_789])
def test_an_axis_begins_with_0_reaches_the_largest_bar_and_has_few_whole_steps(largest: int):
    steps = compute_axis_ticks({"a": [0, largest]})
    assert steps[0] == 0
    assert steps[-1] >= largest
    assert len(steps) <= 6
    assert len({round(after - before, 6) for before, after in pairwise(steps)}) == 1
    assert all(step.is_integer() for step in steps)
