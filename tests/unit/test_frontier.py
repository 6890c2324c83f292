"""The scripts of benchmarks/frontier compare runs prompt by prompt, measure a peak on other prompts than those that
chose it, and use the quickstart's own overrides."""

from __future__ import annotations

import json
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.core.types import Conversation, Message
from align.models.adapters import add_new_adapter, save_adapter
from align.models.base import find_base
from align.models.load import load_base
from align.models.lora import Lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "frontier")
    return import_module


def test_gold_is_compared_on_the_prompts_that_both_answered(script: Any) -> None:
    outcomes = script("outcomes")
    kl_efficiency = script("kl_efficiency")

    def build_point(scores: dict[str, float]) -> Any:
        conversations = [
            Conversation((Message("user", prompt), Message("assistant", f"to {prompt}"))) for prompt in scores
        ]
        return outcomes.Point(conversations, list(scores.values()), {})

    ours = [build_point({"a": 0.5, "b": 0.9, "c": 0.1}), build_point({"a": 1.0})]
    theirs = [build_point({"b": 0.5, "a": 0.4, "d": 0.0}), build_point({"a": 0.7})]
    gold = kl_efficiency.compare_gold(ours, theirs)
    value, low, high = gold["all"]
    assert value == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    assert low < value < high
    assert (gold["seeds"], gold["prompts"]) == (pytest.approx([0.25, 0.3]), 3)


def test_a_peak_is_chosen_on_one_half_of_the_prompts_and_measured_on_the_other(script: Any) -> None:
    overoptimisation = script("overoptimisation")
    kl = np.linspace(0, 8, 17)

    def summarize_curve(curve: np.ndarray, seed: int) -> dict[str, Any]:
        gold = (curve[:, None] + np.random.default_rng(seed).normal(0, 0.5, (17, 400))).tolist()
        return overoptimisation.summarize_peak(
            [{"step": list(range(17)), "kl": kl.tolist(), "gold": gold, "proxy": gold}]
        )

    flat_rows = [summarize_curve(np.zeros(17), seed) for seed in range(20)]
    assert abs(np.mean([row["peak"] for row in flat_rows])) < 0.02  # 0.06 if measured on the prompts that chose it
    assert sum(row["lost"][1] < 0 < row["lost"][2] for row in flat_rows) >= 16
    falling = summarize_curve(0.5 - (kl - 4) ** 2 / 20, 0)
    assert falling["lost"][2] < -0.5
    assert 3 <= falling["peak_kl"] <= 5
    assert falling["end_kl"] == 8


def test_gold_that_never_turns_has_a_row_too(script: Any) -> None:
    overoptimisation = script("overoptimisation")
    gold = [[float(i)] * 4 for i in range(3)]
    row = overoptimisation.summarize_peak(
        [{"step": [0, 1, 2], "kl": [0.0, 1.0, 2.0], "gold": gold, "proxy": [[1.0, 2.0], [2.0, 3.0]]}]
    )
    assert overoptimisation.format_table({"rows": {"400": row}}).splitlines()[-1].endswith("| +0.00 |")


def test_the_mean_of_adapters_is_the_mean_of_what_they_add(script: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = find_base()

    def save_random_adapter(name: str, lora: Lora) -> Path:
        model = add_new_adapter(load_base(base, "lora", torch.device("cpu"), torch.float32), lora)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        save_adapter(model, tmp_path / name, base)
        return tmp_path / name

    def compute_products(folder: Path) -> dict[str, torch.Tensor]:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"]
        names = [name for name in tensors if "lora_B" in name]
        return {name: scale * tensors[name] @ tensors[name.replace("lora_B", "lora_A")] for name in names}

    first_path = save_random_adapter("one", Lora(2, 8))
    second_path = save_random_adapter("other", Lora(3, 3))
    script("average_adapters").average_adapters([first_path, second_path], tmp_path / "mean")
    mean, first, second = (compute_products(folder) for folder in (tmp_path / "mean", first_path, second_path))
    assert mean.keys() == first.keys() == second.keys()
    for name, product in mean.items():
        torch.testing.assert_close(product, (first[name] + second[name]) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_lines_of_the_recipe_are_those_that_it_runs(script: Any, seed: int, tmp_path: Path) -> None:
    """Run `run.sh` with a fake python that prints its standard input."""
    methods = script("training_methods")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncase $2 in align) cat;; esac\n")
    fake.chmod(0o755)
    command = ["bash", str(ROOT / "recipes" / "quickstart" / "run.sh"), str(seed), str(tmp_path / "runs")]
    stdout = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True).stdout
    for stage in (*methods.SHARED_STAGES, "ppo"):
        (line,) = (line for line in stdout.splitlines() if line.startswith("seed=") and f" stage={stage} " in line)
        common = line.split(" stage=")[0].split()
        ours = methods.read_recipe_overrides(stage, seed)
        assert len(common) == len(methods.build_shared_overrides(tmp_path, seed, "auto"))
        assert line.split()[len(common) :] == ours
