"""`data.template_kwargs`: part of a run's identity, trained on, and carried by what is published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from workshop import SFT, Workshop

from align.run import read_manifest

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if quiet is defined and quiet %}(quiet) {% endif %}{% endif %}"
)
QUIET = "data.template_kwargs={quiet: true}"


@pytest.fixture
def shop(tmp_path: Path, chats: Path, tiny_model: Path) -> Workshop:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return Workshop(tmp_path / "runs", chats, "model=hub", f"model.path={model}", "project=p")


def prompt_of(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


def test_what_is_trained_on_is_what_is_published(shop: Workshop) -> None:
    short = (*SFT, "stage.max_steps=1")
    plain, quiet = shop.run("sft", *short), shop.run("sft", *short, QUIET)
    assert plain != quiet
    assert read_manifest(quiet).identity["config"]["data"]["template_kwargs"] == {"quiet": True}
    assert prompt_of(plain).endswith("assistant: ")
    assert prompt_of(quiet).endswith("assistant: (quiet) ")
    shop.run("sample", "stage.prompts=4", "stage.candidates=2", f"init=sft:{quiet.name}")  # nobody has to say it again
    assert shop.run("sft", *short, QUIET) == quiet
