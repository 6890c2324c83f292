"""Adapters have exactly the tensors that their configuration defines on the base, and pickles are not read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Trap
from safetensors.torch import load_file, save_file
from tiny_roles import World

from align.core.errors import CorruptFile, InputError
from align.models.adapters import (
    CHANGES_BASE,
    SCORE_KEY,
    WEIGHTS_FILE,
    add_new_adapter,
    attach_adapter,
    read_adapter_config,
    save_adapter,
)
from align.models.lora import Lora
from align.models.roles import Roles

A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def copy_and_spoil(source: Path, target: Path, spoil: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS_FILE)
    spoil(tensors)
    save_file(tensors, target / WEIGHTS_FILE, {"format": "pt"})
    return target


HARMS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one missing": (lambda t: t.pop(A), A),
    "all missing": (lambda t: [t.pop(k) for k in list(t) if k != SCORE_KEY], "and 25 more"),
    "one too many": (lambda t: t.update({A.replace("layers.1", "layers.7"): t[A].clone()}), "layers.7"),
    "another shape": (lambda t: t.update({A: t[A][:2].clone()}), "size mismatch for " + A.removesuffix(".weight")),
}


@pytest.mark.parametrize("scored", [False, True], ids=["policy", "reward"])
@pytest.mark.parametrize("harm", HARMS)
def test_an_adapter_has_the_tensors_of_its_configuration(world: World, tmp_path: Path, harm: str, scored: bool) -> None:
    spoil, expected_text = HARMS[harm]
    folder = copy_and_spoil(world.reward if scored else world.init, tmp_path / "a", spoil)
    with pytest.raises(CorruptFile) as caught:
        attach_adapter(world.load(), folder, "x", is_reward_model=scored)
    assert expected_text in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.field == ("reward.ref" if scored else "adapter")


@pytest.mark.parametrize("harm", HARMS)
def test_the_second_adapter_is_looked_at_like_the_first(world: World, tmp_path: Path, harm: str) -> None:
    spoil, expected_text = HARMS[harm]
    folder = copy_and_spoil(world.reward, tmp_path / "a", spoil)
    with pytest.raises(CorruptFile) as caught:
        Roles(world.load(), world.init, [folder], Lora(4, 8))
    assert expected_text in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 32), (2, 64), (64,)])
def test_a_score_head_of_another_shape(world: World, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = copy_and_spoil(world.reward, tmp_path / "a", lambda t: t.update({SCORE_KEY: torch.zeros(shape)}))
    with pytest.raises(CorruptFile, match=r"its score head is \["):
        Roles(world.load(), world.init, [folder], Lora(4, 8))


def test_a_pickled_adapter_is_not_read(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.init, tmp_path / "a"))
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CorruptFile, match="beside it is pickled and not read"):
        attach_adapter(world.load(), folder, "x")
    assert not (tmp_path / "sprung").exists()


def test_adapters_of_every_configuration_that_peft_saves_are_taken(world: World, tmp_path: Path) -> None:
    """Complete adapters are accepted, also if only some layers are adapted or ranks differ by layer."""
    from peft import LoraConfig, get_peft_model

    some_layers = {"layers_to_transform": [1], "target_modules": ["q_proj"]}
    for n, changes in enumerate(
        (
            {},
            some_layers,
            {"use_dora": True},
            {"use_rslora": True},
            {"rank_pattern": {"up_proj": 2}},
            {"bias": "lora_only"},
            {"target_modules": ["q_proj"]},
            {"modules_to_save": ["lm_head"]},
        )
    ):
        settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
        folder = tmp_path / str(n)
        get_peft_model(world.load("lora"), LoraConfig(**settings)).save_pretrained(str(folder))
        attach_adapter(world.load("lora"), folder, "x")
    new_model = add_new_adapter(world.load("lora"), Lora(4, 8))
    save_adapter(new_model, tmp_path / "ours", world.base)
    attach_adapter(world.load("lora"), tmp_path / "ours", "x")


def test_an_adapter_of_another_kind_is_refused_by_name(world: World, tmp_path: Path) -> None:
    """Methods of PEFT other than LoRA are refused: PEFT would load each, and compute it in its own forward."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "LORA")
    assert len(kinds) > 20
    for kind in [*kinds, None, 1, ["LORA"]]:
        check_refusal(world, tmp_path / "a", kind, peft_type=kind)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("arrow_config", {"top_k": 3}),
        ("monteclora_config", {"n": 4}),
        ("kasa_config", {"beta": 1e-4}),
        ("use_qalora", True),
        ("use_bdlora", {"a": 1}),
        ("megatron_config", {"x": 1}),
        ("a_switch_of_tomorrow", True),
        ("config_of_tomorrow", {"x": 1}),
    ],
)
def test_lora_by_a_forward_of_another_kind_is_refused_by_name(
    world: World, tmp_path: Path, key: str, value: Any
) -> None:
    check_refusal(world, tmp_path / "a", key, **{key: value})


def check_refusal(world: World, folder: Path, expected_text: Any, **settings: Any) -> None:
    shutil.copytree(world.init, folder, dirs_exist_ok=True)
    config = json.loads((world.init / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InputError) as caught:
        attach_adapter(world.load(), folder, "x")
    assert (caught.value.field, str(folder)) == ("adapter", caught.value.value)
    assert str(expected_text) in str(caught.value)


def test_a_setting_of_tomorrow_that_says_nothing_is_passed_over(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.init, tmp_path / "a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    inert = {"tomorrow": None, "size_of_tomorrow": 16, "core": "a.b", "runtime_config": {"x": False}}
    (folder / "adapter_config.json").write_text(json.dumps(config | inert))
    attach_adapter(world.load(), folder, "x")


@pytest.mark.parametrize("init", CHANGES_BASE)
def test_an_adapter_that_changes_the_base_shares_it_with_nobody(world: World, tmp_path: Path, init: str) -> None:
    """PEFT subtracts such an adapter's first product from the base at every load, so two of them change each other."""
    folder = Path(shutil.copytree(world.init, tmp_path / "a"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(InputError, match=rf"init_lora_weights={init} changed the base.*stage=export"):
        Roles(world.load(), folder, [], Lora(4, 8))
    assert read_adapter_config(folder, is_only_adapter=True)["init_lora_weights"] == init
