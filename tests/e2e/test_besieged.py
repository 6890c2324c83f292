"""No vote is lost under 2,000 idle connections, 400 half-sent bodies and 1,100 heartbeats at 1,024 descriptors.

`benchmarks/annotation/siege.py` runs the attack, and raises if an acknowledged vote is missing or counts twice.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks" / "annotation"
VOTES = 100


@pytest.mark.slow
def test_votes_go_on_while_the_server_is_besieged_and_none_is_lost(store_url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("siege", "crowd"):
        sys.modules.pop(name, None)
    import siege

    with ThreadPoolExecutor(1) as executor:  # this thread may have a loop of its own already
        size = {"annotators": 20, "every_s": 1, "seconds": 120, "votes": VOTES, "again_s": 10}
        report = executor.submit(siege.measure_attack, tmp_path, url=store_url, **size).result()
    assert report["siege"].keys() >= {"idle", "body", "heartbeat"}
    assert report["siege"]["idle"] >= siege.IDLE
    assert report["siege"]["body"] >= siege.BODIES
    assert report["siege"]["heartbeat"] >= siege.HEARTBEATS
    assert report["descriptors_used"] <= siege.DESCRIPTORS
    assert report["war"]["refused"] == []
    assert report["war"]["votes"] >= VOTES  # in less than two minutes, even on a busy machine
    connection_lines = [line for line in report["log"].splitlines() if "align.web.server" in line]
    assert 1 <= len(connection_lines) <= 3  # logged, and not once a connection
    assert "Traceback" not in report["log"]
