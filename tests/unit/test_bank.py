"""The adapter bank: each row gets the product of its own adapter, and adapters that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from serving_engines import FAMILIES, PLAIN_LORA, save_random_adapter, save_random_adapters
from torch import Tensor
from torch.testing import assert_close

from align.core.errors import CorruptFile, InputError
from align.models.adapters import Adapter
from align.models.fastpath import adapter_bank as bank_module
from align.models.fastpath.adapter_bank import UNIT, AdapterBank, Site, load_bank_adapter, plan_products

SITES = (Site(("q", "k"), 24, (32, 16)), Site(("down",), 40, (24,)))
RANKS = {"a": 16, "b": 5, "c": 40, "d": 64, "e": 16, "f": 20}


def create_adapter(name: str) -> Adapter:
    draw = torch.Generator().manual_seed(ord(name))
    rank = RANKS[name]
    modules = [(m, site.inputs, out) for site in SITES for m, out in zip(site.modules, site.outputs, strict=True)]
    adapter_modules = modules if name != "e" else [module_shape for module_shape in modules if module_shape[0] != "k"]
    tensors = {}
    for module, inputs, out in adapter_modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=draw)
    return Adapter({"r": rank}, tensors)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that are created from their folder's name, without files."""
    monkeypatch.setattr(bank_module, "load_bank_adapter", lambda folder, sites, rank: create_adapter(folder.name))


def compute_expected(name: str | None, site: Site, x_I: Tensor) -> Tensor:
    if name is None:
        return torch.zeros(sum(site.outputs))
    factors = create_adapter(name).factors
    parts = [
        factors[m][1] @ (factors[m][0] @ x_I) if m in factors else torch.zeros(out)
        for m, out in zip(site.modules, site.outputs, strict=True)
    ]
    return torch.cat(parts)


def check_step(bank: AdapterBank, adapters: list[str | None]) -> None:
    """Check what a step adds to rows of these adapters."""
    order, plan = plan_products(adapters, bank)
    assert sorted(order) == list(range(len(adapters)))
    for number, site in enumerate(SITES):
        x_BI = torch.randn(len(adapters), site.inputs, generator=torch.Generator().manual_seed(number))
        out = torch.zeros(len(adapters), sum(site.outputs))
        bank.add_adapter_outputs(number, x_BI[order], out, plan)
        for row, i in zip(out, order, strict=True):
            assert_close(row, compute_expected(adapters[i], site, x_BI[i]), atol=1e-3, rtol=1e-4)


names = st.sampled_from([None, *RANKS])


@settings(max_examples=60)
@given(st.lists(st.lists(names, min_size=1, max_size=40), min_size=1, max_size=6), st.integers(3, 6))
def test_each_row_gets_its_own_adapter(steps: list[list[str | None]], resident: int):
    """Random rows get the right product, with adapters loaded and evicted between steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "load_bank_adapter", lambda folder, sites, rank: create_adapter(folder.name))
        bank = AdapterBank(SITES, resident, 64, torch.float32)
        for rows in steps:
            loaded_names = list(dict.fromkeys(row for row in rows if row is not None))[:resident]
            for name in loaded_names:
                bank.load(name, Path(name), set(loaded_names))
            check_step(bank, [row if row in loaded_names else None for row in rows])
            units = [unit for adapter_units in bank.units.values() for unit in adapter_units]
            assert sorted(units + bank._free) == list(range(resident * 64 // UNIT))


def test_the_adapter_used_least_lately_makes_room(named: None):
    bank = AdapterBank(SITES, 2, 64, torch.float32)
    for name in ("a", "b", "a"):
        bank.load(name, Path(name), set())
    bank.load("c", Path("c"), {"b"})  # in use, so it stays
    assert list(bank.units) == ["b", "c"]
    assert bank.has_room({"b"})
    assert not bank.has_room({"b", "c"})


def test_an_adapter_that_fails_while_it_is_written_leaves_its_room(named: None, monkeypatch: pytest.MonkeyPatch):
    bank = AdapterBank(SITES, 2, 64, torch.float32)
    free = sorted(bank._free)
    monkeypatch.setattr(bank_module, "pad", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.load("d", Path("d"), set())
    assert not bank.units
    assert sorted(bank._free) == free


SITES_OF_LLAMA = tuple(
    Site(tuple(f"model.layers.{layer}.{name}" for name in modules), inputs, outputs)
    for layer in range(2)
    for modules, inputs, outputs in (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 64, (128, 64, 64)),
        (("self_attn.o_proj",), 128, (64,)),
        (("mlp.gate_proj", "mlp.up_proj"), 64, (192, 192)),
        (("mlp.down_proj",), 192, (64,)),
    )
)


def test_every_kind_of_plain_lora_is_taken_in(tmp_path: Path):
    for folder, kind in zip(save_random_adapters(FAMILIES["llama"], tmp_path), PLAIN_LORA, strict=True):
        loaded_adapter = load_bank_adapter(folder, SITES_OF_LLAMA, 64)
        assert loaded_adapter.config["r"] == max(kind["r"], *kind.get("rank_pattern", {"": 0}).values())


@pytest.mark.parametrize(
    ("kind", "field", "problem"),
    [
        ({"use_dora": True}, "use_dora", "reject DoRA"),
        ({"r": 80}, "r", r"is above stage\.max_rank=64"),
        ({"target_modules": ["embed_tokens"]}, "adapter_model.safetensors", "is no lora_A or lora_B weight"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "whole modules"),
        ({"bias": "lora_only"}, "bias", "biases"),
    ],
)
def test_what_cannot_stand_in_a_bank_is_refused(kind: dict, field: str, problem: str, tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama, every bias"], tmp_path / "a", **kind)
    with pytest.raises(InputError, match=problem) as caught:
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)
    assert caught.value.field == field


def test_an_adapter_that_changes_the_base_is_refused(tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(InputError, match="init_lora_weights"):
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)


def test_an_adapter_on_another_module_is_refused(tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("model.layers.0.self_attn.q_proj", "lm_head"): t for key, t in tensors.items()}, path)
    with pytest.raises(InputError, match=r"target_modules=lm_head: is no linear layer of this base's"):
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "leaves out model.layers.0.mlp.down_proj, "),
        ({"target_modules": r".*\.0\..*_proj"}, "leaves out model.layers.1.mlp.down_proj, "),
        (
            {
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                "layers_to_transform": [1],
            },
            "leaves out model.layers.0.mlp.down_proj, ",
        ),
        ({"exclude_modules": ["o_proj"]}, "leaves out model.layers.0.self_attn.o_proj, "),
    ],
)
def test_tensors_that_the_configuration_leaves_out_are_refused(changes: dict, problem: str, tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=problem) as caught:
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)
    assert caught.value.field == "target_modules"


def test_modules_that_the_configuration_names_and_the_file_lacks_are_refused(tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a", target_modules=["q_proj", "v_proj"])
    load_bank_adapter(folder, SITES_OF_LLAMA, 64)
    path = folder / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "layers.1.self_attn.v_proj" not in key}, path)
    with pytest.raises(
        InputError, match=r"target_modules=q_proj, v_proj: names model\.layers\.1\.self_attn\.v_proj, and"
    ):
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)


def test_another_models_adapter_is_refused(tmp_path: Path):
    config = type(FAMILIES["llama"])(**{**FAMILIES["llama"].to_dict(), "intermediate_size": 128})
    with pytest.raises(InputError, match="64 by 128: this base has 64 by 192"):
        load_bank_adapter(save_random_adapter(config, tmp_path / "a"), SITES_OF_LLAMA, 64)


@pytest.mark.parametrize("how", ["nan", "cut", "half"])
def test_spoilt_files_are_refused(how: str, tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    if how == "nan":
        tensors[key][0, 0] = float("nan")
        save_file(tensors, path)
    elif how == "half":
        save_file({k: v for k, v in tensors.items() if k != key}, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFile):
        load_bank_adapter(folder, SITES_OF_LLAMA, 64)


def test_a_configuration_that_is_none_is_refused(tmp_path: Path):
    folder = save_random_adapter(FAMILIES["llama"], tmp_path / "a")
    for text in ("[]", "{", json.dumps({"peft_type": "IA3"})):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError):
            load_bank_adapter(folder, SITES_OF_LLAMA, 64)
