"""The built-in model is complete and small, and transformers and sentencepiece tokenise it alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece as spm
from transformers import AutoTokenizer

from align.core.errors import CorruptFile
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_conversation, find_stop_token_ids
from align.models import base
from align.models.base import find_base
from align.run import file_digest

CHAT_SYMBOLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEXTS = (
    "Hello there, how are you doing today?",
    "no way!! 😀  two  spaces\nand a new line",
    " starts with a space",
    "naïve café 日本 12345",
)


def test_every_file_is_in_the_manifest_with_its_hash() -> None:
    digests = json.loads((base.POCKET_FOLDER / "manifest.json").read_text())["sha256"]
    files = {p.name for p in base.POCKET_FOLDER.iterdir()} - {"manifest.json"}
    assert files == set(digests)
    assert all(file_digest(base.POCKET_FOLDER / name) == digest for name, digest in digests.items())


def test_it_takes_at_most_16_mb() -> None:
    assert sum(p.stat().st_size for p in base.POCKET_FOLDER.iterdir()) <= 16 * 2**20


def test_it_is_what_no_model_means() -> None:
    assert find_base().digest == find_base(path="pocket").digest


def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "pocket"
    shutil.copytree(base.POCKET_FOLDER, copy)
    monkeypatch.setattr(base, "POCKET_FOLDER", copy)
    assert base.find_pocket_folder() == copy
    blob = bytearray((copy / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (copy / "model.safetensors").write_bytes(blob)
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        base.find_pocket_folder()


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_and_sentencepiece_tokenise_alike(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.POCKET_FOLDER)
    pieces = spm.SentencePieceProcessor(str(base.POCKET_FOLDER / "tokenizer.model"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text


def test_chat_symbols_are_control_tokens_of_one_piece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.POCKET_FOLDER)
    pieces = spm.SentencePieceProcessor(str(base.POCKET_FOLDER / "tokenizer.model"))
    for symbol in CHAT_SYMBOLS:
        (id,) = tokenizer(symbol, add_special_tokens=False)["input_ids"]
        assert pieces.id_to_piece(id) == symbol
        assert pieces.is_control(id)


def test_its_turns_end_with_its_eos_and_only_answers_are_trained() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.POCKET_FOLDER)
    chat = Conversation((Message("user", "hi"), Message("assistant", "hello")))
    encoded = encode_conversation(tokenizer, chat)
    trained = [i for i in encoded.labels if i >= 0]
    assert tokenizer.decode(trained) == "hello<|end|>"
    assert find_stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
