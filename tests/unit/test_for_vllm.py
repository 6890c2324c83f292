"""Adapters are converted for vLLM, and those that it cannot serve are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapters_for_vllm import MODULES, build_vllm_adapters, learn_short_probes, save_vllm_adapters

from align.core.errors import CorruptFile, InputError
from align.export import vllm_adapters as module
from align.models.base import find_base
from align.rollout.probes import Probes, write_probes
from align.rollout.vllm_server import (
    build_serve_arguments,
    choose_max_lora_rank,
    list_adaptable_layers,
    read_servable_rank,
)
from align.run import write_json
from align.run.weights import adapter_digest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_vllm_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def must_say(folders: dict[str, Path]) -> tuple[Probes, dict[str, Probes]]:
    return learn_short_probes(folders)


def test_probes_beside_an_adapter_save_loading_the_base(
    folders: dict[str, Path],
    must_say: tuple[Probes, dict[str, Probes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    base = find_base("pocket")
    (base_probes, adapter_probes) = must_say
    exported = tmp_path / "exported"
    exported.mkdir()
    for path in folders["plain"].iterdir():
        (exported / path.name).write_bytes(path.read_bytes())
    digest = adapter_digest(exported)
    write_probes(exported, adapter_probes[digest], digest, base.digest)

    def fail_to_load(*_: Any) -> Any:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("align.export.vllm_adapters.load_base", fail_to_load)
    vllm_adapters = build_vllm_adapters(tmp_path / "vllm")
    assert vllm_adapters.load_probes({digest: exported}) == base_probes
    assert vllm_adapters(exported, digest).probes == adapter_probes[digest]
    with pytest.raises(AssertionError):
        vllm_adapters.load_probes({digest: exported, adapter_digest(folders["scaled"]): folders["scaled"]})


def test_room_is_made_for_the_highest_rank(folders: dict[str, Path]):
    layers = list_adaptable_layers(find_base("pocket"))
    arguments = build_serve_arguments(
        "0" * 64, "float32", layers=layers, rank=16, adapters=1, slots=1, context=8, prefixes=False
    )
    assert arguments[arguments.index("--lora-target-modules") + 1 :] == MODULES
    assert read_servable_rank(folders["patterns"], None, layers) == 12
    assert choose_max_lora_rank([*folders.values()], None, layers) == 16
    assert choose_max_lora_rank([*folders.values()], 40, layers) == 64
    with pytest.raises(InputError, match=r"r=12: is over 8, the maximum rank that vLLM was started with"):
        read_servable_rank(folders["patterns"], 8, layers)
    with pytest.raises(InputError, match=r"r=12: is over 8"):  # before vLLM starts, even if a rank is set
        choose_max_lora_rank([*folders.values()], 8, layers)
    with pytest.raises(InputError, match=r"target_modules=.*: is no linear layer of the base but its head"):
        read_servable_rank(folders["plain"], None, layers[:3])


def test_an_adapter_that_names_other_layers_than_it_has_is_refused(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["plain"], tmp_path / "narrow")
    config = json.loads((tmp_path / "narrow" / "adapter_config.json").read_text())
    write_json(tmp_path / "narrow" / "adapter_config.json", {**config, "target_modules": ["q_proj"]})
    with pytest.raises(InputError, match=r"target_modules=q_proj: leaves out"):
        read_servable_rank(tmp_path / "narrow", None, list_adaptable_layers(find_base("pocket")))


def test_files_that_change_while_they_are_read_are_not_served(
    folders: dict[str, Path],
    must_say: tuple[Probes, dict[str, Probes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    source = shutil.copytree(folders["plain"], tmp_path / "source")
    digest = adapter_digest(source)
    write_adapter = module.write_adapter

    def write_and_change_source(*args: Any, **options: Any) -> None:
        write_adapter(*args, **options)
        shutil.copyfile(folders["scaled"] / "adapter_model.safetensors", source / "adapter_model.safetensors")

    monkeypatch.setattr(module, "write_adapter", write_and_change_source)
    vllm_adapters = build_vllm_adapters(tmp_path / "vllm", must_say[1])
    with pytest.raises(CorruptFile, match="were changed while it was loaded"):
        vllm_adapters(source, digest)
    assert list((tmp_path / "vllm").iterdir()) == []
