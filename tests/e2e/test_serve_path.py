"""Limit how many source files a chat completion passes through, so that a longer path is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from processes import ROOT, Forks
from serving import run_serve_stage
from waiting import becomes_true

MOST = 20
"""Maximum number of source files, without `align/core`, which all packages share."""
TRACE = """
import json, os, sys, threading

SEEN = set()

def record(frame, event, _):
    code = frame.f_code
    if event == "call":
        if code.co_name == "connection_made":
            SEEN.clear()
        SEEN.add(code.co_filename)
    elif event == "return" and code.co_name == "record_finished":
        with open("files.part", "w") as file:
            json.dump(sorted(SEEN), file)
        os.replace("files.part", "files.json")

threading.setprofile(record)
sys.setprofile(record)
"""


def test_a_chat_completion_passes_through_few_files(forks: Forks, tmp_path: Path):
    trace_path = tmp_path / "files.json"
    body = {"model": "pocket", "messages": [{"role": "user", "content": "Hello, how are you?"}], "max_tokens": 8}
    with run_serve_stage(forks, tmp_path, "model=pocket", before=TRACE) as server:
        for _ in range(2):  # the first request does all one-time work
            trace_path.unlink(missing_ok=True)
            assert server.post("/v1/chat/completions", body)[0] == 200
            assert becomes_true(trace_path.exists)
    paths = [Path(name).resolve() for name in json.loads(trace_path.read_text())]
    relative = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
    source_files = [name for name in relative if name.startswith(("align/", "annotate/", "reward/"))]
    files = [name for name in source_files if not name.startswith("align/core/")]
    assert {"align/serve/app.py", "align/rollout/continuous.py"} <= {*files}
    assert len(files) <= MOST, files
