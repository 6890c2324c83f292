"""What the scripts of benchmarks/frontier compute from runs: pairs by prompt, a peak that nothing chose for itself, and
the quickstart's own lines."""

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
    outcomes, kl_efficiency = script("outcomes"), script("kl_efficiency")

    def point(scores: dict[str, float]) -> Any:
        told = [Conversation((Message("user", asked), Message("assistant", f"to {asked}"))) for asked in scores]
        return outcomes.Point(told, list(scores.values()), {})

    ours = [point({"a": 0.5, "b": 0.9, "c": 0.1}), point({"a": 1.0})]
    theirs = [point({"b": 0.5, "a": 0.4, "d": 0.0}), point({"a": 0.7})]
    found = kl_efficiency.compare_gold(ours, theirs)
    value, low, high = found["all"]
    assert value == pytest.approx((0.1 + 0.4 + 0.3) / 3)
    assert low < value < high
    assert (found["seeds"], found["prompts"]) == (pytest.approx([0.25, 0.3]), 3)


def test_a_peak_is_chosen_on_one_half_of_the_prompts_and_measured_on_the_other(script: Any) -> None:
    overoptimisation, kl = script("overoptimisation"), np.linspace(0, 8, 17)

    def found(curve: np.ndarray, seed: int) -> dict[str, Any]:
        gold = (curve[:, None] + np.random.default_rng(seed).normal(0, 0.5, (17, 400))).tolist()
        return overoptimisation.summarize_peak(
            [{"step": list(range(17)), "kl": kl.tolist(), "gold": gold, "proxy": gold}]
        )

    flat = [found(np.zeros(17), seed) for seed in range(20)]
    assert abs(np.mean([each["peak"] for each in flat])) < 0.02  # of the very prompts that chose it, 0.06
    assert sum(each["lost"][1] < 0 < each["lost"][2] for each in flat) >= 16
    fell = found(0.5 - (kl - 4) ** 2 / 20, 0)
    assert fell["lost"][2] < -0.5
    assert 3 <= fell["peak_kl"] <= 5
    assert fell["end_kl"] == 8


def test_gold_that_never_turns_has_a_row_too(script: Any) -> None:
    overoptimisation, gold = script("overoptimisation"), [[float(i)] * 4 for i in range(3)]
    row = overoptimisation.summarize_peak(
        [{"step": [0, 1, 2], "kl": [0.0, 1.0, 2.0], "gold": gold, "proxy": [[1.0, 2.0], [2.0, 3.0]]}]
    )
    assert overoptimisation.format_table({"rows": {"400": row}}).splitlines()[-1].endswith("| +0.00 |")


def test_the_mean_of_adapters_is_the_mean_of_what_they_add(script: Any, tmp_path: Path) -> None:
    """In every layer."""
    torch.manual_seed(0)
    base = find_base()

    def adapter(name: str, lora: Lora) -> Path:
        model = add_new_adapter(load_base(base, "lora", torch.device("cpu"), torch.float32), lora)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        save_adapter(model, tmp_path / name, base)
        return tmp_path / name

    def added(folder: Path) -> dict[str, torch.Tensor]:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        scale, names = config["lora_alpha"] / config["r"], [name for name in tensors if "lora_B" in name]
        return {name: scale * tensors[name] @ tensors[name.replace("lora_B", "lora_A")] for name in names}

    one, other = adapter("one", Lora(2, 8)), adapter("other", Lora(3, 3))
    script("average_adapters").average_adapters([one, other], tmp_path / "mean")
    found, first, second = (added(folder) for folder in (tmp_path / "mean", one, other))
    assert found.keys() == first.keys() == second.keys()
    for name, product in found.items():
        torch.testing.assert_close(product, (first[name] + second[name]) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_lines_of_the_recipe_are_those_that_it_runs(script: Any, seed: int, tmp_path: Path) -> None:
    """`run.sh` with a python that prints what it is told."""
    methods = script("training_methods")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncase $2 in align) cat;; esac\n")
    fake.chmod(0o755)
    words = ["bash", str(ROOT / "recipes" / "quickstart" / "run.sh"), str(seed), str(tmp_path / "runs")]
    said = subprocess.run(words, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True).stdout
    for stage in (*methods.SHARED_STAGES, "ppo"):
        (line,) = (line for line in said.splitlines() if line.startswith("seed=") and f" stage={stage} " in line)
        common, ours = line.split(" stage=")[0].split(), methods.read_recipe_overrides(stage, seed)
        assert len(common) == len(methods.build_shared_overrides(tmp_path, seed, "auto"))
        assert line.split()[len(common) :] == ours
