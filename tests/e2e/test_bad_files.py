"""Files of models, adapters and runs that hold something else than they should: the user's error, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusing import CONTENTS, VALUES, readers, refused
from workshop import Ready, Workshop

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat import template
from align.data.chat.encode import render, stop_token_ids
from align.data.chat.template import use_template
from align.models.base import find_base
from align.models.load import context_length, load_base, load_tokenizer


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


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

    base = find_base(str(model))
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


@pytest.mark.parametrize(("stage", "wants"), [("sft", "time for an answer"), ("verify", "time"), ("sft", "memory")])
def test_a_template_without_an_end(
    shop: Workshop, tiny_model: Path, chats: Path, tmp_path: Path, stage: str, wants: str
):
    """Nothing of it goes on once it was refused: it was tried in a process of its own."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    behind = "{% if messages[-1].role == 'assistant' %}" + endless + "{% endif %}"
    loops = {"time": endless, "time for an answer": behind, "memory": "{{ 'a' * 10**12 }}"}
    (model / "chat_template.jinja").write_text(loops[wants])
    words = [f"stage={stage}", "model=hub", f"model.path={model}"]
    if stage == "sft":
        words += ["data=jsonl", f"data.path={chats}"]
    said = "it wants more than" if wants == "memory" else "it has not written a few conversations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "PATIENCE_S", 2)
        refused(shop, words, "chat_template", said)


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
@pytest.mark.filterwarnings("ignore:::peft")  # of values that are wrong on purpose
@pytest.mark.parametrize("part", range(3))  # three minutes altogether
def test_every_value_of_an_adapters_configuration_may_be_wrong(
    shop: Workshop, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, part: int
):
    """Each key with every second value, and each value in every second key: all of both would take twice the time."""
    adapter = tmp_path / "adapter"
    shutil.copytree(ready.root / "sft" / "s" / "artifact", adapter)
    whole = json.loads((adapter / "adapter_config.json").read_text())
    words = [*adapter_readers(ready, adapter, tiny_model, chats)["sample"], "stage.prompts=2", f"run.root={shop.root}"]
    faults = []
    for place, key in [*enumerate(whole)][part::3]:
        for value in VALUES[(place // 3) % 2 :: 2]:
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
                    from align.config.compose import check, compose_raw
                    from align.stages import load_stage

                    config = check(compose_raw([*words, f"run.root={root}", "device=cpu"]))
                    load_stage(config.stage.name).inputs(config)
                except InputError:
                    pass
                except Exception as error:
                    faults.append((at, value, words[0], f"{type(error).__name__}: {error}"[:120]))
    assert faults == []
    for content in CONTENTS.values() if key == "whole" else ():
        path.write_bytes(content)
        refused(shop, ["stage=sample", "init=sft:s", *ready.data], "manifest")
