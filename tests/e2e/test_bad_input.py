"""Each kind of bad file, to each stage that reads it: status 2 with one message that names file and field. Never 0,
never 1, no traceback, nothing published."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refusing import CONTENTS, readers, refused
from workshop import Ready, Workshop

from align.run import read_manifest

HALF = "\\ud83d"  # as JSON writes it
ROWS = {
    "messages": '{"messages": [{"role": "user", "content": "a%s"}, {"role": "assistant", "content": "b"}]}',
    "answer": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b%s"}]}',
    "prompt": '{"prompt": "a%s", "completion": "b"}',
    "completion": '{"prompt": "a", "completion": "b%s"}',
    "text": '{"text": "a%s"}',
    "unused": '{"text": "a", "note": "b%s"}',
    "key": '{"text": "a", "note%s": "b"}',
}
PAIRS = {
    "trl": '{"prompt": "a%s", "chosen": "b", "rejected": "c"}',
    "chosen": '{"prompt": "a", "chosen": "b%s", "rejected": "c"}',
    "lists": '{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],'
    ' "rejected": [{"role": "assistant", "content": "c%s"}]}',
    "hh": '{"chosen": "\\n\\nHuman: a%s\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
    "helpsteer": '{"prompt": "a", "response": "b%s", "helpfulness": 1}',
    "helpsteer3": '{"context": [{"role": "user", "content": "a%s"}], "response1": "b", "response2": "c",'
    ' "overall_preference": 1}',
    "nectar": '{"prompt": "a", "answers": [{"answer": "b%s", "rank": 1}, {"answer": "c", "rank": 2}]}',
}
ITEMS = {
    "prompt": '{"prompt": "a%s", "answers": ["b", "c"]}',
    "answers": '{"prompt": "a", "answers": ["b", "c%s"]}',
    "text": '{"prompt": "a", "answers": [{"text": "b%s"}, "c"]}',
    "model": '{"prompt": "a", "answers": [{"text": "b", "model": "%s"}, "c"]}',
    "sampling": '{"prompt": "a", "answers": [{"text": "b", "sampling": {"x": "%s"}}, "c"]}',
    "id": '{"id": "%s", "prompt": "a", "answers": ["b", "c"]}',
}


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


def pair_readers(rows: Path) -> dict[str, list[str]]:
    data = ["data=jsonl", f"data.path={rows}"]
    return {stage: [f"stage={stage}", "init=sft:s", *data] for stage in ("reward", "dpo")}


@pytest.mark.parametrize("column", ROWS)
def test_half_a_character_in_a_conversation(
    shop: Workshop, ready: Ready, tiny_model: Path, tmp_path: Path, column: str
):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([ROWS[column] % "", ROWS[column] % "", ROWS[column] % HALF]) + "\n")
    for words in readers(ready, tiny_model, path).values():
        refused(shop, words, "rows.jsonl, row 3, ", "half a character", "U+D83D")


@pytest.mark.parametrize("column", PAIRS)
def test_half_a_character_in_a_pair(shop: Workshop, tmp_path: Path, column: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(PAIRS[column] % "" + "\n" + PAIRS[column] % HALF + "\n")
    for words in pair_readers(path).values():
        refused(shop, words, "rows.jsonl, row 2, ", "half a character", "U+D83D")


@pytest.mark.parametrize("column", ITEMS)
def test_half_a_character_in_an_item(shop: Workshop, tmp_path: Path, column: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(ITEMS[column] % "" + "\n" + ITEMS[column] % HALF + "\n")
    words = ["stage=annotate", "stage.action=import", f"stage.path={path}"]
    refused(shop, [*words, "project=half"], "rows.jsonl, row 2, ", "half a character")


def test_whole_characters_pass(tmp_path: Path):
    from align.data.read.rows import checked_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud83d é"}\n')
    assert [row.data for row in checked_rows(path)] == [{"text": "\U0001f600 \\ud83d é"}]


@pytest.mark.parametrize(
    "key", ["project", "run.name", "data.path", "model.path", "store.url", "init", "track.project"]
)
def test_half_a_character_on_the_command_line(
    shop: Workshop, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
):
    """Bytes that are no UTF-8 reach Python as lone surrogates; a group file may write one as an escape."""
    shown = "***" if key == "store.url" else "a\\udcffb"
    refused(shop, ["stage=sft", f"{key}=a\udcffb"], f"{key}={shown}", "UTF-8")
    if key == "store.url":
        monkeypatch.setenv("ALIGN_STORE_URL", "sqlite:///a\udcff.db")
        refused(shop, ["stage=sft"], "store.url", "UTF-8")
        monkeypatch.undo()
    (tmp_path / "conf" / "track").mkdir(parents=True)
    group, _, leaf = key.partition(".")
    said = f'{group}:\n  {leaf}: "a\\ud83d"\n' if leaf else f'{group}: "a\\ud83d"\n'
    (tmp_path / "conf" / "track" / "mine.yaml").write_text(f"# @package _global_\ndefaults: [/track/none]\n{said}")
    monkeypatch.chdir(tmp_path)
    stage = "sample" if key == "init" else "sft"  # which has an `init` of its own in its file
    status = shop.ended(f"stage={stage}", "track=mine", "--cfg", "job")
    assert status == 2, shop.said


def test_half_a_character_in_lines(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "align", "-"], input=b"stage=sft project=\xff\n", capture_output=True, cwd=tmp_path,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert b"project=\\udcff" in done.stderr


@pytest.mark.parametrize("content", CONTENTS)
def test_rows_that_are_none(shop: Workshop, ready: Ready, tiny_model: Path, tmp_path: Path, content: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(CONTENTS[content])
    annotate = [["stage=annotate", f"stage.action={a}", f"stage.path={path}"] for a in ("import", "restore")]
    annotate[1] += [f"store.url=sqlite:///{tmp_path}/new.db"]
    for words in (*readers(ready, tiny_model, path).values(), *pair_readers(path).values(), *annotate):
        refused(shop, words, "rows.jsonl")


# --- What the user's function does

FUNCTIONS = {
    "exit at import": "import sys\nsys.exit(0)",
    "exit": "import sys\ndef score(c):\n    sys.exit(0)",
    "too large": "def score(c):\n    return [1e300 for _ in c]",
}
"""One for each place that may fail; what else a function may do is in `test_scorers`."""


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_a_function_raises_is_its_own(
    shop: Workshop, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    name = f"mine_{list(FUNCTIONS).index(kind)}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS[kind] + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = [word for word in ready.ppo if not word.startswith("reward")]
    part = f"{{name: fn, fn: '{name}:score'}}"
    for reward in (["reward=fn", f"reward.fn={name}:score"], ["reward=sum", f"reward.parts=[{part}]"]):
        refused(shop, [*own, *reward], f"reward.fn={name}:score")


def test_ctrl_c_in_a_function_is_an_interruption(
    shop: Workshop, ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine_ctrl.py").write_text("def score(c):\n    raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = [word for word in ready.ppo if not word.startswith("reward")]
    words = [*own, "reward=fn", "reward.fn=mine_ctrl:score", f"run.root={shop.root}", "run.name=ctrl"]
    assert shop.ended(*words) == 130
    assert read_manifest(shop.root / "ppo" / "ctrl").status == "interrupted"


# --- Too little memory


def shortages() -> Iterator[Callable[[], object]]:
    """What asks for more memory than there is, each by another allocator."""
    import numpy
    import torch

    yield lambda: torch.empty(1 << 50)
    yield lambda: bytearray(1 << 60)
    yield lambda: numpy.empty(1 << 50)
    yield lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory"))
    yield lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    yield lambda: (_ for _ in ()).throw(RuntimeError("std::bad_alloc"))
    yield lambda: (_ for _ in ()).throw(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"))


@pytest.mark.parametrize("place", ["align.evals.held_out.held_out_loss", "align.stages.sft.find_base"])
def test_too_little_memory_is_not_our_fault(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    for ask in shortages():
        monkeypatch.setattr(place, lambda *_, ask=ask, **__: ask())
        refused(shop, readers(ready, tiny_model, chats)["sft"], "memory=", "too little", "stage.micro_batch")


def test_too_little_memory_while_a_model_loads(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    """Loaders blame the files for whatever goes wrong."""
    from align.models.load import AutoModelForCausalLM

    for ask in shortages():
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, ask=ask, **__: ask())
        refused(shop, readers(ready, tiny_model, chats)["sft"], "memory=", "too little")


# --- Settings


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("device=cpu:7", ["device=cpu:7"]), ("device=cuda:99", ["device=cuda:99"]), ("run.name=a\nb", ["run.name="]),
        ("run.name=a\x1bb", ["run.name="]), ("store.url=sqlite://", ["store.url=sqlite://", "in memory"]),
        ("store.url=sqlite:///:memory:", ["store.url", "in memory"]), ("run.root=https://h/x", ["run.root=https://h/x"]),
    ],
)  # fmt: skip
def test_settings_that_were_taken_in_silence(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, setting: str, parts: list[str]
):
    words = readers(ready, tiny_model, chats)["sft"]
    status = shop.ended(*words, f"run.root={shop.root}", setting)
    assert status == 2, shop.said
    assert not [part for part in parts if part not in shop.said], shop.said
