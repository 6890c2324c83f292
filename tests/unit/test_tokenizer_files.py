"""A tokenizer is read from files that a digest names, and has no token without an embedding in its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_folders import copy_model, find_folder_base

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompts
from align.models.load import load_tokenizer
from align.run import list_unhashed_files


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return copy_model(tiny_model, tmp_path)


@pytest.mark.parametrize("where", ["beside the weights", "beside an adapter"])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(copy: Path, tmp_path: Path, where: str) -> None:
    base = find_folder_base(copy)
    folder = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(base)
    assert max(tokenizer.get_vocab().values()) == 319  # the embedding has 320 rows
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(str(copy if where == "beside the weights" else folder))
    base = find_folder_base(copy)
    with pytest.raises(InputError) as caught:
        load_tokenizer(base, None if where == "beside the weights" else folder)
    assert caught.value.field == "model.path"
    for part in ("321 ids", "<one more>", "320 rows", "resize_token_embeddings(321)"):
        assert part in str(caught.value)


def test_a_tokenizer_is_read_from_what_its_digest_names(copy: Path) -> None:
    """A folder of templates would replace those of the tokenizer; a tokenizer class may look for any file name."""
    base = find_folder_base(copy)
    templates = copy / "additional_chat_templates"
    templates.mkdir()
    (templates / "default.jinja").write_text("{{ 'another' }}")
    with pytest.raises(InputError, match=r"not covered by the model's digest \(additional_chat_templates in"):
        load_tokenizer(base)
    assert list_unhashed_files(copy, ["bpe.codes", "tokenizer.json"]) == ["additional_chat_templates"]
    (copy / "bpe.codes").write_text("")
    assert list_unhashed_files(copy, ["bpe.codes", "tokenizer.json"]) == ["additional_chat_templates", "bpe.codes"]


def test_of_several_templates_the_default_one_is_used(copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert load_tokenizer(find_folder_base(copy)).chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("written", ["by nobody", "by the template", "as padding"])
def test_a_special_token_beyond_the_embedding_is_one_that_nobody_writes(copy: Path, written: str) -> None:
    """Gemma 3 has such a token, for images, in its text models."""
    base = find_folder_base(copy)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if written == "by the template":
        tokenizer.chat_template += "<image>"
    if written == "as padding":
        tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(str(copy))
    base = find_folder_base(copy)
    if written == "by nobody":
        conversation = Conversation((Message("user", "What is <image>?"),))
        (prompt,), _ = encode_prompts(load_tokenizer(base), [conversation], 100)
        assert max(prompt.input_ids) < 320
    else:
        with pytest.raises(InputError, match="<image>"):
            load_tokenizer(base)
