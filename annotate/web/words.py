"""Every word of the interface, from `strings.json`."""

from __future__ import annotations

import json
from pathlib import Path

STATIC = Path(__file__).parent / "static"
WORDS: dict[str, str] = json.loads((STATIC / "strings.json").read_text(encoding="utf-8"))
