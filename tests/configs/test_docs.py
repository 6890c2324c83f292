"""What README and docs say exists, and every command line in them composes and validates."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from align.config.compose import check, compose_raw

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def commands() -> list[tuple[str, str]]:
    """(page, line) of every `python -m align …` line in a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.startswith("python -m align ")]
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_documented_command_composes(page: str, line: str) -> None:
    config = check(compose_raw(shlex.split(line, comments=True)[3:]))
    assert config.stage is not None, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where")[1].split("```")[1]
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = {f"align/{p.name}/" for p in (ROOT / "align").iterdir() if (p / "__init__.py").is_file()}
    assert rooms <= named


def test_the_table_of_figures_is_what_the_recipe_reached() -> None:
    """README's figures are those of `expected.json`, every seed in it, as `check.py` puts them."""
    recipe = ROOT / "recipes" / "quickstart"
    spec = spec_from_file_location("check", recipe / "check.py")
    assert spec is not None
    assert spec.loader is not None
    check_py = module_from_spec(spec)
    spec.loader.exec_module(check_py)
    rows = json.loads((recipe / "expected.json").read_text(encoding="utf-8"))
    assert [row["seed"] for row in rows] == list(range(len(rows))) != []
    assert check_py.markdown(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
