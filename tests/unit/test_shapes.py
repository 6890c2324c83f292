"""Shape suffixes of tensor names: CONTRIBUTING.md explains each letter in use, and no other letter."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = re.compile(r"[a-z]\w*_(?P<shape>[A-Z][A-Z0-9]*)")
OF_PEFT = {"lora_A", "lora_B"}


def iter_names(source: str) -> Iterator[str]:
    """Yield the names of variables, arguments and attributes in a source."""
    if not re.search(rf"\b{SUFFIX.pattern}\b", source):  # most have none, and parsing takes a while
        return
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def find_shape_letters(source: str) -> dict[str, str]:
    """Map each letter of a shape to a name that has it."""
    matches = ((name, SUFFIX.fullmatch(name)) for name in iter_names(source) if name not in OF_PEFT)
    return {letter: name for name, match in matches if match for letter in match["shape"] if letter.isalpha()}


def read_documented_letters() -> list[str]:
    """Return the letters in the first column of the table under "Shapes"."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Shapes\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [letter for row in rows for letter in re.findall("`([A-Z])`", row)]


def test_every_letter_of_a_shape_has_a_meaning():
    documented = read_documented_letters()
    used = dict[str, str]()
    assert len(documented) == len(set(documented)), "a letter with two meanings"
    paths = [path for package in ("align", "reward") for path in (ROOT / package).rglob("*.py")]
    for path in sorted(paths):
        letters_of_file = find_shape_letters(path.read_text(encoding="utf-8"))
        assert not letters_of_file.keys() - set(documented), f"{path.relative_to(ROOT)}: {letters_of_file}"
        used |= letters_of_file
    assert set(documented) == used.keys()


def test_the_reader_of_shapes():
    source = "def f(a_BT, *, B_T=1):\n    x.hidden_NXD = g(y_B1=LOW_K, lora_A=lora_B, snake_case=self.lora_A)"
    assert find_shape_letters(source) == {
        "B": "y_B1",
        "T": "a_BT",
        "N": "hidden_NXD",
        "X": "hidden_NXD",
        "D": "hidden_NXD",
    }
