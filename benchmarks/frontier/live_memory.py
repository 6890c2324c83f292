"""Measure the peak of the bytes of live tensors in a run.

    python benchmarks/frontier/live_memory.py FILE stage=ppo …

Bytes are counted when tensors are created and freed (`align.planning.live_bytes`), so the figure depends neither on
other processes nor on the memory of imports. FILE gets the peak in MB. Counting is slow: use it on a short run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from align.__main__ import main
from align.planning.live_bytes import LiveBytes

if __name__ == "__main__":
    output_path, *overrides = sys.argv[1:]
    with LiveBytes() as live_bytes:
        status = main(overrides)
        peak_bytes = live_bytes.lap()
    if not status:
        Path(output_path).write_text(json.dumps(peak_bytes / 1e6))
    sys.exit(status)
