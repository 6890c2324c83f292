"""Files of models, adapters and runs with unexpected content are the user's error, and the message names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_values import CONTENTS, VALUES, assert_refused
from stage_commands import Ready, Workshop

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat import template
from align.data.chat.encode import find_stop_token_ids, render
from align.data.chat.template import set_chat_template
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
        with pytest.raises(InputError) as raised:
            load_model(model)
        assert str(model) in str(raised.value)


def load_model(model_path: Path) -> None:
    """Load a base as every stage does before it computes."""
    import torch

    base = find_base(str(model_path))
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, None)
    render(tokenizer, Conversation((Message("user", "a"),)), add_generation_prompt=True)
    base_model = load_base(base, "lora", torch.device("cpu"), torch.float32)
    get_context_length(base_model)
    find_stop_token_ids(tokenizer, base_model.generation_config)


@pytest.mark.slow
@pytest.mark.parametrize("file", MODEL_FILES)
def test_every_value_of_a_models_file_may_be_wrong(tiny_model: Path, tmp_path: Path, file: str):
    """The model loads if nothing depends on the value; otherwise the error names the model or the file."""
    content = json.loads((tiny_model / file).read_text())
    failures = []
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    load_model(model)
    for key in content:
        for value in VALUES:
            (model / file).write_text(json.dumps(content | {key: value}))
            try:
                load_model(model)
            except InputError as error:
                if not any(name in error.field for name in ("model", ".json", "template", "conversation")):
                    failures.append((key, value, str(error)))
            except Exception as error:
                failures.append((key, value, f"{type(error).__name__}: {error}"[:200]))
    assert failures == []


TEMPLATES = (
    "{{ messages[9].content }}",
    "{{ 1 + 'a' }}",
    "{{ nothing() }}",
    "{% nothing %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{% generation %}{{ 1 // 0 }}{% endgeneration %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails(tiny_model: Path, tmp_path: Path, template: str):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError) as raised:
        load_model(model)
    assert "chat template" in str(raised.value)


@pytest.mark.parametrize("wants", ["time for an answer", "memory"])
def test_a_template_without_an_end(shop: Workshop, tiny_model: Path, chats: Path, tmp_path: Path, wants: str):
    """The template is tried in a process of its own, which is killed when the template is refused."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    endless_loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    template_text = "{% if messages[-1].role == 'assistant' %}" + endless_loop + "{% endif %}"
    (model / "chat_template.jinja").write_text("{{ 'a' * 10**12 }}" if wants == "memory" else template_text)
    command = ["stage=sft", "model=hub", f"model.path={model}", "data=jsonl", f"data.path={chats}"]
    message = "it needs more than" if wants == "memory" else "it did not render a few conversations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "PATIENCE_S", 2)
        assert_refused(shop, command, "chat_template", message)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::peft")  # of values that are wrong on purpose
@pytest.mark.parametrize("part", range(3))  # three minutes altogether
def test_every_value_of_an_adapters_configuration_may_be_wrong(
    shop: Workshop, ready: Ready, tiny_model: Path, tmp_path: Path, part: int
):
    """Each key is tried with every second value, and each value in every second key. All combinations would take twice
    the time."""
    adapter = shutil.copytree(ready.root / "sft" / "s" / "artifact", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    command = ["stage=sample", f"init={adapter}", "model=hub", f"model.path={tiny_model}", *ready.data]
    faults = []
    for index, key in [*enumerate(config)][part::3]:
        for value in VALUES[(index // 3) % 2 :: 2]:
            (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
            status = shop.status(*command, "stage.prompts=2", "resume=never")
            if status not in (0, 2):
                faults.append((key, value, shop.output[-300:]))
    assert faults == []


def iter_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key of nested objects."""
    for key, nested in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from iter_paths(nested, (*path, key))


def replace_value(value: Any, path: tuple[str, ...], replacement: Any) -> Any:
    first, *remainder = path
    return {**value, first: replace_value(value[first], tuple(remainder), replacement) if remainder else replacement}
