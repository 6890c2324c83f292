"""The house in one picture, from its imports: `python docs/floors.py` writes docs/floors.svg.

A room is a package or a module; it stands on a floor and imports from floors below, never from a sibling. The test that
keeps it so (tests/unit/test_floors.py) reads both from here. The picture leaves out an arrow where
another way leads down to the same room, and those to floor 0, which every room imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_suffix(".svg")
PACKAGES = ("align", "annotate", "reward")
"""Folders at the top; the last two are `align.annotate` and `align.reward`, by links inside `align/`."""
FLOORS = {
    0: ("align.core", "align.config", "align.ranks"),
    1: ("align.ops", "align.run", "align.track", "align.annotate.store"),
    2: ("align.data", "align.models", "align.report", "align.web", "align.mirrors"),
    3: ("align.reward", "align.rollout", "align.planning"),
    4: (
        "align.trainers",
        "align.ppo",
        "align.evals",
        "align.export",
        "align.serve",
        "align.registry",
        "align.annotate",
    ),
    5: ("align.stages",),
    6: ("align.cli",),
    7: ("align.__main__",),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
WIDTH, HEIGHT, BOX, TALL = 1180, 96, 196, 40
"""Of the picture, of a floor, of a room, in pixels."""
COLOURS = ("#5b6770", "#2f6f8f", "#3b7d4f", "#8a6d1f", "#8f4a2f", "#6b4a8f", "#6b4a8f", "#6b4a8f")


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "align":
        parts = ("align", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """Return the room of a module by the longest match: `align.annotate.store` is a room of its own."""
    return max((r for r in FLOOR_OF if module == r or module.startswith(f"{r}.")), key=len, default=None)


@cache
def parsed(source: str) -> tuple[tuple[ast.Import | ast.ImportFrom, bool, bool], ...]:
    """Every import of a source, whether it is inside a function, and whether it is for the type checker alone."""
    nodes = tuple(ast.walk(ast.parse(source)))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    typing = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden, checked = ({id(n) for outer in of for n in ast.walk(outer)} for of in (functions, typing))
    # The imports alone are kept: all nodes of all sources take 200 MB.
    return tuple((n, id(n) in hidden, id(n) in checked) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))


def imports(
    source: str, module: str = "", is_package: bool = False, top_only: bool = False, for_types: bool = True
) -> Iterator[str]:
    """The full name of everything that a source imports, `from a import b` as `a.b`; inside functions too, unless
    `top_only`, and for the type checker alone, unless not `for_types`."""
    for node, hidden, checked in parsed(source):
        if (top_only and hidden) or ((top_only or not for_types) and checked):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            above = module.split(".")[: None if node.level == int(is_package) else int(is_package) - node.level]
            start = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def rooms_in(path: Path) -> set[str]:
    """The rooms that a file of ours imports, other than its own."""
    module = name_of(path)
    found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    rooms = {room_of(name) for name in found if name.partition(".")[0] == "align"}
    return {room for room in rooms if room is not None} - {room_of(module)}


def imported() -> dict[str, set[str]]:
    """Room → the rooms on lower floors that it imports."""
    found: dict[str, set[str]] = {room: set() for room in FLOOR_OF}
    for path in MODULES:
        if room := room_of(name_of(path)):
            found[room] |= {other for other in rooms_in(path) if FLOOR_OF[other] < FLOOR_OF[room]}
    return found


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same ways down with the fewest arrows: none to what another arrow leads to."""

    def below(room: str) -> set[str]:
        return {r for other in graph[room] for r in ({other} | below(other))}

    return {
        room: {other for other in others if not any(other in below(via) for via in others - {other})}
        for room, others in graph.items()
    }


def places() -> dict[str, tuple[float, float]]:
    """Room → the middle of its box."""
    top = max(FLOORS)
    return {
        room: (40 + (WIDTH - 40) * (i + 0.5) / len(rooms), HEIGHT * (top - floor) + HEIGHT / 2)
        for floor, rooms in FLOORS.items()
        for i, room in enumerate(rooms)
    }


def svg() -> str:
    """The picture."""
    at, lines = places(), []
    high = HEIGHT * len(FLOORS)
    for floor in FLOORS:
        y = HEIGHT * (max(FLOORS) - floor)
        if floor % 2 == 0:
            lines.append(f'<rect x="0" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="#f4f5f6"/>')
        lines.append(f'<text x="14" y="{y + HEIGHT / 2 + 5:.0f}" fill="#8a949c">{floor}</text>')
    for room, others in reduced(imported()).items():
        for other in sorted(other for other in others if FLOOR_OF[other] > 0):
            (x, y), (u, v) = at[room], at[other]
            start, end = y + TALL / 2, v - TALL / 2 - 3
            bend = (end - start) / 2
            curve = f"M{x:.0f} {start:.0f}C{x:.0f} {start + bend:.0f} {u:.0f} {end - bend:.0f} {u:.0f} {end:.0f}"
            about = f"<title>{room} imports {other}</title>"
            lines.append(f'<path d="{curve}" stroke="{COLOURS[FLOOR_OF[room]]}" class="way">{about}</path>')
    for room, (x, y) in at.items():
        box = f'x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}"'
        lines.append(f'<rect {box} rx="7" fill="#fff" stroke="{COLOURS[FLOOR_OF[room]]}" stroke-width="1.5"/>')
        lines.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="#1d2328">{escape(room)}</text>')
    style = "text{font:15px ui-monospace,Menlo,Consolas,monospace}"
    style += ".way{fill:none;stroke-width:1.4;opacity:.62;marker-end:url(#tip)}"
    tip = '<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" role="img">'
    about = "<title>The rooms of align on their floors, and what each imports</title>"
    defs = f'<defs><style>{style}</style>{tip}<path d="M0 0L6 3L0 6z" fill="#5b6770"/></marker></defs>'
    paper = f'<rect width="{WIDTH}" height="{high}" fill="#fff"/>'
    return "\n".join([head, about, defs, paper, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
