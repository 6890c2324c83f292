"""Each kind of bad file, to each stage that reads it: status 2 with one message that names file and field. Never 0,
never 1, no traceback, nothing published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready, Workshop

from align.data.chat import render, stop_token_ids, use_template
from align.errors import InputError
from align.models.base import find_base
from align.models.load import context_length, load_base, load_tokenizer
from align.run import read_manifest
from align.types import Conversation, Message

DEEP = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"
HALF = "\\ud83d"  # as JSON writes it
CONTENTS = {
    "empty": b"", "no JSON": b"not json\n", "a list": b"[]\n", "a number": b"3\n", "a text": b'"x"\n',
    "null": b"null\n", "cut": b'{"a": ', "deep": DEEP.encode(), "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "binary": b"\xff\xfe\x00", "NUL": b"\x00" * 64,
}  # fmt: skip
"""Of a file that should hold a JSON object."""
VALUES: tuple[Any, ...] = ("x", -1, 2.5, [], {}, [[1]], None, True, 10**30)
"""In place of one of its values."""
CHATS = ["stage.max_steps=1", "stage.batch_size=4", "stage.micro_batch=4", "stage.eval_size=2"]
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
        assert read_manifest(path.parent)["status"] == "failed"
        shutil.rmtree(path.parent)


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


def readers(ready: Ready, model: Path, rows: Path) -> dict[str, list[str]]:
    """Stage → words with which it reads conversations from `rows`."""
    data, base = ["data=jsonl", f"data.path={rows}", "data.held_out=0.25"], ["model=hub", f"model.path={model}"]
    return {
        "sft": ["stage=sft", *base, *data, *CHATS], "full": ["stage=full", *base, *data, *CHATS],
        "sample": ["stage=sample", "init=sft:s", *data], "eval": ["stage=eval", "artifact=sft:s", *data],
        "ppo": [*ready.ppo, *data],
    }  # fmt: skip


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
    from align.data.rows import json_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud83d é"}\n')
    assert [row for _, row in json_rows(path)] == [{"text": "\U0001f600 \\ud83d é"}]


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
    status = shop.ended("stage=sft", "track=mine", "--cfg", "job")
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
    "exit with a message": "def score(c):\n    raise SystemExit('done')",
    "exit later": "import sys\ndef score(c):\n    yield sys.exit(0)",
    "exit as a number": "class N:\n    def __float__(self): raise SystemExit\ndef score(c): return [N() for _ in c]",
    "a generator ends": "def score(c):\n    raise GeneratorExit",
    "cancelled": "import asyncio\ndef score(c):\n    raise asyncio.CancelledError",
    "its own": "class Stop(BaseException): pass\ndef score(c):\n    raise Stop('enough')",
    "its own at import": "class Stop(BaseException): pass\nraise Stop('enough')",
    "half a character": "def score(c):\n    raise ValueError('a\\ud83d')",
    "too large": "def score(c):\n    return [1e300 for _ in c]",
    "far too large": "def score(c):\n    return [10**400 for _ in c]",
    "not a number": "def score(c):\n    return [float('nan') for _ in c]",
    "raised while counted": "def score(c):\n    for _ in c:\n        yield 1.0\n    raise KeyError('late')",
    "nothing": "def score(c):\n    return None",
    "too few": "def score(c):\n    return [1.0]",
    "recursion": "def score(c):\n    return score(c)",
}


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
    assert read_manifest(shop.root / "ppo" / "ctrl")["status"] == "interrupted"


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


@pytest.mark.parametrize("place", ["align.stages.sft.held_out_loss", "align.stages.sft.find_base"])
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


# --- Files of models, adapters and runs

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_models_file_that_holds_something_else(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, file: str
):
    for i, content in enumerate(CONTENTS.values()):
        model = tmp_path / f"model-{i}"
        shutil.copytree(tiny_model, model)
        (model / file).write_bytes(content)
        refused(shop, readers(ready, model, chats)["sft"], "model")


def loaded(model: Path) -> None:
    """What every stage asks of a base before it computes."""
    import torch

    base = find_base(type("M", (), {"path": str(model), "revision": None}))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, None)
    render(tokenizer, Conversation((Message("user", "a"),)), answer_due=True)
    found = load_base(base, "lora", torch.device("cpu"), torch.float32)
    context_length(found)
    stop_token_ids(tokenizer, found.generation_config)


@pytest.mark.slow
@pytest.mark.parametrize("file", MODEL_FILES)
def test_every_value_of_a_models_file_may_be_wrong(tiny_model: Path, tmp_path: Path, file: str):
    """It loads all the same, where nothing depends on the value, or the user's error names the model or the file."""
    whole, failed = json.loads((tiny_model / file).read_text()), []
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    loaded(model)
    for key in whole:
        for value in VALUES:
            (model / file).write_text(json.dumps(whole | {key: value}))
            try:
                loaded(model)
            except InputError as error:
                if not any(name in error.field for name in ("model", ".json", "template", "conversation")):
                    failed.append((key, value, str(error)))
            except Exception as error:
                failed.append((key, value, f"{type(error).__name__}: {error}"[:200]))
    assert failed == []


TEMPLATES = {
    "divides by zero": "{{ 1 // 0 }}", "has no such key": "{{ messages[9].content }}", "adds": "{{ 1 + 'a' }}",
    "calls nothing": "{{ nothing() }}", "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10**9) %}{% endfor %}", "syntax": "{% for %}", "half": "{{ '\ud83d' }}",
    "private": "{{ messages.__class__.__mro__ }}", "unknown tag": "{% nothing %}",
    "in markers": "{% generation %}{{ 1 // 0 }}{% endgeneration %}",
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_fails(shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, kind: str):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATES[kind]}))
    for stage in ("sft", "full"):
        refused(shop, readers(ready, model, chats)[stage], "template")


def test_a_template_without_an_end(tiny_model: Path, chats: Path, tmp_path: Path):
    """In a process of its own: the thread that tries it works until that ends."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    inner = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (model / "chat_template.jinja").write_text(inner)
    code = (
        "import sys; from align.__main__ import main; import align.data.chat as c; c.PATIENCE_S = 1; sys.exit(main())"
    )
    words = ["stage=sft", "model=hub", f"model.path={model}", "data=jsonl", f"data.path={chats}", "device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done
    assert "chat_template" in done.stderr


def adapter_readers(ready: Ready, adapter: Path, model: Path, chats: Path) -> dict[str, list[str]]:
    """Stage → words with which it reads an adapter in a bare folder."""
    base, data = ["model=hub", f"model.path={model}"], [*ready.data]
    return {
        "sample": ["stage=sample", f"init={adapter}", *base, *data],
        "dpo": ["stage=dpo", f"init={adapter}", *base, "data.allow_simulated=true", "data=annotations"],
        "reward": ["stage=reward", f"init={adapter}", *base, "data.allow_simulated=true", "data=annotations"],
        "ppo": [*ready.ppo, f"init={adapter}", *base],
        "ppo, its reward": [*ready.ppo, f"reward.ref={adapter}"],
        "eval": ["stage=eval", f"artifact={adapter}", "init=base", *base, *data],
        "export": ["stage=export", f"artifact={adapter}", *base],
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"])
def test_an_adapters_file_that_holds_something_else(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, file: str
):
    for i, content in enumerate(CONTENTS[kind] for kind in ("empty", "a list", "deep", "binary")):
        adapter = tmp_path / f"adapter-{i}"
        shutil.copytree(ready.root / "sft" / "s" / "artifact", adapter)
        (adapter / file).write_bytes(content)
        for words in adapter_readers(ready, adapter, tiny_model, chats).values():
            refused(shop, words)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))  # three minutes altogether
def test_every_value_of_an_adapters_configuration_may_be_wrong(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, part: int
):
    adapter = tmp_path / "adapter"
    shutil.copytree(ready.root / "sft" / "s" / "artifact", adapter)
    whole = json.loads((adapter / "adapter_config.json").read_text())
    words = [*adapter_readers(ready, adapter, tiny_model, chats)["sample"], "stage.prompts=2", f"run.root={shop.root}"]
    faults = []
    for key in list(whole)[part::3]:
        for value in VALUES:
            (adapter / "adapter_config.json").write_text(json.dumps(whole | {key: value}))
            status = shop.ended(*words, "device=cpu", "rollout.max_new_tokens=2", "resume=never")
            if status not in (0, 2):
                faults.append((key, value, shop.said[-300:]))
    assert faults == []


def paths_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested objects."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
    first, *rest = path
    return {**value, first: replaced(value[first], tuple(rest), new) if rest else new}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["stage", "name", "status", "identity", "inputs", "outputs", "times", "base", "whole"])
def test_a_manifest_with_odd_values(ready: Ready, tiny_model: Path, tmp_path: Path, key: str):
    """Whoever reads it, of itself or behind another run, says that it is no manifest, or has no use for the value."""
    root = tmp_path / "runs"
    shutil.copytree(ready.root, root)
    shop = Workshop(root, root)
    path = root / "sft" / "s" / "manifest.json"
    whole = json.loads(path.read_text())
    paths = [p for p in paths_in(whole) if p[0] == key and len(p) < 4] if key != "whole" else [()]
    paths = [p for p in paths if p[:2] != ("identity", "config") or not p[2:] or p[2] in ("data", "method", "export")]
    faults = []
    for at in paths:
        for value in ("x", -1, [], {}, None) if at else [json.loads(c) for c in (b"[]", b"3", b'"x"', b"{}", b"null")]:
            path.write_text(json.dumps(replaced(whole, at, value) if at else value))
            for words in (["stage=sample", "init=sft:s", *ready.data], ["stage=export", "artifact=sft:latest"]):
                try:
                    import align.stages as stages
                    from align.config.compose import check, compose_raw

                    config = check(compose_raw([*words, f"run.root={root}", "device=cpu"]))
                    stages.importlib.import_module(f"align.stages.{config.stage.name}").inputs(config)
                except InputError:
                    pass
                except Exception as error:
                    faults.append((at, value, words[0], f"{type(error).__name__}: {error}"[:120]))
    assert faults == []
    for content in CONTENTS.values() if key == "whole" else ():
        path.write_bytes(content)
        refused(shop, ["stage=sample", "init=sft:s", *ready.data], "manifest")


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
