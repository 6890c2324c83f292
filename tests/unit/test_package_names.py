"""The parts of the package are imported as `align.annotate` and `align.reward`, never as folders of a checkout."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("align", "annotate", "reward", "tests", "benchmarks", "recipes", "docs")
SOURCES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
BARE = {"annotate", "reward"}


def find_bare_imports(source: str) -> list[str]:
    """Return the imports of `annotate` or `reward` in a module, and in the Python code inside its strings."""
    names: list[str] = []
    if not re.search(r"\b(?:import|from)\b.*\b(?:annotate|reward)\b", source):  # parsing takes a while
        return names
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += re.findall(r"(?m)(?:^|;)\s*from (\S+) import", node.value)
    return [name for name in names if name.partition(".")[0] in BARE]


def test_no_source_imports_a_top_level_folder():
    bare = {str(path.relative_to(ROOT)): find_bare_imports(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(bare) > 900
    assert not {path: names for path, names in bare.items() if names}


def test_bare_imports_are_found():
    module = "reward"
    source = f"import annotate.web\nfrom {module} import x\nCODE = 'from {module}.rules import y'\nimport align.reward"
    assert find_bare_imports(source) == ["annotate.web", "reward", "reward.rules"]
