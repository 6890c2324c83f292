"""Count symptoms of unclear naming in Python code, and compare each package with its limits.

| column | counts | per |
| --- | --- | --- |
| vague | assignments to a name that does not say what its value is (`found`, `said`) | 100 assignments to names |
| nonverb | functions named by a bare participle, preposition or pronoun (`asked`, `of_which`) | 100 functions |
| opening | docstrings that open with What, Which, Whether, Of … instead of a verb or a noun | 100 docstrings |
| riddle | docstrings with a word of indirect speech, listed in `RIDDLE` | 100 docstrings |
| packed | tuple assignments `a, b = x, y`, and lines that the formatter skips | 1,000 lines |
| repeat | top-level names that three or more modules define: of the source, and of everything else | 1,000 lines |

Properties, fixtures and conversions (`from_json`, `as_dict`, `on_step_end`, `with_defaults`) are not functions here.

Usage: python benchmarks/plain_words.py [PATH ...] [--check] [--list COLUMN]
`--check` exits with status 1 if a package is above a limit. `--list` prints the places that a column counts.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("align", "annotate", "reward", "tests", "benchmarks", "recipes")
LIMITS = {"vague": 0.5, "nonverb": 4.0, "opening": 3.0, "riddle": 1.5, "packed": 3.0}
REPEAT_LIMITS = {"source": 0.3, "the rest": 0.6}
SOURCE = ("align", "annotate", "reward")
BASES = {"vague": "assignment", "nonverb": "function", "opening": "docstring", "riddle": "docstring", "packed": "line"}
"""What each column is counted over."""

VAGUE_NAME = re.compile(
    r"again|anew|apart|asked|back|begun|behind|beside|chosen|done|drawn|ended|few|found|given|going|heard"
    r"|held|here|judged|known|left|made|many|meant|meanwhile|mine|much|one|ones|opened|other|others|own"
    r"|rest|said|seen|shown|some|standing|such|telling|there|these|those|told|wanted|whole|within|written"
)
IRREGULAR_PARTICIPLE = re.compile(
    r"begun|bound|broken|brought|built|chosen|cut|dealt|drawn|fed|felt|found|given|gone|heard|held|hidden"
    r"|kept|known|led|left|lost|made|meant|put|said|seen|sent|shown|spent|spoken|stood|taken|thrown|told"
    r"|torn|understood|won|worn|written"
)
FUNCTION_WORD = re.compile(
    r"about|above|after|again|alike|alone|anew|apart|around|as|before|behind|below|beside|by|few|for|from"
    r"|how|in|many|may|of|on|once|one|ones|other|others|such|these|those|what|where|whether|which|who"
    r"|whole|whose|with|within|without|would|would_be"
)
VERB_IN_ED = re.compile(r"bed|embed|exceed|feed|need|proceed|red|seed|shed|shred|speed|wed")
CONVERSIONS = frozenset({"from", "as", "on", "with"})
NAMED_BY_VALUE = frozenset({"property", "cached_property", "fixture", "setter", "validator", "field_validator"})
"""Decorators of functions that are named after their value."""
OPENING = re.compile(
    r"(What|Which|Whether|Those|These|That|Whose|Who|Whoever|Where|How|When|Of|As|In|On|By|With|Without|From|Up|None"
    r"|Nothing|Some|Such|It|Its|The same)\b"
)
RIDDLE = re.compile(
    r"\b(whoever|whatever|nobody|nobody's|somebody|somebody's|everybody|meanwhile|anew|whereof|thereof|hitherto|lest"
    r"|is none|are none|where there (?:is|are) none|nothing of|be said of|is said of|are said|is told|was told|are told"
    r"|came to|comes to|goes by|stands for|gives? away|taken away|to be made of|that are none|as often as|of whom"
    r"|of which)\b",
    re.IGNORECASE,
)
SKIP_MARKS = ("# fmt: " + "skip", "# fmt: " + "off")


class Symptom(NamedTuple):
    """A place that a column counts."""

    column: str
    path: Path
    line: int
    text: str


class PackageCount:
    """The symptoms of a package, and how many names, functions, docstrings and lines they are counted over.

    Attributes:
        definitions: a top-level name → the modules that define it.
    """

    def __init__(self) -> None:
        self.totals = Counter[str]()
        self.symptoms: list[Symptom] = []
        self.definitions = defaultdict[str, set[Path]](set)

    def rate(self, column: str) -> float:
        """Return a column's figure."""
        number = sum(symptom.column == column for symptom in self.symptoms)
        scale = 1000 if BASES[column] == "line" else 100
        return scale * number / max(1, self.totals[BASES[column]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / folder for folder in FOLDERS])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--list", choices=LIMITS)
    options = parser.parse_args()
    packages = defaultdict[str, PackageCount](PackageCount)
    for path in iter_modules(options.paths):
        relative = path.resolve().relative_to(ROOT)
        count_module(relative, path.read_text(), packages["/".join(relative.parts[:-1][:2])])
    if options.list:
        for package in packages.values():
            for symptom in package.symptoms:
                if symptom.column == options.list:
                    print(f"{symptom.path}:{symptom.line}: {symptom.text}")
        return 0
    excesses = [*print_table(packages), *print_repeats(packages)]
    if not options.check:
        return 0
    for excess in excesses:
        print(excess, file=sys.stderr)
    return int(bool(excesses))


def iter_modules(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files of folders, links to folders not followed, and the given files themselves."""
    for path in paths:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def count_module(path: Path, source: str, package: PackageCount) -> None:
    """Add a module's symptoms and its top-level names to those of its package."""

    def add(column: str, line: int, text: str) -> None:
        package.symptoms.append(Symptom(column, path, line, text))

    tree = ast.parse(source)
    lines = source.splitlines()
    package.totals["line"] += len(lines)
    for number, line in enumerate(lines, 1):
        if any(mark in line for mark in SKIP_MARKS):
            add("packed", number, line.strip())
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(), *_], value=ast.Tuple()):
                add("packed", node.lineno, ast.unparse(node))
            case ast.Name(id=name, ctx=ast.Store()):
                package.totals["assignment"] += 1
                if VAGUE_NAME.fullmatch(name):
                    add("vague", node.lineno, name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if not name.startswith("__") and not is_named_by_value(node):
                    package.totals["function"] += 1
                    if is_nonverb(name):
                        add("nonverb", node.lineno, name)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if docstring := ast.get_docstring(node):
            package.totals["docstring"] += 1
            line = 1 if isinstance(node, ast.Module) else node.lineno
            if OPENING.match(docstring):
                add("opening", line, docstring.partition("\n")[0])
            if riddle := RIDDLE.search(docstring):
                add("riddle", line, riddle.group())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            package.definitions[node.name].add(path)


def is_named_by_value(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a property, a fixture or a validator."""
    decorators = {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in function.decorator_list}
    return bool(decorators & NAMED_BY_VALUE)


def is_nonverb(name: str) -> bool:
    """Return whether a function's name begins with a participle, a preposition or a pronoun."""
    first, _, remainder = name.strip("_").partition("_")
    if first in CONVERSIONS and remainder:
        return False
    if FUNCTION_WORD.fullmatch(first) or IRREGULAR_PARTICIPLE.fullmatch(first):
        return True
    return bool(re.fullmatch(r"[a-z]{2,}ed", first)) and not VERB_IN_ED.fullmatch(first)


def print_table(packages: dict[str, PackageCount]) -> Iterator[str]:
    """Print a row for each package and one for all, and yield a sentence on each figure that is above its limit."""
    everything = PackageCount()
    print(f"{'package':24} {'lines':>7}" + "".join(f"{column:>9}" for column in LIMITS))
    for name, package in sorted(packages.items(), key=lambda item: -item[1].totals["line"]):
        everything.totals += package.totals
        everything.symptoms += package.symptoms
        print_row(name, package)
        for column, limit in LIMITS.items():
            if (rate := package.rate(column)) > limit:
                yield f"{name}: {column} {rate:.1f}, limit {limit:g}: see --list {column}"
    print_row("total", everything)


def print_repeats(packages: dict[str, PackageCount]) -> Iterator[str]:
    """Print how many names are defined again and again, and yield a sentence on each figure above its limit."""
    for part, limit in REPEAT_LIMITS.items():
        names = defaultdict[str, set[Path]](set)
        lines = 0
        for package_name, package in packages.items():
            if (package_name.partition("/")[0] in SOURCE) == (part == "source"):
                lines += package.totals["line"]
                for name, paths in package.definitions.items():
                    names[name] |= paths
        repeated = sorted(name for name, paths in names.items() if len(paths) >= 3)
        rate = 1000 * len(repeated) / max(1, lines)
        print(f"repeat in {part}: {rate:.2f}")
        if rate > limit:
            yield f"{part}: repeat {rate:.2f}, limit {limit:g}: {', '.join(repeated)}"


def print_row(name: str, package: PackageCount) -> None:
    print(f"{name:24} {package.totals['line']:7}" + "".join(f"{package.rate(column):9.1f}" for column in LIMITS))


if __name__ == "__main__":
    sys.exit(main())
