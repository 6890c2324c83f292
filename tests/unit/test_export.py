"""Exports are published whole or not at all, are read by plain loaders, and equal the trained model."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import pytest
import torch
from export_models import (
    BASE,
    compute_adapter_logits,
    compute_logits,
    export_adapter,
    export_merged,
    load_base_model,
    load_tokenizer_options,
    make_adapter,
    make_base,
    measure_divergence,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
)

from align.core.errors import CorruptFile, InputError, MissingArtifact, StorageError
from align.export.card import render_card
from align.export.merged import merge_adapter
from align.models.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from align.run.atomic import publish_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "policy")


# --- The adapter ------------------------------------------------------------------------------------------------------


def test_exported_adapter_is_the_same_model_and_names_no_path(base: Path, adapter: Path, tmp_path: Path):
    target = export_adapter(adapter, tmp_path / "out", **load_tokenizer_options(base))
    assert sorted(p.name for p in target.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    before = load_file(adapter / WEIGHTS_FILE)
    after = load_file(target / WEIGHTS_FILE)
    assert before.keys() == after.keys()  # alpha is 8 and the rank 4, so that lora_B is doubled
    assert all(torch.equal(after[key], before[key] * (2 if "lora_B" in key else 1)) for key in before)
    assert torch.equal(compute_adapter_logits(base, adapter), compute_adapter_logits(base, target))
    assert json.loads((target / "base.json").read_text()) == BASE

    config = json.loads((target / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["revision"] == "abc123"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config.keys().isdisjoint({"loftq_config", "peft_version", "megatron_core", "eva_config"})
    assert json.loads((adapter / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(
        base
    )  # the path that the export removes
    for path in target.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_exported_tokenizer_chats_alike_and_brings_what_lies_beside_it(base: Path, adapter: Path, tmp_path: Path):
    base_copy = Path(shutil.copytree(base, tmp_path / "base"))
    (base_copy / "tokenizer.model").write_bytes(b"pieces")
    GenerationConfig(do_sample=True, temperature=0.7).save_pretrained(base_copy)
    target = export_adapter(adapter, tmp_path / "out", **load_tokenizer_options(base_copy))
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded.apply_chat_template([{"role": "user", "content": "w5 w7"}])["input_ids"] == [5, 7]
    assert "is_local" not in json.loads((target / "tokenizer_config.json").read_text())
    assert (target / "tokenizer.model").read_bytes() == b"pieces"
    assert GenerationConfig.from_pretrained(target).temperature == 0.7


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shorten_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def falsify_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def write_nan(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, path)


def change_rank(path: Path) -> None:
    save_file({k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [truncate_file, shorten_header, falsify_header, drop_tensor, write_nan, change_rank])
def test_damaged_weights_are_refused_and_leave_nothing(base: Path, adapter: Path, tmp_path: Path, damage):
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    damage(source / WEIGHTS_FILE)
    with pytest.raises(CorruptFile, match=r"adapter_model\.safetensors") as error:
        export_adapter(source, tmp_path / "out", **load_tokenizer_options(base))
    assert error.value.exit_status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_missing_and_broken_config(adapter: Path, tmp_path: Path):
    with pytest.raises(MissingArtifact, match="adapter_config"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"r": 4')
    with pytest.raises(CorruptFile, match="is not JSON"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "IA3"}')
    with pytest.raises(InputError, match="only LORA"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text((adapter / CONFIG_FILE).read_text())
    with pytest.raises(CorruptFile, match="adapter_model"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_engines_would_read_wrongly_is_refused_by_name(base: Path, tmp_path: Path, options, named):
    source = make_adapter(base, tmp_path / "source", **options)
    with pytest.raises(InputError, match=f"^{named}="):
        export_adapter(source, tmp_path / "out", **load_tokenizer_options(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_what_was_taken_out_of_the_base_for_good_is_refused(base: Path, adapter: Path, tmp_path: Path, init: str):
    source = tmp_path / "source"
    shutil.copytree(adapter, source)
    config = json.loads((source / CONFIG_FILE).read_text())
    (source / CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(InputError, match=f"init_lora_weights={init}"):
        export_adapter(source, tmp_path / "other", **load_tokenizer_options(base))


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "~/model", "", "C:\\model"])
def test_a_base_must_be_findable_elsewhere(base: Path, adapter: Path, tmp_path: Path, name: str):
    with pytest.raises(InputError, match=r"base\.id"):
        export_adapter(adapter, tmp_path / "out", BASE | {"id": name}, **load_tokenizer_options(base))


# --- The folder -------------------------------------------------------------------------------------------------------


def test_publish_is_all_or_nothing(tmp_path: Path):
    target = tmp_path / "out"

    def write_half(replace: str = "") -> None:
        with publish_folder(target, replace) as part:
            (part / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert not list(tmp_path.iterdir())

    target.mkdir()  # a run's empty artifact folder
    with publish_folder(target) as part:
        (part / "a").write_text("1")
        assert not list(target.iterdir())
    assert (target / "a").read_text() == "1"

    with pytest.raises(InputError, match="already holds files"), publish_folder(target):
        pass
    with pytest.raises(KeyError):
        write_half(replace="a")
    assert [p.name for p in target.iterdir()] == ["a"]
    with publish_folder(target, replace="a") as part:
        (part / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_publish_under_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"), publish_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(InputError, match="is a file"), publish_folder(tmp_path / "file"):
        pass


# --- The card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_runs(base: Path, adapter: Path, tmp_path: Path, monkeypatch, kind: str):
    facts = {"name": "support", "kind": kind, "base": {"id": "tiny"}, "method": "qlora"}
    target = tmp_path / "support"
    if kind == "adapter":
        export_adapter(adapter, target, facts["base"], **load_tokenizer_options(base))
    else:
        export_merged(merge_adapter(load_base_model(base), adapter), target, **load_tokenizer_options(base))
    monkeypatch.chdir(target)
    Path("tiny").symlink_to(base)
    code = render_card(facts).split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert len(names["answer"]) > 0
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert measure_divergence(compute_adapter_logits(base, adapter), compute_logits(names["model"].eval())).kl < 0.05
    assert names["tokenizer"].eos_token == "</s>"


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path):
    """Only folders of this machine's dead processes are removed, because others may still be written."""
    target = tmp_path / "out"
    host = gethostname()
    dead_pid = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    stale_folder = tmp_path / f".out.{host}-{dead_pid.strip()}-0000.part"
    other_folders = [
        tmp_path / f".out.{host}-{os.getpid()}-0000.part",
        tmp_path / ".out.elsewhere-1234567-0000.part",
        tmp_path / f".other.{host}-{dead_pid.strip()}-0000.part",
    ]
    for path in (stale_folder, *other_folders):
        path.mkdir()
    with publish_folder(target) as part:
        (part / "x").touch()
    assert not stale_folder.exists()
    assert all(path.is_dir() for path in other_folders)
