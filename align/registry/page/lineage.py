"""A run's ancestors and descendants, drawn: what it was made from on its left, what was made from it on its right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from align.registry.index import Index
from align.registry.page.templating import render
from align.registry.trace import STALE, Node, facts_of
from align.report.figure_text import counted

WIDE, TALL, ACROSS, DOWN = 172, 50, 44, 12
"""Of a box, and between boxes, in pixels."""
MOST = 60
"""Boxes of a picture; the tree of `stage.action=trace` has all."""
SWEEPS = 4
"""How often the boxes of a column are put in the order of those that they lead to."""
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Box:
    """One thing of the picture.

    Attributes:
        tells: words below its name.
        whole: False where it is gone, or known not to be what it was.
        stale: it learned from what was forgotten since.
    """

    kind: str
    name: str
    tells: str = ""
    whole: bool = True
    stale: bool = False


@dataclass(slots=True)
class Lineage:
    """Boxes, and (what it was made from, what was made) for each line between them.

    Attributes:
        later: the boxes that were made from the run itself.
        left_out: how many boxes a picture has no room for.
    """

    focus: Key
    boxes: dict[Key, Box] = field(default_factory=dict)
    lines: list[tuple[Key, Key]] = field(default_factory=list)
    later: set[Key] = field(default_factory=set)
    left_out: int = 0

    def add(self, key: Key, box: Box) -> bool:
        """Whether it is in the picture, now or before."""
        if key not in self.boxes and len(self.boxes) >= MOST:
            self.left_out += 1
            return False
        self.boxes.setdefault(key, box)
        return True


def lineage_of(index: Index, tree: Node) -> Lineage:
    """What the picture shows.

    Args:
        tree: of the run, see `align.registry.trace`.
    """
    found = Lineage(key_of(tree))
    add_sources(found, tree, frozenset())
    add_descendants(found, index)
    found.lines = [line for line in found.lines if line[0][0] != "base" or not by_another_way(found.lines, *line)]
    return found


def by_another_way(lines: Sequence[tuple[Key, Key]], source: Key, target: Key) -> bool:
    """Whether one box leads to another over a third: every run is on a base, most of them on that of their parents."""
    reached, left = set[Key](), [to for start, to in lines if start == source and to != target]
    while left:
        key = left.pop()
        if key not in reached:
            reached.add(key)
            left += [to for start, to in lines if start == key]
    return target in reached


def key_of(node: Node) -> Key:
    """A run by its name, whatever digest it was read by; anything else by both."""
    return node.kind, node.name, "" if node.kind == "run" else node.digest


def add_sources(found: Lineage, node: Node, path: frozenset[Key]) -> bool:
    """A node and all that it came from. Whether there was room for it."""
    key = key_of(node)
    if not found.add(key, Box(node.kind, node.name, tells(node.facts), node.whole, is_stale(node.facts))):
        return False
    for _, source in node.sources:
        other = key_of(source)
        circle = other in path or other == key  # which only a manifest that was written by hand has
        if not circle and add_sources(found, source, path | {key}) and (other, key) not in found.lines:
            found.lines.append((other, key))
    return True


def add_descendants(found: Lineage, index: Index) -> None:
    """What was made from the run, and from that, generation by generation."""
    generation = [found.focus]
    while generation:
        following: list[Key] = []
        for parent in generation:
            for run in (index.record(parent[1]) or {}).get("children", ()):
                key, child = ("run", str(run), ""), index.record(run)
                earlier = key in found.boxes and key not in found.later
                if child is None or earlier:
                    continue
                new = key not in found.boxes
                if found.add(key, Box("run", str(run), tells(facts := facts_of(child)), stale=is_stale(facts))):
                    found.lines.append((parent, key))
                    found.later.add(key)
                    following += [key] if new else []
        generation = following


def is_stale(facts: Sequence[str]) -> bool:
    return any(fact.startswith(STALE) for fact in facts)


def tells(facts: Sequence[str]) -> str:
    """What a box has room for: its score, and how it was trained."""
    ordered = sorted(facts[:2], key=lambda fact: not fact.startswith("score "))
    return ", ".join(fact.removeprefix("score ").replace("_", " ") for fact in ordered)


def columns_of(found: Lineage) -> dict[Key, int]:
    """Box → its column: 0 of the run itself, 1 and more of what it was made from, each behind all that it leads to;
    -1 and less of what was made from it."""
    columns = dict.fromkeys(found.boxes, 0) | dict.fromkeys(found.later, -1)
    for _ in found.boxes:  # a line moves one end by one: as many rounds as a path has boxes at most
        before = dict(columns)
        for source, target in found.lines:
            if target in found.later:
                columns[target] = min(columns[target], columns[source] - 1)
            else:
                columns[source] = max(columns[source], columns[target] + 1)
        if columns == before:
            break
    return columns


def picture(found: Lineage) -> Markup:
    """Return the figure: SVG in which every run is a link."""
    places = placed(found)
    return render(
        "lineage.html",
        focus=found.focus[1],
        width=max(x for x, _ in places.values()) + WIDE + 2,
        height=max(y for _, y in places.values()) + TALL + 2,
        paths=[curve_path(places[source], places[target]) for source, target in found.lines],
        boxes=[(box, places[key], key == found.focus) for key, box in found.boxes.items()],
        box_width=WIDE,
        box_height=TALL,
        more=f" {counted(found.left_out, 'more')} left out: stage.action=trace has all." if found.left_out else "",
    )


def placed(found: Lineage) -> dict[Key, tuple[float, float]]:
    """Box → (x, y) of its corner: a column below another's middle, in the order of what its boxes lead to."""
    columns: dict[int, list[Key]] = {}
    for key, column in columns_of(found).items():
        columns.setdefault(column, []).append(key)
    order = sorted(columns, reverse=True)  # the oldest is on the left
    for _ in range(SWEEPS):
        rank = {key: i - len(keys) / 2 for keys in columns.values() for i, key in enumerate(keys)}
        for column in order:
            columns[column].sort(key=lambda key: middle(key, found.lines, rank))
    tallest = max(len(keys) for keys in columns.values()) * (TALL + DOWN) - DOWN
    return {
        key: (i * (WIDE + ACROSS), (tallest - len(columns[column]) * (TALL + DOWN) + DOWN) / 2 + j * (TALL + DOWN))
        for i, column in enumerate(order) for j, key in enumerate(columns[column])
    }  # fmt: skip


def middle(key: Key, lines: Sequence[tuple[Key, Key]], rank: Mapping[Key, float]) -> float:
    """The mean rank of the boxes that a box is joined to; its own where there is none."""
    joined = [rank[b if a == key else a] for a, b in lines if key in (a, b)]
    return sum(joined) / len(joined) if joined else rank[key]


def curve_path(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return the path of a curve from the right side of a box to the left side of another."""
    x0 = start[0] + WIDE
    y0 = start[1] + TALL / 2
    x1 = end[0]
    y1 = end[1] + TALL / 2
    bend = max(24.0, (x1 - x0) / 2)
    return f"M{x0:g} {y0:g}C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}"
