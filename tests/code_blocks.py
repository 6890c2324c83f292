"""The fenced blocks of README and docs, with the HTML comment above a block, such as `<!-- needs: hub -->`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(
    r"(?:^<!-- (?P<kind>\w+): (?P<mark>\S+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)

NEEDS = {
    "time": "minutes to hours as it stands; a test runs it in small",
    "install": "puts software on the machine",
    "hub": "a model or a data set of the hub",
    "gpu": "a GPU",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp, which is built for minutes; tests/e2e/test_export_gguf.py runs it where it is",
    "docker": "Docker, Compose or Kubernetes; tests/e2e/test_deployed.py runs what the files start",
    "server": "a server that runs meanwhile; the test of its page starts it, and asks it",
    "person": "somebody at a browser; tests/browser has a script in their place",
    "script": "a recipe or a benchmark, minutes to hours; tests/configs composes its lines",
    "yours": "a file, a run or a machine of the reader's",
}
"""Requirements that tests cannot meet, so that no test runs a block with one of them unchanged."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page's path.
        language: `bash`, `json`, …; empty if the fence names no language.
        kind, mark: the parts of the comment above it, such as `needs` and `hub`; None without a comment.
    """

    page: Path
    language: str
    text: str
    kind: str | None
    mark: str | None

    @property
    def needs(self) -> str | None:
        return self.mark if self.kind == "needs" else None


def read_blocks(page: Path, language: str, section: str = "") -> list[Block]:
    """Return the blocks of a language on a page, or in a section of it, in their order."""
    text = page.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    all_blocks = (Block(page, m["language"], m["text"], m["kind"], m["mark"]) for m in FENCE.finditer(text))
    return [block for block in all_blocks if block.language == language]
