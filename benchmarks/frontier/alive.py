"""The most bytes of tensors that are alive at once in a run.

    python benchmarks/frontier/alive.py FILE stage=ppo …

Bytes are counted as tensors are made and freed (`align.planning.live_bytes`), so neighbours on the machine and what
imports take do not change them. Counting takes time: give it a short run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from align.__main__ import main
from align.planning.live_bytes import LiveBytes

if __name__ == "__main__":
    file, *words = sys.argv[1:]
    with LiveBytes() as count:
        status = main(words)
        most = count.lap()
    if not status:
        Path(file).write_text(json.dumps(most / 1e6))
    sys.exit(status)
