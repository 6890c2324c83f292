"""`data.template_kwargs`: part of a run's identity, used in training, and saved with the published model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stage_commands import SFT, Workshop
from transformers import AutoTokenizer

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


def format_prompt(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


def test_what_is_trained_on_is_what_is_published(shop: Workshop) -> None:
    settings = (*SFT, "stage.max_steps=1")
    plain_run = shop.run("sft", *settings)
    quiet_run = shop.run("sft", *settings, QUIET)
    assert plain_run != quiet_run
    assert read_manifest(quiet_run).identity["config"]["data"]["template_kwargs"] == {"quiet": True}
    assert format_prompt(plain_run).endswith("assistant: ")
    assert format_prompt(quiet_run).endswith("assistant: (quiet) ")
    # The stage inherits the setting from the run.
    shop.run("sample", "stage.prompts=4", "stage.candidates=2", f"init=sft:{quiet_run.name}")
    assert shop.run("sft", *settings, QUIET) == quiet_run
