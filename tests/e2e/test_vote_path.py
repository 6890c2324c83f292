"""Limit how many source files a vote passes through, from the request to the pair for a reward model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from processes import ROOT
from starlette.testclient import TestClient

from align.annotate.accounts import Person
from align.annotate.store import Candidate, Store
from align.annotate.store.vote_selection import DEFAULT_SELECTION
from align.core.types import Conversation, Message
from align.data.pairs import VoteSource, read_pairs
from align.data.sources import DataSource

MAX_FILES = 15
"""Maximum number of source files, without `align/core`, which all packages share."""
ORIGIN = "http://127.0.0.1:7861"
KEY = "k" * 32


@contextmanager
def trace_files(files: set[str]) -> Iterator[None]:
    """Add the file of each function that is called inside the block, in this thread and in new ones."""

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def test_a_vote_passes_through_few_files(tmp_path: Path):
    from align.annotate.web.server import build_app
    from align.web.key_link import KeyAuthenticator

    url = f"sqlite:///{tmp_path / 'annotations.db'}"
    files = set[str]()
    with Store.open(url) as store:
        for i in range(2):
            prompt = Conversation((Message("user", f"q{i}"),))
            store.add_item("p", f"{i}", prompt, [Candidate("yes", "model", "adapter"), Candidate("no")])
        authenticator = KeyAuthenticator(KEY, Person("ann", {"p": "annotator"}), "align_key_7861")
        client = TestClient(build_app(store, authenticator, [ORIGIN]), base_url=ORIGIN)
        headers = {"Cookie": f"align_key_7861={KEY}"}
        headers["X-Align"] = client.get("/api/projects", headers=headers).json()["projects"][0]["id"]
        for i in range(2):  # the first vote does all one-time work
            files.clear()
            step = client.get("/api/task", headers=headers).json()
            judgement = {"tiers": [[1], [0]], "strength": 2, "seconds": 3.5}
            vote = {"token": step["task"]["token"], "key": str(i) * 32, "terms": step["terms"], "said": judgement}
            with trace_files(files):
                assert client.post("/api/vote", headers=headers, json=vote).status_code == 200
    with trace_files(files):
        pairs = read_pairs(DataSource("annotations"), VoteSource(url, "p", DEFAULT_SELECTION))
    assert len(pairs) == 2
    paths = [Path(name).resolve() for name in files]
    relative = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
    source_files = {name for name in relative if name.startswith(("align/", "annotate/", "reward/"))}
    path_of_vote = sorted(name for name in source_files if not name.startswith("align/core/"))
    assert {"annotate/web/routes.py", "annotate/store/ledger.py", "align/data/pairs.py"} <= {*path_of_vote}
    assert len(path_of_vote) <= MAX_FILES, path_of_vote
