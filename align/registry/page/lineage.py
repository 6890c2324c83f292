"""The picture of a run's lineage as SVG: its ancestors on the left, its descendants on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from align.registry.index import Index
from align.registry.page.templating import render
from align.registry.trace import STALE, TraceNode, describe_run
from align.report.figure_text import pluralize

WIDE = 172
"""Pixels: the width of a box."""
TALL = 50
"""Pixels: the height of a box."""
ACROSS = 44
"""Pixels between columns."""
DOWN = 12
"""Pixels between boxes of a column."""
MOST = 60
"""Largest number of boxes in a picture; the tree of `stage.action=trace` has all."""
SWEEPS = 4
"""Number of passes over the columns in which the boxes of each column are sorted by the mean rank of their
neighbours."""
Key = tuple[str, str, str]
"""(kind, name, digest) of a box; the digest of a run is empty."""


@dataclass(frozen=True, slots=True)
class Box:
    """One box in the picture of a lineage: a run, a file, votes or base weights.

    Attributes:
        summary: text below its name.
        whole: False if it is gone or known to have changed.
        stale: True if it was trained on data that was forgotten since.
    """

    kind: str
    name: str
    summary: str = ""
    whole: bool = True
    stale: bool = False


@dataclass(slots=True)
class Lineage:
    """The boxes in the picture of a lineage, and its lines as pairs (source, product).

    Attributes:
        focus: the run itself.
        later: boxes that were made from the run.
        left_out: number of boxes for which the picture has no room.
    """

    focus: Key
    boxes: dict[Key, Box] = field(default_factory=dict)
    lines: list[tuple[Key, Key]] = field(default_factory=list)
    later: set[Key] = field(default_factory=set)
    left_out: int = 0

    def add(self, key: Key, box: Box) -> bool:
        """Add a box, and return True if the picture contains it now, False if the picture is full.

        A box that is there already stays. A box without room is counted in `left_out`.
        """
        if key not in self.boxes and len(self.boxes) >= MOST:
            self.left_out += 1
            return False
        self.boxes.setdefault(key, box)
        return True


def build_lineage(index: Index, tree: TraceNode) -> Lineage:
    """Return the boxes and lines of a run's lineage: the ancestors in its trace, and its descendants in the index.

    Args:
        tree: trace of the run, see `align.registry.trace`.
    """
    lineage = Lineage(get_key(tree))
    add_sources(lineage, tree, frozenset())
    add_descendants(lineage, index)
    lineage.lines = [line for line in lineage.lines if line[0][0] != "base" or not has_other_path(lineage.lines, *line)]
    return lineage


def has_other_path(lines: Sequence[tuple[Key, Key]], source: Key, target: Key) -> bool:
    """Return whether lines lead from `source` to `target` through at least one other box.

    Then the direct line between them may be left out: most runs have the base of their parents.
    """
    visited: set[Key] = set()
    stack = [end for start, end in lines if start == source and end != target]
    while stack:
        key = stack.pop()
        if key not in visited:
            visited.add(key)
            stack += [end for start, end in lines if start == key]
    return target in visited


def get_key(node: TraceNode) -> Key:
    """Return the key of a trace node's box: kind, name and digest, with an empty digest for a run."""
    return node.kind, node.name, "" if node.kind == "run" else node.digest


def add_sources(lineage: Lineage, node: TraceNode, path: frozenset[Key]) -> bool:
    """Add the box of a trace node, the boxes of its ancestors and the lines between them to the picture. Returns False
    if the picture is full.

    Args:
        path: nodes between the run and this one.
    """
    key = get_key(node)
    if not lineage.add(key, Box(node.kind, node.name, summarize_facts(node.facts), node.whole, is_stale(node.facts))):
        return False
    for _, source in node.sources:
        source_key = get_key(source)
        is_circle = source_key in path or source_key == key  # only in manifests edited by hand
        if not is_circle and add_sources(lineage, source, path | {key}) and (source_key, key) not in lineage.lines:
            lineage.lines.append((source_key, key))
    return True


def add_descendants(lineage: Lineage, index: Index) -> None:
    """Add boxes and lines for all runs that were made from the picture's run, directly or over other runs."""
    generation = [lineage.focus]
    while generation:
        next_generation: list[Key] = []
        for parent in generation:
            for run in (index.record(parent[1]) or {}).get("children", ()):
                key = ("run", str(run), "")
                child = index.record(run)
                is_ancestor = key in lineage.boxes and key not in lineage.later
                if child is None or is_ancestor:
                    continue
                is_new = key not in lineage.boxes
                facts = describe_run(child)
                if lineage.add(key, Box("run", str(run), summarize_facts(facts), stale=is_stale(facts))):
                    lineage.lines.append((parent, key))
                    lineage.later.add(key)
                    if is_new:
                        next_generation.append(key)
        generation = next_generation


def is_stale(facts: Sequence[str]) -> bool:
    return any(fact.startswith(STALE) for fact in facts)


def summarize_facts(facts: Sequence[str]) -> str:
    """Return the first two facts of a trace node as text, the score first, such as `win rate 0.62, lora r8`."""
    ordered = sorted(facts[:2], key=lambda fact: not fact.startswith("score "))
    return ", ".join(fact.removeprefix("score ").replace("_", " ") for fact in ordered)


def assign_columns(lineage: Lineage) -> dict[Key, int]:
    """Return a mapping from each box to its column: 0 for the run itself, positive for ancestors, negative for
    descendants.

    An ancestor's column is greater than those of all boxes made from it.
    """
    columns = dict.fromkeys(lineage.boxes, 0) | dict.fromkeys(lineage.later, -1)
    for _ in lineage.boxes:  # at most as many rounds as the longest path has boxes
        old_columns = dict(columns)
        for source, target in lineage.lines:
            if target in lineage.later:
                columns[target] = min(columns[target], columns[source] - 1)
            else:
                columns[source] = max(columns[source], columns[target] + 1)
        if columns == old_columns:
            break
    return columns


def draw_lineage(lineage: Lineage) -> Markup:
    """Render a lineage as an SVG picture, in which every run is a link to its page."""
    positions = compute_box_positions(lineage)
    return render(
        "lineage.html",
        focus=lineage.focus[1],
        width=max(x for x, _ in positions.values()) + WIDE + 2,
        height=max(y for _, y in positions.values()) + TALL + 2,
        paths=[build_curve_path(positions[source], positions[target]) for source, target in lineage.lines],
        boxes=[(box, positions[key], key == lineage.focus) for key, box in lineage.boxes.items()],
        box_width=WIDE,
        box_height=TALL,
        more=f" {pluralize(lineage.left_out, 'more')} left out: stage.action=trace has all."
        if lineage.left_out
        else "",
    )


def compute_box_positions(lineage: Lineage) -> dict[Key, tuple[float, float]]:
    """Return a mapping from each box to (x, y) of its upper left corner, in pixels. Columns are centred, and sorted by
    neighbours."""
    columns: dict[int, list[Key]] = {}
    for key, column in assign_columns(lineage).items():
        columns.setdefault(column, []).append(key)
    order = sorted(columns, reverse=True)  # the oldest boxes are on the left
    for _ in range(SWEEPS):
        rank = {key: i - len(keys) / 2 for keys in columns.values() for i, key in enumerate(keys)}
        for column in order:
            columns[column].sort(key=lambda key: compute_mean_rank(key, lineage.lines, rank))
    tallest = max(len(keys) for keys in columns.values()) * (TALL + DOWN) - DOWN
    return {
        key: (i * (WIDE + ACROSS), (tallest - len(columns[column]) * (TALL + DOWN) + DOWN) / 2 + j * (TALL + DOWN))
        for i, column in enumerate(order)
        for j, key in enumerate(columns[column])
    }


def compute_mean_rank(key: Key, lines: Sequence[tuple[Key, Key]], rank: Mapping[Key, float]) -> float:
    """Return the mean rank of the boxes that share a line with a box, or its own rank if it has no lines."""
    ranks = [rank[end if start == key else start] for start, end in lines if key in (start, end)]
    return sum(ranks) / len(ranks) if ranks else rank[key]


def build_curve_path(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return the `d` attribute of an SVG path that curves from the right side of a box to the left side of another.

    Args:
        start, end: (x, y) of the upper left corners of the boxes, in pixels.
    """
    x0 = start[0] + WIDE
    y0 = start[1] + TALL / 2
    x1 = end[0]
    y1 = end[1] + TALL / 2
    bend = max(24.0, (x1 - x0) / 2)
    return f"M{x0:g} {y0:g}C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}"
