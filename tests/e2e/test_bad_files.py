"""Files of models, adapters and runs that hold something else than they should: the user's error, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusing import CONTENTS, VALUES, refused
from workshop import Ready, Workshop

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat import template
from align.data.chat.encode import find_stop_token_ids, render
from align.data.chat.template import use_template
from align.models.base import find_base
from align.models.load import get_context_length, load_base, load_tokenizer


@pytest.fixture
def shop(ready: Ready) -> Workshop:
    return Workshop(ready.root, ready.root)


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_models_file_that_holds_something_else(tiny_model: Path, tmp_path: Path, file: str):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for content in CONTENTS.values():
        (model / file).write_bytes(content)
        with pytest.raises(InputError) as refused:
            loaded(model)
        assert str(model) in str(refused.value)


def loaded(model: Path) -> None:
    """What every stage asks of a base before it computes."""
    import torch

    base = find_base(str(model))
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, None)
    render(tokenizer, Conversation((Message("user", "a"),)), add_generation_prompt=True)
    found = load_base(base, "lora", torch.device("cpu"), torch.float32)
    get_context_length(found)
    find_stop_token_ids(tokenizer, found.generation_config)


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


TEMPLATES = (
    "{{ messages[9].content }}", "{{ 1 + 'a' }}", "{{ nothing() }}", "{% nothing %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for i in range(10**9) %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}", "{% generation %}{{ 1 // 0 }}{% endgeneration %}",
)  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails(tiny_model: Path, tmp_path: Path, template: str):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError) as refused:
        loaded(model)
    assert "chat template" in str(refused.value)


@pytest.mark.parametrize("wants", ["time for an answer", "memory"])
def test_a_template_without_an_end(shop: Workshop, tiny_model: Path, chats: Path, tmp_path: Path, wants: str):
    """Nothing of it goes on once it was refused: it was tried in a process of its own."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    behind = "{% if messages[-1].role == 'assistant' %}" + endless + "{% endif %}"
    (model / "chat_template.jinja").write_text("{{ 'a' * 10**12 }}" if wants == "memory" else behind)
    words = ["stage=sft", "model=hub", f"model.path={model}", "data=jsonl", f"data.path={chats}"]
    said = "it wants more than" if wants == "memory" else "it has not written a few conversations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "PATIENCE_S", 2)
        refused(shop, words, "chat_template", said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::peft")  # of values that are wrong on purpose
@pytest.mark.parametrize("part", range(3))  # three minutes altogether
def test_every_value_of_an_adapters_configuration_may_be_wrong(
    shop: Workshop, ready: Ready, tiny_model: Path, tmp_path: Path, part: int
):
    """Each key with every second value, and each value in every second key: all of both would take twice the time."""
    adapter = shutil.copytree(ready.root / "sft" / "s" / "artifact", tmp_path / "adapter")
    whole = json.loads((adapter / "adapter_config.json").read_text())
    words = ["stage=sample", f"init={adapter}", "model=hub", f"model.path={tiny_model}", *ready.data]
    faults = []
    for place, key in [*enumerate(whole)][part::3]:
        for value in VALUES[(place // 3) % 2 :: 2]:
            (adapter / "adapter_config.json").write_text(json.dumps(whole | {key: value}))
            status = shop.status(*words, "stage.prompts=2", "resume=never")
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
