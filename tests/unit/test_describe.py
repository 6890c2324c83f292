"""A base's configuration, read without weights, agrees with the loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from align.models.load import get_context_length, load_base, read_configurations
from align.run import Base


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [3, 7]}])
@pytest.mark.parametrize("ends", [True, False])
def test_a_base_says_of_itself_what_its_model_says(
    tiny_model: Path, tmp_path: Path, generation: dict[str, Any] | None, ends: bool
) -> None:
    """Both name the same end tokens, also if no file names them and the class's default holds."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    if not ends:
        config.pop("eos_token_id", None)
        (folder / "config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    base = Base("m", str(folder), None, "")
    described = read_configurations(base)
    model = load_base(base, "lora", torch.device("cpu"), torch.float32)
    assert described.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert get_context_length(described) == get_context_length(model) == config["max_position_embeddings"]


@pytest.mark.parametrize("model_type", ["gemma3", "fuyu", "got_ocr2"])
def test_a_model_of_parts_has_the_positions_of_its_text(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    assert not hasattr(config, "max_position_embeddings")
    assert get_context_length(SimpleNamespace(config=config)) == config.get_text_config().max_position_embeddings > 2048
