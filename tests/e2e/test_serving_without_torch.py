"""The annotation server runs without importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from align.annotate.store import Candidate, Store
from align.core.types import Conversation, Message

HEAVY = {"torch", "transformers", "peft", "trl", "datasets"}
SERVED = """
import sys
from pathlib import Path
from starlette.testclient import TestClient
import align.web.server
from align.__main__ import main

def serve(app, host, port, ready):
    with align.web.server.open_listener(host, 0), TestClient(app, base_url=f"http://{host}:{port}") as client:
        ready()
        key = (Path(sys.argv[1]) / "annotate.key").read_text()
        for path in (f"/?key={key}", "/manage/", "/api/projects", "/manage/figures.json?project=p"):
            assert client.get(path).status_code == 200, path

align.web.server.serve_app = serve
words = ("stage=annotate", "stage.action=serve", "stage.demo=true", "project=p", f"run.root={sys.argv[1]}")
status = main(words)
print("loaded", *sys.modules)
sys.exit(status)
"""


def test_the_pages_are_served_without_torch(tmp_path: Path):
    """Run the stage as the command line does, from configuration to report, and request pages and figures."""
    with Store.open(f"sqlite:///{tmp_path / 'annotations.db'}") as store:
        prompt = Conversation((Message("user", "How are you?"),))
        store.add_item("p", "1", prompt, [Candidate("Fine!"), Candidate("Go away.")])
    process = subprocess.run([sys.executable, "-c", SERVED, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    loaded = next(line for line in process.stdout.splitlines() if line.startswith("loaded ")).split()
    assert not HEAVY & set(loaded)
    assert {"align.annotate.web.server", "align.stages.annotate", "matplotlib"} <= set(loaded)
