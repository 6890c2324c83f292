"""Bad file contents and bad values for tests of input errors, and an assertion that a command refuses them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stage_commands import Ready, Workshop

from align.run import read_manifest

DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"
CONTENTS = {
    "empty": b"",
    "no JSON": b"not json\n",
    "a list": b"[]\n",
    "a number": b"3\n",
    "a text": b'"x"\n',
    "null": b"null\n",
    "cut": b'{"a": ',
    "deep": DEEP.encode(),
    "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "binary": b"\xff\xfe\x00",
    "NUL": b"\x00" * 64,
}
"""Contents of a file that should hold a JSON object."""
VALUES: tuple[Any, ...] = ("x", -1, 2.5, [], {}, [[1]], None, True, 10**30)
"""Values that replace one of the object's values."""

CHATS = ["stage.max_steps=1", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2"]


def assert_refused(shop: Workshop, words: list[str], *parts: str) -> None:
    """Assert that a command exits with status 2 and a message with these parts, and that its run failed."""
    manifests = {p: p.read_bytes() for p in shop.root.glob("*/*/manifest.json")}
    status = shop.run_command(*words, f"run.root={shop.root}", "device=cpu", "resume=never")
    assert status == 2, (words, status, shop.output)
    message_text = shop.output[shop.output.rindex("align: ") :]
    assert "Traceback" not in shop.output
    assert not [part for part in parts if part not in message_text], message_text
    message_text.encode()  # fails if the message cannot be written
    for path in set(shop.root.glob("*/*/manifest.json")) - manifests.keys():
        assert read_manifest(path.parent).status == "failed"
        shutil.rmtree(path.parent)


def build_reading_commands(ready: Ready, model: Path, rows: Path) -> dict[str, list[str]]:
    """Return the command of each stage that reads conversations from `rows`."""
    data = ["data=jsonl", f"data.path={rows}", "data.held_out=0.25"]
    base = ["model=hub", f"model.path={model}"]
    short = "rollout.max_new_tokens=12"
    return {
        "sft": ["stage=sft", *base, *data, *CHATS],
        "full": ["stage=full", *base, *data, *CHATS],
        "sample": ["stage=sample", "init=sft:s", short, *data],
        "eval": ["stage=eval", "artifact=sft:s", short, *data],
        "ppo": [*ready.ppo, *data],
    }
