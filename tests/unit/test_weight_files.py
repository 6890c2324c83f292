"""Weights are read only from hashed files, in each way in which a folder can offer weights that its digest does not
cover."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import INDEX, SINGLE, Trap, copy_model, find_folder_base
from safetensors.torch import load_file, save_file

from align.core.errors import CorruptFile, InputError
from align.models.adapters import WEIGHTS_FILE
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.run import Base, load_artifact, model_files

CPU = torch.device("cpu")
BESIDE = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "added_tokens.json": b"{}",
}
SHARDS = {
    INDEX: json.dumps(
        {"metadata": {}, "weight_map": {f"{c}": f"model-0000{n}-of-00002.safetensors" for n, c in ((1, "a"), (2, "b"))}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return copy_model(tiny_model, tmp_path)


@pytest.fixture
def other(copy: Path, tmp_path: Path) -> Path:
    """Other weights of the same shapes, outside the model's folder."""
    tensors = {k: torch.full_like(v, 0.5) for k, v in load_file(copy / SINGLE).items()}
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    return tmp_path / "other.safetensors"


def load_lora_base(base: Base) -> Any:
    return load_base(base, "lora", CPU, torch.float32)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_shards(folder: Path) -> None:
    """Save the same model in several files."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()


def save_shards_naming(folder: Path, name: str, inside: bool = True) -> None:
    """Save shards, and give the first another name in the index, and on disk if `inside`."""
    save_shards(folder)
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {k: name if v == first else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    if inside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / first).rename(folder / name)


# Identity


@pytest.mark.parametrize("files", [{SINGLE: b"weights"}, SHARDS])
def test_a_digest_covers_what_is_read_and_nothing_else(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in {**files, **BESIDE, "README.md": b"words"}.items():
        (tmp_path / name).write_bytes(content)
    digest = find_folder_base(tmp_path).digest
    assert load_artifact(tmp_path, "here").digest == digest
    assert {p.name for p in model_files(tmp_path)} == {*files, *BESIDE}
    # Other files do not change the digest, even under names that transformers would read.
    for name in ("decoy.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"other")
    (tmp_path / "pytorch_model.bin").write_bytes(b"other")
    assert find_folder_base(tmp_path).digest == digest


def test_the_built_in_model_keeps_its_digest() -> None:
    assert find_base().digest == "2c543987f3b531eebf7704a12dc68bb651a72bf11943caeeec99fd0b86b608a0"


def test_an_adapter_keeps_its_digest(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / WEIGHTS_FILE).write_text("weights")
    digest = load_artifact(tmp_path, "here").digest
    (tmp_path / "decoy.safetensors").write_text("other")
    assert load_artifact(tmp_path, "here").digest == digest


# Weights come from the files that the digest names.


def add_file(name: str) -> Callable[[Path, Path], None]:
    def add(folder: Path, other: Path) -> None:
        if name.endswith("safetensors"):
            shutil.copy(other, folder / name)
        else:
            torch.save(load_file(other), folder / name)

    return add


def add_index(folder: Path, other: Path) -> None:
    shutil.copy(other, folder / "shard.safetensors")
    names = dict.fromkeys(load_file(other), "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def add_subfolder(folder: Path, other: Path) -> None:
    (folder / "weights").mkdir()
    shutil.copy(other, folder / "weights" / SINGLE)


def add_distributed_checkpoint(folder: Path, other: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(folder / "sprung")))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Trap(folder / "sprung")))


def add_custom_code(folder: Path, other: Path) -> None:
    (folder / "modeling_x.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\nclass X: ...\n")
    names = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": "modeling_x.X"}
    edit_json(folder / "config.json", auto_map=names)


def add_trapped_pickles(folder: Path, other: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "tokenizer.pkl", "vocab.pkl", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(folder / "sprung")))


PASSED_OVER = {
    "a pickle beside": add_file("pytorch_model.bin"),
    "a trapped pickle": add_trapped_pickles,
    "a decoy beside": add_file("decoy.safetensors"),
    "a variant beside": add_file("model.fp16.safetensors"),
    "an adapter's weights beside": add_file("adapter_model.safetensors"),
    "an index beside": add_index,
    "a shard of transformers' own distributed format": add_file("shard-00001-model-00001-of-00001.safetensors"),
    "a sub-folder": add_subfolder,
    "a distributed checkpoint": add_distributed_checkpoint,
    "code of its own": add_custom_code,
}


@pytest.mark.parametrize("offer", PASSED_OVER)
def test_what_lies_beside_the_weights_is_never_read(copy: Path, tiny_model: Path, other: Path, offer: str) -> None:
    PASSED_OVER[offer](copy, other)
    model = load_lora_base(find_folder_base(copy))
    load_tokenizer(find_folder_base(copy))
    assert not (copy / "sprung").exists()
    expected_tensors = load_file(tiny_model / SINGLE)
    assert all(
        torch.equal(tensor, expected_tensors[name])
        for name, tensor in model.named_parameters()
        if name in expected_tensors
    )
    assert model.name_or_path == model.config.name_or_path == str(copy)


def replace_weights(*names: str) -> Callable[[Path, Path], None]:
    """Replace the weights by files of other names."""

    def replace(folder: Path, other: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            add_file(name)(folder, other)

    return replace


def rename_to_gguf(folder: Path, other: Path) -> None:
    (folder / SINGLE).rename(folder / "model.gguf")


def set_config(**config: Any) -> Callable[[Path, Path], None]:
    return lambda folder, other: edit_json(folder / "config.json", **config)


def store_tensor(dtype: torch.dtype, name: str = "weight") -> Callable[[Path, Path], None]:
    """Store a tensor in another dtype, without a quantisation entry in the configuration."""

    def spoil(folder: Path, other: Path) -> None:
        tensors = load_file(folder / SINGLE)
        tensors[f"model.layers.0.mlp.up_proj.{name}"] = torch.zeros(8, 4).to(dtype)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return spoil


def add_adapter_config(folder: Path, other: Path) -> None:
    """Add an adapter's configuration, which transformers would apply to the weights."""
    other_base = shutil.copytree(folder, folder.parent / "elsewhere")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(other_base)})
    )


def name_shard(name: str, inside: bool = True) -> Callable[[Path, Path], None]:
    return lambda folder, other: save_shards_naming(folder, name, inside)


REFUSED = {
    "a pickle alone": (replace_weights("pytorch_model.bin"), InputError, "pytorch_model.bin"),
    "a pickle and a decoy": (
        replace_weights("pytorch_model.bin", "decoy.safetensors"),
        InputError,
        "decoy.safetensors",
    ),
    "a decoy alone": (replace_weights("decoy.safetensors"), InputError, "decoy.safetensors"),
    "a variant alone": (replace_weights("model.fp16.safetensors"), InputError, "model.fp16.safetensors"),
    "nothing": (replace_weights(), InputError, "no safetensors"),
    "a GGUF file alone": (rename_to_gguf, InputError, "model.gguf"),
    "a shard above": (name_shard("../other.safetensors"), InputError, "../other.safetensors"),
    "a shard in a sub-folder": (name_shard("sub/one.safetensors"), InputError, "sub/one.safetensors"),
    "a shard by its whole path": (name_shard("/etc/passwd", inside=False), InputError, "/etc/passwd"),
    "a shard that is a folder": (name_shard("..", inside=False), InputError, "'..'"),
    "a pickled shard": (name_shard("one.bin"), InputError, "one.bin"),
    "a missing shard": (name_shard("absent.safetensors", inside=False), CorruptFile, "absent.safetensors"),
    "GPTQ": (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), InputError, "gptq"),
    "AWQ": (set_config(quantization_config={"quant_method": "awq"}), InputError, "awq"),
    "bitsandbytes": (
        set_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        InputError,
        "bitsandbytes, 4-bit",
    ),
    "MLX": (set_config(quantization={"group_size": 64, "bits": 4}), InputError, "quantization"),
    "MLX in a part": (set_config(text_config={"quantization": {"bits": 4}}), InputError, "quantization"),
    "int8 without a word": (store_tensor(torch.int8), InputError, "is I8"),
    "4-bit without a word": (store_tensor(torch.uint8), InputError, "is U8"),
    "GPTQ without a word": (store_tensor(torch.int32, "qweight"), InputError, "is I32"),
    "FP8 without a word": (store_tensor(torch.float8_e4m3fn), InputError, "is F8_E4M3"),
    "scales alone in FP8": (store_tensor(torch.float8_e8m0fnu, "scales"), InputError, "is F8_E8M0"),
    "FP8 in a part": (set_config(text_config={"quantization_config": {"quant_method": "fp8"}}), InputError, "fp8"),
    "a new method": (set_config(quantization_config={"quant_method": "nonesuch"}), InputError, "nonesuch"),
    "a method without a name": (set_config(quantization_config={}), InputError, "an unknown method"),
    "other weights by name": (set_config(transformers_weights="decoy.safetensors"), InputError, "decoy.safetensors"),
    "another configuration": (set_config(configuration_files=["config.4.0.0.json"]), InputError, "config.4.0.0.json"),
    "an adapter's configuration": (add_adapter_config, InputError, "adapter_config.json"),
}


@pytest.mark.parametrize("offer", REFUSED)
def test_what_cannot_be_read_for_sure_is_refused_by_name(copy: Path, other: Path, offer: str) -> None:
    spoil, kind, mention = REFUSED[offer]
    before = find_folder_base(copy)
    spoil(copy, other)
    # Before loading, and when loading after a change.
    for read_base in (
        lambda: find_folder_base(copy),
        lambda: load_lora_base(before),
    ):
        with pytest.raises(kind) as caught:
            read_base()
        assert mention in str(caught.value)
        assert (caught.value.field, caught.value.exit_status) == ("model.path", 2)
        assert str(copy) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {}}', "[" * 100000])
def test_an_index_that_is_none(copy: Path, text: str) -> None:
    (copy / SINGLE).unlink()
    (copy / INDEX).write_text(text)
    with pytest.raises(CorruptFile, match="index"):
        find_folder_base(copy)


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"a": ' * 100000])
def test_a_configuration_that_is_none(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"config\.json"):
        find_folder_base(copy)


def test_shards_are_read_and_hashed(copy: Path, tiny_model: Path) -> None:
    save_shards(copy)
    base = find_folder_base(copy)
    expected_tensors = load_file(tiny_model / SINGLE)
    assert all(
        torch.equal(t, expected_tensors[n]) for n, t in load_lora_base(base).named_parameters() if n in expected_tensors
    )
    path = sorted(copy.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert find_folder_base(copy).digest != base.digest


def test_links_lead_where_they_lead_and_that_is_hashed(copy: Path, tmp_path: Path) -> None:
    """The cache of the hub consists of links to files that are named by their contents."""
    snapshot = tmp_path / "snapshots" / "abc"
    blobs = tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    plain = find_folder_base(copy)
    for n, path in enumerate(sorted(copy.iterdir())):
        path.rename(blobs / str(n))
        (snapshot / path.name).symlink_to(f"../../blobs/{n}")
    base = find_folder_base(snapshot)
    assert base.digest == plain.digest
    load_lora_base(base)
    target = (snapshot / SINGLE).resolve()
    target.write_bytes(target.read_bytes()[:-1] + b"\1")
    assert find_folder_base(snapshot).digest != base.digest


def test_a_folder_has_no_revisions(copy: Path) -> None:
    for arguments in ({"path": str(copy)}, {"path": "pocket"}, {}):
        with pytest.raises(InputError) as caught:
            find_base(**arguments, revision="v1")
        assert caught.value.field == "model.revision"


def test_an_ancestor_may_have_lost_its_weights(copy: Path) -> None:
    (copy / SINGLE).unlink()
    assert load_artifact(copy, "here", verify=False).digest == ""
    with pytest.raises(InputError, match="no safetensors"):
        load_artifact(copy, "here")


@pytest.mark.parametrize("nothing", [None, {}, False, "none"])
def test_a_word_for_no_quantisation_is_none(copy: Path, nothing: Any) -> None:
    edit_json(copy / "config.json", quantization=nothing)
    load_lora_base(find_folder_base(copy))


def test_buffers_may_be_integers(copy: Path) -> None:
    """Checkpoints of GPT-2 models may contain causal masks as integers."""
    tensors = load_file(copy / SINGLE)
    buffers = {"model.mask": torch.ones(4, 4).bool(), "model.ids": torch.arange(4)}
    save_file(tensors | buffers, copy / SINGLE, {"format": "pt"})
    find_folder_base(copy)
