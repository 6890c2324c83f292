"""Published and exported models keep the configuration of their base: no training setting changes config.json or
generation_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from stage_commands import PPO, SFT, Workshop
from test_own_model import pairs
from transformers import AutoConfig, GenerationConfig

pytestmark = pytest.mark.usefixtures("no_network")
SMALL = ("stage.max_steps=2", "stage.eval_size=2")
REWARD = ("stage.batch_size=8", "stage.held_out=0.25", "stage.lr=0.01")
OF_A_FILE = {"dtype", "transformers_version", "_name_or_path"}
"""Keys about the file: the data type of the weights, the writer, and the path it was read from."""
OF_A_HEAD = {"architectures", "id2label", "label2id", "num_labels", "pad_token_id"}
"""Keys about the head of a reward model, which scores at the last token before the padding."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Workshop:
    """Runs on a model whose configuration no trainer would write."""
    folder = tmp_path_factory.mktemp("says")
    model = Path(shutil.copytree(tiny_model, folder / "mine"))
    config = json.loads((model / "config.json").read_text())
    settings = {"use_cache": True, "eos_token_id": [5, 2], "attention_dropout": 0.0625, "initializer_range": 0.03}
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token_id"} | settings))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 2], "max_new_tokens": 7}
    (model / "generation_config.json").write_text(json.dumps(sampling))
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")), "data.max_length=128")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(chats)), encoding="utf-8")
    pairs_settings = ("data=jsonl", f"data.path={file}", *REWARD)
    base_settings = ("model=hub", f"model.path={model}")
    shop.run("full", *base_settings, *SFT, *SMALL, "run.name=f")
    shop.run("sft", *base_settings, *SFT, *SMALL, "run.name=qlora")
    shop.run("reward", *pairs_settings, "init=sft:qlora", "run.name=qlora")
    shop.run("reward", *pairs_settings, "init=full:f", "method=lora", "run.name=of-full")
    shop.run("ppo", "init=full:f", "method=full", "reward.ref=reward:of-full", *PPO, "run.name=f")
    return shop


def read_configuration(folder: Path) -> dict[str, Any]:
    """Read both files with transformers, which adds the defaults of missing keys."""
    generation = GenerationConfig.from_pretrained(folder).to_dict()
    return AutoConfig.from_pretrained(folder).to_dict() | {f"generation {k}": v for k, v in generation.items()}


def find_changed_keys(folder: Path, base: Path) -> set[str]:
    """Return the keys that differ from the base, except those about the file."""
    configuration = read_configuration(folder)
    base_configuration = read_configuration(base)
    differing = {
        key
        for key in configuration.keys() | base_configuration.keys()
        if configuration.get(key) != base_configuration.get(key)
    }
    return {key for key in differing if key.removeprefix("generation ") not in OF_A_FILE}


@pytest.mark.parametrize("run", ["full/f", "ppo/f"])
def test_what_a_run_publishes_says_what_its_base_did(shop: Workshop, run: str) -> None:
    assert find_changed_keys(shop.root / run / "artifact", shop.root.parent / "mine") == set()


@pytest.mark.parametrize("ref", ["full:f", "ppo:f", "sft:qlora", "reward:qlora"])
def test_an_export_says_what_its_base_did(shop: Workshop, ref: str) -> None:
    folder = shop.run("export", f"artifact={ref}", "export=merged") / "artifact"
    changed_keys = find_changed_keys(folder, shop.root.parent / "mine")
    assert changed_keys - (OF_A_HEAD if ref.startswith("reward") else set()) == set()


def test_the_base_beside_an_adapter_says_what_its_base_did(shop: Workshop) -> None:
    folder = shop.run("export", "artifact=sft:qlora") / "artifact"
    (base,) = (path for path in folder.iterdir() if path.is_symlink())
    assert base.name.startswith("mine-")
    assert find_changed_keys(base, shop.root.parent / "mine") == set()
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6
