"""How many of our files a chat completion passes through, so that a change that lengthens its way is seen."""

from __future__ import annotations

import json
from pathlib import Path

from processes import ROOT, Forks
from serving import serving
from waiting import settles

MOST = 20
"""Files of the source, without `align/core`, which every package shares."""
TRACE = """
import json, os, sys, threading

SEEN = set()

def record(frame, event, _):
    code = frame.f_code
    if event == "call":
        if code.co_name == "connection_made":
            SEEN.clear()
        SEEN.add(code.co_filename)
    elif event == "return" and code.co_name == "done":
        with open("files.part", "w") as file:
            json.dump(sorted(SEEN), file)
        os.replace("files.part", "files.json")

threading.setprofile(record)
sys.setprofile(record)
"""


def test_a_chat_completion_passes_through_few_files(forks: Forks, tmp_path: Path):
    traced = tmp_path / "files.json"
    body = {"model": "pocket", "messages": [{"role": "user", "content": "Hello, how are you?"}], "max_tokens": 8}
    with serving(forks, tmp_path, "model=pocket", before=TRACE) as server:
        for _ in range(2):  # what is done once is done by the first
            traced.unlink(missing_ok=True)
            assert server.post("/v1/chat/completions", body)[0] == 200
            assert settles(traced.exists)
    paths = [Path(name).resolve() for name in json.loads(traced.read_text())]
    relative = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
    ours = [name for name in relative if name.startswith(("align/", "annotate/", "reward/"))]
    files = [name for name in ours if not name.startswith("align/core/")]
    assert {"align/serve/app.py", "align/rollout/continuous.py"} <= {*files}
    assert len(files) <= MOST, files
