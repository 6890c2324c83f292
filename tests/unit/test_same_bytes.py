"""Files that change between hashing and loading, or while they are read."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import copy_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.core.errors import CorruptFile
from align.data.read.rows import iter_valid_rows
from align.data.sources import build_files_input
from align.models.adapters import WEIGHTS_FILE, add_new_adapter, attach_adapter, read_tensors, save_adapter
from align.models.base import find_base
from align.models.load import load_base, load_classifier
from align.models.lora import Lora
from align.run import load_artifact
from align.run.digests import HASHED, SETTLED_S, file_digest, files_digest, lookup_digest, require_same_bytes

CPU = torch.device("cpu")
LONG_AGO = SETTLED_S + 3600


@pytest.fixture(autouse=True)
def nothing_hashed() -> Iterator[None]:
    HASHED.clear()
    yield
    HASHED.clear()


def settle_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move the clock forward so that every file written so far counts as settled."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + LONG_AGO)


def swap(path: Path, old: bytes = b"old", new: bytes = b"new") -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


def replace_file(path: Path) -> None:
    replacement = path.with_name("other")
    replacement.write_bytes(path.read_bytes().replace(b"old", b"new"))
    shutil.copystat(path, replacement)
    replacement.replace(path)


def edit_in_place(path: Path) -> None:
    before = path.stat()
    swap(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `touch -r` hides it


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": replace_file,
    "in place, its time set back": edit_in_place,
    "cut": lambda path: os.truncate(path, 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_hashing_and_loading(
    change: str, settled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old bytes")
    if settled:
        settle_clock(monkeypatch)
    lookup_digest(path)
    CHANGES[change](path)
    with (
        pytest.raises(CorruptFile, match="file changed after it was hashed"),
        require_same_bytes([path], "field", "shown"),
    ):
        pytest.fail("it was read")


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read(
    change: str, settled: bool, hashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old bytes")
    if settled:
        settle_clock(monkeypatch)
    if hashed:
        lookup_digest(path)
    with (
        pytest.raises(CorruptFile, match="file changed while it was read"),
        require_same_bytes([path], "field", "shown"),
    ):
        CHANGES[change](path)


def test_a_second_change_within_a_tick_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh files are hashed again, since both versions may have equal time stamps."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    state = os.stat(path)
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: state)
    lookup_digest(path)
    with pytest.raises(CorruptFile, match="changed while it was read"), require_same_bytes([path], "field", "shown"):
        path.write_bytes(b"new")
    with pytest.raises(CorruptFile, match="changed after it was hashed"), require_same_bytes([path], "field", "shown"):
        pytest.fail("it was read")


def test_a_link_or_other_rights_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    settle_clock(monkeypatch)
    lookup_digest(path)
    with require_same_bytes([path], "field", "shown"):
        os.link(path, tmp_path / "link")
    path.chmod(0o600)
    with require_same_bytes([path], "field", "shown", files_digest([path])):
        path.chmod(0o640)


def test_a_settled_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    settle_clock(monkeypatch)
    digest = files_digest([path])
    hashed_paths: list[Path] = []
    monkeypatch.setattr("align.run.digests.file_digest", lambda path: hashed_paths.append(path) or file_digest(path))
    with require_same_bytes([path], "field", "shown", digest):
        pass
    assert hashed_paths == []


# Bases, adapters and rows that the product loads


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return copy_model(tiny_model, tmp_path)


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    base = find_base(str(model))
    tuned = add_new_adapter(load_base(base, "lora", CPU, torch.float32), Lora(4, 8))
    save_adapter(tuned, tmp_path / "adapter", base)
    return tmp_path / "adapter"


def write_other_weights(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("load", [load_base, load_classifier])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_base_that_was_replaced_after_it_was_hashed(load: Any, method: str, model: Path) -> None:
    base = find_base(str(model))
    write_other_weights(model / "model.safetensors")
    with pytest.raises(CorruptFile, match=r"model\.safetensors changed after it was hashed"):
        load(base, method, CPU, torch.float32)
    HASHED.clear()  # as in another process, such as a rank, that receives the digest
    with pytest.raises(CorruptFile, match="is not what was hashed"):
        load(base, method, CPU, torch.float32)


def test_a_base_that_is_replaced_while_it_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = find_base(str(model))
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def replace_then_load(*args: Any, **kwargs: Any) -> Any:
        write_other_weights(model / "model.safetensors")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", replace_then_load)
    with pytest.raises(CorruptFile, match=r"model\.safetensors changed while it was read"):
        load_base(base, "lora", CPU, torch.float32)


@pytest.mark.parametrize("scored", [True, False])
def test_an_adapter_that_was_replaced_after_it_was_hashed(scored: bool, model: Path, adapter: Path) -> None:
    assert load_artifact(adapter, "adapter").digest
    loaded = load_base(find_base(str(model)), "lora", CPU, torch.float32)
    write_other_weights(adapter / WEIGHTS_FILE)
    with pytest.raises(CorruptFile, match=f"{WEIGHTS_FILE} changed after it was hashed"):
        attach_adapter(loaded, adapter, "default", is_reward_model=scored)
    with pytest.raises(CorruptFile, match=f"{WEIGHTS_FILE} changed after it was hashed"):
        read_tensors(adapter)


def test_an_adapter_that_is_replaced_while_it_is_loaded(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    load_artifact(adapter, "adapter")
    loaded = load_base(find_base(str(model)), "lora", CPU, torch.float32)
    from_pretrained = PeftModel.from_pretrained

    def replace_then_load(*args: Any, **kwargs: Any) -> Any:
        write_other_weights(adapter / WEIGHTS_FILE)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(PeftModel, "from_pretrained", replace_then_load)
    with pytest.raises(CorruptFile, match=f"{WEIGHTS_FILE} changed while it was read"):
        attach_adapter(loaded, adapter, "default")
    assert not any("lora" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_rows_that_changed_after_they_were_hashed(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    write_prompts(path, ["a"] * 5)
    build_files_input(str(path), "data.path")
    assert len(list(iter_valid_rows(path))) == 5
    write_prompts(path, ["b"] * 5)
    with pytest.raises(CorruptFile, match="changed after it was hashed"):
        list(iter_valid_rows(path))


def test_rows_that_are_added_while_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_prompts(path, ["a"] * 5)
    build_files_input(str(path), "data.path")
    rows = iter_valid_rows(path)
    next(rows)
    with path.open("a") as file:
        file.write('{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(CorruptFile, match="changed while it was read"):
        list(rows)


def write_prompts(path: Path, prompts: list[str]) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": prompts, "completion": prompts}), path)
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{p},{p}\n" for p in prompts))
    else:
        text = "".join(f'{{"prompt": "{p}", "completion": "{p}"}}\n' for p in prompts).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
