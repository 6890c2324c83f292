"""Count the Python tokens of the source and of the tests, without comments, docstrings and layout.

Tokens do not change when a line is wrapped or a comment is written, so the count measures code and not its form.

Usage: python benchmarks/size.py [--by-package]
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("align", "annotate", "reward")
TESTS = ("tests",)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def count_tokens(text: str) -> int:
    """Return the number of tokens of one module, without comments, layout, docstrings and other bare strings."""
    bare_strings = {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in LAYOUT and token.start not in bare_strings for token in tokens)


def count_package(folder: Path) -> Counter[str]:
    """Return the tokens of a top-level folder by package. Links to other folders are not followed."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")):
        if any(parent.is_symlink() for parent in path.parents):
            continue
        parts = path.relative_to(ROOT).parts
        counts["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += count_tokens(path.read_text(encoding="utf-8"))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-package", action="store_true", help="also print the tokens of each package")
    arguments = parser.parse_args()
    for label, folders in (("source", SOURCE), ("tests", TESTS)):
        counts = sum((count_package(ROOT / folder) for folder in folders), Counter[str]())
        print(f"{label:<24}{counts.total():>10,}")
        if arguments.by_package:
            for package, count in counts.most_common():
                print(f"  {package:<22}{count:>10,}")


if __name__ == "__main__":
    main()
