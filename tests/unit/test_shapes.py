"""Each letter behind a tensor's name has a meaning in CONTRIBUTING.md, and each that is there is used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = re.compile(r"[a-z]\w*_(?P<shape>[A-Z][A-Z0-9]*)")
OF_PEFT = {"lora_A", "lora_B"}


def names(source: str) -> Iterator[str]:
    """Every name that a source gives or takes: of variables, arguments and attributes."""
    if not re.search(rf"\b{SUFFIX.pattern}\b", source):  # most have none, and parsing takes a while
        return
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def letters(source: str) -> dict[str, str]:
    """Each letter of a shape, with a name that has it."""
    found = ((name, SUFFIX.fullmatch(name)) for name in names(source) if name not in OF_PEFT)
    return {letter: name for name, match in found if match for letter in match["shape"] if letter.isalpha()}


def in_the_table() -> list[str]:
    """The letters in the first column of the table under "Shapes"."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Shapes\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [letter for row in rows for letter in re.findall("`([A-Z])`", row)]


def test_every_letter_of_a_shape_has_a_meaning():
    known = in_the_table()
    used = dict[str, str]()
    assert len(known) == len(set(known)), "a letter with two meanings"
    paths = [path for room in ("align", "reward") for path in (ROOT / room).rglob("*.py")]
    for path in (*sorted(paths), ROOT / "annotate" / "priority.py"):  # which alone of annotate scores by a model
        here = letters(path.read_text(encoding="utf-8"))
        assert not here.keys() - set(known), f"{path.relative_to(ROOT)}: {here}"
        used |= here
    assert set(known) == used.keys()


def test_the_reader_of_shapes():
    source = "def f(a_BT, *, B_T=1):\n    x.hidden_NXD = g(y_B1=LOW_K, lora_A=lora_B, snake_case=self.lora_A)"
    assert letters(source) == {"B": "y_B1", "T": "a_BT", "N": "hidden_NXD", "X": "hidden_NXD", "D": "hidden_NXD"}
