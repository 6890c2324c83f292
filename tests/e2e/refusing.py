"""What tests of bad input share: contents and values that nobody expects, and what has to become of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from workshop import Ready, Workshop

from align.run import read_manifest

DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"
CONTENTS = {
    "empty": b"", "no JSON": b"not json\n", "a list": b"[]\n", "a number": b"3\n", "a text": b'"x"\n',
    "null": b"null\n", "cut": b'{"a": ', "deep": DEEP.encode(), "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "binary": b"\xff\xfe\x00", "NUL": b"\x00" * 64,
}  # fmt: skip
"""Of a file that should hold a JSON object."""
VALUES: tuple[Any, ...] = ("x", -1, 2.5, [], {}, [[1]], None, True, 10**30)
"""In place of one of its values."""

CHATS = ["stage.max_steps=1", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2"]


def refused(shop: Workshop, words: list[str], *parts: str) -> None:
    """Status 2, one message with these parts, and nothing done."""
    before = {p: p.read_bytes() for p in shop.root.glob("*/*/manifest.json")}
    status = shop.ended(*words, f"run.root={shop.root}", "device=cpu", "resume=never")
    assert status == 2, (words, status, shop.said)
    said = shop.said[shop.said.rindex("align: ") :]
    assert "Traceback" not in shop.said
    assert not [part for part in parts if part not in said], said
    said.encode()  # can be written
    for path in set(shop.root.glob("*/*/manifest.json")) - before.keys():
        assert read_manifest(path.parent).status == "failed"
        shutil.rmtree(path.parent)


def readers(ready: Ready, model: Path, rows: Path) -> dict[str, list[str]]:
    """Stage → words with which it reads conversations from `rows`."""
    data, base = ["data=jsonl", f"data.path={rows}", "data.held_out=0.25"], ["model=hub", f"model.path={model}"]
    short = "rollout.max_new_tokens=12"
    return {
        "sft": ["stage=sft", *base, *data, *CHATS], "full": ["stage=full", *base, *data, *CHATS],
        "sample": ["stage=sample", "init=sft:s", short, *data],
        "eval": ["stage=eval", "artifact=sft:s", short, *data],
        "ppo": [*ready.ppo, *data],
    }  # fmt: skip
